"""Reads YAML files and plugins into one typed, fingerprinted recipe; errors have file and line."""

from kdkit.recipe.loading import Recipe, code_of_all, content_of, load, read, teacher_recipes
from kdkit.recipe.walk import code_in, models_in

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
