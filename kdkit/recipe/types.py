"""The type of a recipe, built from the available plugins, and its JSON Schema."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, create_model

from kdkit.contracts.model_source import ModelOptions, RecipeTeacher, StudentOptions, TeacherOptions
from kdkit.contracts.options import Options
from kdkit.errors import ModelError, suggest
from kdkit.recipe.registry import Registry
from kdkit.recipe.sections import (
    DatasetEntry,
    DataSpec,
    LossEntry,
    RecipeBase,
    ScheduleEntry,
    TaskEntry,
    named,
)

DEFAULT_SOURCE = "timm"
RECIPE = "recipe"  # key of a teacher that another recipe trains
TAUGHT = "@recipe"  # pydantic's tag of that kind of teacher; no key can have this name


@functools.lru_cache(maxsize=8)
def _recipe_type(
    losses: tuple[Any, ...],
    schedules: tuple[Any, ...],
    models: tuple[Any, ...],
    datasets: tuple[Any, ...],
    tasks: tuple[Any, ...],
) -> type[RecipeBase]:
    def variants(
        plugins: Iterable[Any], kind: str, base: type[Options]
    ) -> dict[str, type[Options]]:
        return {
            p.name: _variant(f"{p.name}_{kind}", (base, p.Options), p.__doc__, p.name, student)
            for p in plugins
        }

    student = _by_source(
        {
            p.name: _variant(f"{p.name}_student", (StudentOptions, p.Options), p.__doc__)
            for p in models
        }
    )
    teachers = {
        p.name: _variant(f"{p.name}_teacher", (TeacherOptions, p.Options), p.__doc__)
        for p in models
    }
    teacher = _by_source({**teachers, TAUGHT: RecipeTeacher})
    data = create_model(
        "DataSpec",
        __base__=DataSpec,
        __doc__=DataSpec.__doc__,
        dataset=(
            _by_use(variants(datasets, "dataset", DatasetEntry)),
            Field(description="A dataset plugin and its options."),
        ),
    )
    task: Any = _by_use(variants(tasks, "task", TaskEntry)) | None
    task = Annotated[task, BeforeValidator(named, json_schema_input_type=task | str)]
    return create_model(
        "Recipe",
        __base__=RecipeBase,
        __doc__=RecipeBase.__doc__,
        task=(task, RecipeBase.model_fields["task"]),
        data=(data, Field(description="What is trained and measured on.")),
        teacher=(teacher | None, RecipeBase.model_fields["teacher"]),
        teachers=(_several(teacher), RecipeBase.model_fields["teachers"]),
        student=(student, Field(description="Who learns.")),
        schedule=(
            _by_use(variants(schedules, "schedule", ScheduleEntry)),
            Field(description="Who teaches whom, and when."),
        ),
        losses=(
            _several(_by_use(variants(losses, "loss", LossEntry))),
            RecipeBase.model_fields["losses"],
        ),
    )


def _several(item: Any) -> Any:
    return tuple[item, ...]


def recipe_type(plugins: Registry) -> type[RecipeBase]:
    """Build a RecipeBase that accepts exactly the registered plugins and their options."""
    return _recipe_type(
        *(
            tuple(kind.values())
            for kind in (
                plugins.losses,
                plugins.schedules,
                plugins.models,
                plugins.datasets,
                plugins.tasks,
            )
        )
    )


def _variant(
    name: str,
    bases: tuple[type[Options], ...],
    doc: str | None,
    use: str | None = None,
    model: Any = None,
) -> type[Options]:
    """Build a section's type; where a plugin's options have a `ModelOptions`, any `model` is
    allowed.
    """
    fields: dict[str, Any] = (
        {"use": (Literal[use], Field(description="Name of the plugin."))} if use else {}
    )
    for key, info in bases[-1].model_fields.items():
        if model is not None and (kind := _filled(info.annotation, model)) != info.annotation:
            fields[key] = (kind, info)
    return create_model(
        name,
        __base__=bases,
        __doc__=" ".join((doc or "").strip().split("\n\n")[0].split()),
        **fields,
    )


def _filled(annotation: Any, model: Any) -> Any:
    """Return a type with `model` in place of `ModelOptions`."""
    if annotation is ModelOptions:
        return model
    parts = get_args(annotation)
    filled = tuple(_filled(part, model) for part in parts)
    if filled == parts:
        return annotation
    origin = Union if get_origin(annotation) is UnionType else get_origin(annotation)
    return origin[filled]


def _by_use(variants: Mapping[str, type[Options]]) -> Any:
    if len(variants) == 1:
        return next(iter(variants.values()))
    return Annotated[Union[tuple(variants.values())], Field(discriminator="use")]  # noqa: UP007


def _by_source(variants: Mapping[str, type[Options]]) -> Any:
    tagged = tuple(Annotated[variant, Tag(tag)] for tag, variant in variants.items())

    def which(value: Any) -> str:
        if isinstance(value, BaseModel):
            return next(
                (tag for tag, variant in variants.items() if isinstance(value, variant)),
                DEFAULT_SOURCE,
            )
        if isinstance(value, Mapping) and RECIPE in value and TAUGHT in variants:
            return TAUGHT
        model = value.get("model") if isinstance(value, Mapping) else None
        try:
            return source_of(model, variants)[0] if isinstance(model, str) else DEFAULT_SOURCE
        except ModelError:
            return DEFAULT_SOURCE  # kdkit.recipe reports it, with the place

    return Annotated[Union[tagged], Discriminator(which)]  # noqa: UP007


def source_of(model: str, sources: Iterable[str]) -> tuple[str, str]:
    """Return source and name of `model:`; a bare name, and one that begins with `hf-hub:`, is
    timm's.

    Raises:
        ModelError: there is no such source.
    """
    source, slash, name = model.partition("/")
    if not slash or ":" in source:
        return DEFAULT_SOURCE, model
    names = set(sources) - {TAUGHT}
    if source not in names:
        raise ModelError(f"no model source is called '{source}'; {suggest(source, names)}")
    return source, name


def schema(plugins: Registry) -> str:
    """Return the recipe's JSON Schema, for editors."""
    content = recipe_type(plugins).model_json_schema(by_alias=True)
    content["properties"]["extends"] = {
        "type": "string",
        "description": "Recipe file that this one builds on: mappings merge, lists replace.",
    }
    content.pop("required", None)  # required keys may come from the parent
    _allow_seeds(content)
    _allow_overlap(content)
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _allow_seeds(content: dict[str, Any]) -> None:
    """Allow several teachers to be one recipe with several seeds."""
    one = content["$defs"]["RecipeTeacher"]
    seeds = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0},
        "description": "A teacher for each.",
    }
    keys = {
        **{key: value for key, value in one["properties"].items() if key not in ("seed", "name")},
        "seeds": seeds,
    }
    mapping = {
        "type": "object",
        "additionalProperties": False,
        "properties": keys,
        "required": ["recipe", "seeds"],
    }
    listed = content["properties"]["teachers"]
    said = {key: listed.pop(key) for key in ("description", "title") if key in listed}
    content["properties"]["teachers"] = {**said, "anyOf": [listed, mapping]}


def _allow_overlap(node: Any) -> None:
    """Accept any of the model sources in the schema, not exactly one: they share many keys, and
    only kdkit knows which name belongs to which source.
    """
    for child in (
        node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    ):
        _allow_overlap(child)
    if isinstance(node, dict) and "oneOf" in node and "discriminator" not in node:
        node["anyOf"] = node.pop("oneOf")
