"""Networks from a Python file of the user's own; the file runs because the recipe names it."""

import difflib
import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from pydantic import Field
from torch import nn

import kdkit


class PythonSource(kdkit.ModelSource):
    """A class or function of a Python file: `model: python/Net` with `file: net.py`, called with
    `num_classes` and `args`.

    Modules in the file's folder that it imports as it is read are part of it.
    """

    name = "python"

    class Options(kdkit.ModelOptions):
        """Where the class is, and what it is called with."""

        file: kdkit.RecipePath = Field(
            description="Python file that defines the class or function; it is executed.",
            json_schema_extra=kdkit.CODE,
        )
        args: kdkit.Arguments = Field(
            default_factory=dict, description="Arguments beside `num_classes`."
        )
        in_channels: int | None = Field(
            default=None,
            gt=0,
            description="Channels that the network takes (default: the images').",
        )

    options: Options

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """What the class or function returns."""
        file = self.options.file
        make = getattr(_import(file), self.model_name, None)
        if not callable(make):
            raise kdkit.ModelError(
                f"{file} defines no '{self.model_name}'{_near(self.model_name, file)}"
            )
        try:
            module = make(num_classes=num_classes, **self.options.args)
        except Exception as error:
            raise kdkit.ModelError(
                f"{file}: {self.model_name}(num_classes={num_classes}, ...) failed:"
                f" {kdkit.cause(error)}"
            ) from error
        if not isinstance(module, nn.Module):
            raise kdkit.ModelError(
                f"{file}: {self.model_name}() returned {type(module).__name__}, not a"
                " torch.nn.Module"
            )
        return module

    def in_channels(self, image_channels: int) -> int:
        """What the recipe says, else the images' own."""
        return self.options.in_channels or image_channels


def _import(file: Path) -> ModuleType:
    try:
        # of what it imports too: a file that was edited is another module
        digest = hashlib.sha256(f"{file} {kdkit.code_digest(file)}".encode()).hexdigest()[:12]
    except OSError as error:
        raise kdkit.ModelError(f"{file}: cannot be read: {error.strerror}") from error
    name = f"kdkit_model_{file.stem}_{digest}"
    if name in sys.modules:  # the same text of the same file: teacher and student share its classes
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise kdkit.ModelError(f"{file}: a model file is Python source and ends in .py")
    # registered before it runs, as an import does: dataclasses look their module up there
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with kdkit.beside(file):
            spec.loader.exec_module(module)
    except Exception as error:
        # the next call must not find what broke half-way
        del sys.modules[name]
        raise kdkit.ModelError(f"{file}: cannot be imported: {kdkit.cause(error)}") from error
    return module


def _near(name: str, file: Path) -> str:
    own = [
        key
        for key, value in vars(_import(file)).items()
        # not what it imports from elsewhere
        if getattr(value, "__module__", None) == _import(file).__name__
    ]
    close = difflib.get_close_matches(name, own, n=1, cutoff=0.5)
    return (
        f"; did you mean '{close[0]}'?" if close else f"; it defines: {', '.join(own) or 'nothing'}"
    )


@kdkit.hookimpl
def kdkit_models() -> list[type[kdkit.ModelSource]]:
    return [PythonSource]
