"""The JSON Schema of study files, for editors."""

from __future__ import annotations

import json
from typing import Any

from kdkit.recipe import types
from kdkit.recipe.registry import Registry
from kdkit.study.spec import StudySpec


def schema(plugins: Registry) -> str:
    """Build the schema: a study's own keys, and recipes in their places; a variant may contain any
    part of a recipe.
    """
    recipe = json.loads(types.schema(plugins))
    shared = recipe.pop("$defs")
    _require_nothing(shared)
    replaced = {"type": "string", "description": "Recipe file in the place of the base."}
    variant = {
        **recipe,
        "title": "Variant",
        "properties": {**recipe["properties"], "recipe": replaced},
    }
    content = StudySpec.model_json_schema()
    keys = content["properties"]
    keys["base"]["anyOf"] = [{"type": "string"}, {"$ref": "#/$defs/Recipe"}]
    keys["variants"]["additionalProperties"] = {
        "anyOf": [{"$ref": "#/$defs/Variant"}, {"type": "null"}]
    }
    keys["extends"] = {
        "type": "string",
        "description": "Study file that this one builds on: mappings merge, lists replace.",
    }
    content["$defs"] = {**shared, "Recipe": recipe, "Variant": variant}
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _require_nothing(node: Any) -> None:
    """Remove `required` from a section, as the base may supply what is missing."""
    for child in (
        node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    ):
        _require_nothing(child)
    if isinstance(node, dict) and isinstance(node.get("required"), list):
        del node["required"]
