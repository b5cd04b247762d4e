"""Reports a command line that the command does not accept, in one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from kdkit.errors import one_line


def told(error: Any, words: Sequence[str]) -> str:
    """Format typer's error about the command line `words`, on one line that begins with the
    command.
    """
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "kdkit"
    # Typer breaks lines, pydantic puts words before its message.
    says = " ".join(error.format_message().split()).replace("Value error, ", "").rstrip(".")
    # Errors about options have it.
    option = getattr(error, "option_name", None)
    takes_overrides = context and any(param.name == "overrides" for param in context.command.params)
    # Who writes `--epochs 3` means a key of the recipe.
    if option and takes_overrides and (keys := list(_keys_called(option))):
        value = _value_after(option, words)
        says = (
            f"No such option: {option}; a recipe's value is given as"
            f" {' or '.join(f'{key}={value}' for key in keys)}"
        )
    elif option or "Missing" in says:
        says += f"; `{command} -h` shows what there is"
    return one_line(f"{command}: {says[0].lower()}{says[1:]}")


def _value_after(option: str, words: Sequence[str]) -> str:
    """Return the value that was meant for an option: `3` of `--epochs 3` and of `--epochs=3`."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == option and following and not following.startswith("-"):
            return following
        if word.startswith(f"{option}="):
            return word.removeprefix(f"{option}=")
    return "VALUE"


def _keys_called(option: str) -> Iterator[str]:
    """List every key of a recipe whose last part has the option's name."""
    from kdkit.recipe.sections import RecipeBase  # imports torch

    name = option.lstrip("-").replace("-", "_")
    yield from (path for path in _paths(RecipeBase) if path.split(".")[-1] == name)


def _paths(model: type[BaseModel], above: str = "") -> Iterator[str]:
    for key, field in model.model_fields.items():
        path = f"{above}{field.alias or key}"
        yield path
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _paths(part, f"{path}.")
