"""The content of a recipe: everything in it that affects training, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from kdkit.contracts.model_source import RecipeTeacher
from kdkit.files import file_digest
from kdkit.recipe import dependencies
from kdkit.recipe.walk import is_bookkeeping, is_marked


def trained_values(
    value: Any, taught: Callable[[RecipeTeacher], str], *, older: bool = False
) -> Any:
    """Reduce a recipe, or a part of it, to what changes the result, in plain values.

    Args:
        value: the recipe or the part.
        taught: gives the fingerprint of the recipe that trains a teacher.
        older: digest files as an older kdkit did; see `Recipe.content`.
    """
    # the fingerprint stands for the recipe's path and seed; a name changes no answer
    if isinstance(value, RecipeTeacher):
        options = {
            name: trained_values(option, taught, older=older)
            for name, option in value
            # added later than the rest: unset, it is in no older fingerprint
            if name not in ("recipe", "seed", "name", "at") and (name, option) != ("input", None)
        }
        return {**options, "recipe": taught(value)}
    if isinstance(value, BaseModel):
        return {
            name: trained_values(getattr(value, name), taught, older=older)
            for name, field in type(value).model_fields.items()
            if _is_trained(field, getattr(value, name))
        }
    if isinstance(value, tuple | list):
        return [trained_values(item, taught, older=older) for item in value]
    if isinstance(value, Mapping):
        return {key: trained_values(item, taught, older=older) for key, item in value.items()}
    # a file by its content, so that a copy elsewhere gives the same run
    if isinstance(value, Path):
        return digest(value, older=older) if value.is_file() else str(value)
    return value


def _is_trained(field: Any, value: Any) -> bool:
    """Check whether an option's value is part of what is trained."""
    return not is_bookkeeping(field) and not (is_marked(field, "later") and value == field.default)


def digest(file: Path, *, older: bool) -> str:
    """Digest a file; a Python file with the modules beside it that it imports, unless `older`."""
    with_modules = file.suffix == ".py" and not older
    return dependencies.code_digest(file) if with_modules else file_digest(file)


def fingerprint_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of a recipe's content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
