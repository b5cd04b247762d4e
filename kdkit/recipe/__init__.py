"""From YAML files and plugins to one typed recipe with a fingerprint; every complaint has file
and line.
"""

from kdkit.recipe.loading import (
    Recipe,
    code_in,
    code_of_all,
    content_of,
    load,
    models_in,
    read,
    teacher_recipes,
)

__all__ = [
    "Recipe",
    "code_in",
    "code_of_all",
    "content_of",
    "load",
    "models_in",
    "read",
    "teacher_recipes",
]
