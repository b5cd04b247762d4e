"""Knowledge distillation from recipes: any loss plugin under any schedule plugin.

Everything a plugin or a script needs is here, loaded when it is first used; the names are listed in
`__init__.pyi`.
"""

import lazy_loader

__version__ = "0.1.0"  # defined first: the modules imported on demand read it

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
