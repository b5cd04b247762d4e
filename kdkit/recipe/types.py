"""The type of a recipe, built from the available plugins, and its JSON Schema."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, create_model

from kdkit.contracts.compression import Compression
from kdkit.contracts.model_source import ModelOptions, RecipeTeacher, StudentOptions, TeacherOptions
from kdkit.contracts.options import LATER, Options
from kdkit.errors import ModelError, suggest
from kdkit.recipe.data_section import DatasetEntry, DataSpec, UnlabelledSpec
from kdkit.recipe.registry import Registry
from kdkit.recipe.sections import (
    BalanceEntry,
    DistillerEntry,
    LossEntry,
    RecipeBase,
    ScheduleEntry,
    TaskEntry,
    named,
)

DEFAULT_SOURCE = "timm"
RECIPE = "recipe"  # key of a teacher that another recipe trains
TAUGHT = "@recipe"  # pydantic's tag of that kind of teacher; no key can have this name


# by the classes, not the registry: a study loads the same plugins once for each recipe, and
# pydantic takes long to build types of all their options
@functools.lru_cache(maxsize=8)
def _recipe_type(
    losses: tuple[Any, ...],
    schedules: tuple[Any, ...],
    models: tuple[Any, ...],
    datasets: tuple[Any, ...],
    tasks: tuple[Any, ...],
    balances: tuple[Any, ...],
    compressions: tuple[Any, ...],
    distillers: tuple[Any, ...],
) -> type[RecipeBase]:
    def variants(plugins: Iterable[Any], kind: str, base: type[Options]) -> Any:
        return _by_use({p.name: _variant(p, kind, base, model=student) for p in plugins})

    student = _by_source(_student_types(models, compressions))
    teachers = {p.name: _variant(p, "teacher", TeacherOptions) for p in models}
    teacher = _by_source({**teachers, TAUGHT: RecipeTeacher})
    dataset: Any = variants(datasets, "dataset", DatasetEntry)
    unlabelled: Any = create_model(
        "UnlabelledSpec",
        __base__=UnlabelledSpec,
        __doc__=UnlabelledSpec.__doc__,
        dataset=(dataset | None, UnlabelledSpec.model_fields["dataset"]),
    )
    data = create_model(
        "DataSpec",
        __base__=DataSpec,
        __doc__=DataSpec.__doc__,
        dataset=(dataset, Field(description="Dataset plugin and its options.")),
        unlabelled=(unlabelled | None, DataSpec.model_fields["unlabelled"]),
    )
    task: Any = variants(tasks, "task", TaskEntry) | None
    task = Annotated[task, BeforeValidator(named, json_schema_input_type=task | str)]
    return create_model(
        "Recipe",
        __base__=RecipeBase,
        __doc__=RecipeBase.__doc__,
        task=(task, RecipeBase.model_fields["task"]),
        data=(data, Field(description="Data for training, validation and test.")),
        teacher=(teacher | None, RecipeBase.model_fields["teacher"]),
        teachers=(_several(teacher), RecipeBase.model_fields["teachers"]),
        student=(student, Field(description="The network to train.")),
        schedule=(
            variants(schedules, "schedule", ScheduleEntry),
            Field(description="Schedule: which networks teach which, in which stages."),
        ),
        losses=(
            _several(variants(losses, "loss", LossEntry)),
            RecipeBase.model_fields["losses"],
        ),
        balance=(
            variants(balances, "balance", BalanceEntry) | None,
            RecipeBase.model_fields["balance"],
        ),
        distill_data=(
            variants(distillers, "distiller", DistillerEntry) | None,
            RecipeBase.model_fields["distill_data"],
        ),
    )


@functools.lru_cache(maxsize=8)
def _student_types(
    models: tuple[Any, ...], compressions: tuple[Any, ...]
) -> dict[str, type[Options]]:
    """Build the types of a student by its source: with a key for each compression."""
    fields: dict[str, Any] = {
        plugin.name: (
            plugin.Options | None,
            Field(
                default=None,
                description=f"{first_paragraph(plugin)} (default: no).".replace(". (", " ("),
                json_schema_extra=LATER,
            ),
        )
        for plugin in compressions
    }
    base = create_model(
        "StudentOptions", __base__=StudentOptions, __doc__=StudentOptions.__doc__, **fields
    )
    return {p.name: _variant(p, "student", base) for p in models}


def student_type(model: str, plugins: Registry) -> type[ModelOptions]:
    """Return the type of the options of a student whose `model` this is.

    Raises:
        ModelError: there is no such source.
    """
    source, _ = source_of(model, plugins.models)
    kinds = (tuple(kind.values()) for kind in (plugins.models, plugins.compressions))
    return cast("type[ModelOptions]", _student_types(*kinds)[source])


def compressions_of(options: ModelOptions, plugins: Registry) -> list[Compression]:
    """Return the compressions that a student's options ask for, in the order of their work."""
    asked = ((kind, getattr(options, name, None)) for name, kind in plugins.compressions.items())
    found = (kind(own) for kind, own in asked if own is not None)
    return sorted(found, key=lambda one: one.order)


def first_paragraph(plugin: Any) -> str:
    """Return what a plugin's docstring says first, on one line."""
    return " ".join((plugin.__doc__ or "").strip().split("\n\n")[0].split())


def _several(item: Any) -> Any:
    return tuple[item, ...]


def recipe_type(plugins: Registry) -> type[RecipeBase]:
    """Build a RecipeBase that accepts exactly the registered plugins and their options."""
    kinds = (
        *(plugins.losses, plugins.schedules, plugins.models, plugins.datasets, plugins.tasks),
        *(plugins.balances, plugins.compressions, plugins.distillers),
    )
    return _recipe_type(*(tuple(kind.values()) for kind in kinds))


def _variant(plugin: Any, kind: str, base: type[Options], model: Any = None) -> type[Options]:
    """Build the type of a plugin's section.

    Args:
        plugin: the plugin's class.
        kind: of the section; ends the name of the type.
        base: the options that every such section has.
        model: type in place of a `ModelOptions` in the plugin's options; with it, the section has
            a `use:` (None: a network's section, which has a `model:`).
    """
    fields: dict[str, Any] = {}
    if model is not None:
        fields["use"] = (Literal[plugin.name], Field(description="Name of the plugin."))
        for key, info in plugin.Options.model_fields.items():
            if (filled := _filled(info.annotation, model)) != info.annotation:
                fields[key] = (filled, info)
    return create_model(
        f"{plugin.name}_{kind}",
        __base__=(base, plugin.Options),
        __doc__=first_paragraph(plugin),
        **fields,
    )


def _filled(annotation: Any, model: Any) -> Any:
    """Return a type with `model` in place of `ModelOptions`."""
    if annotation is ModelOptions:
        return model
    members = get_args(annotation)
    filled = tuple(_filled(member, model) for member in members)
    if filled == members:
        return annotation
    # the type of `X | Y` cannot be subscripted
    origin = Union if get_origin(annotation) is UnionType else get_origin(annotation)
    return origin[filled]


def _by_use(variants: Mapping[str, type[Options]]) -> Any:
    # pydantic's discriminator needs two members at least
    if len(variants) == 1:
        return next(iter(variants.values()))
    return Annotated[Union[tuple(variants.values())], Field(discriminator="use")]  # noqa: UP007


def _by_source(variants: Mapping[str, type[Options]]) -> Any:
    tagged = tuple(Annotated[variant, Tag(tag)] for tag, variant in variants.items())

    def which(value: Any) -> str:
        # a recipe that is built in Python, or validated again
        if isinstance(value, BaseModel):
            tags = (tag for tag, variant in variants.items() if isinstance(value, variant))
            return next(tags, DEFAULT_SOURCE)
        if isinstance(value, Mapping) and RECIPE in value and TAUGHT in variants:
            return TAUGHT
        model = value.get("model") if isinstance(value, Mapping) else None
        try:
            return source_of(model, variants)[0] if isinstance(model, str) else DEFAULT_SOURCE
        except ModelError:
            return DEFAULT_SOURCE  # kdkit.recipe reports it, with the place

    return Annotated[Union[tagged], Discriminator(which)]  # noqa: UP007


def source_of(model: str, sources: Iterable[str]) -> tuple[str, str]:
    """Return source and name of `model:`; a bare name, or one of `hf-hub:`, is timm's.

    Raises:
        ModelError: there is no such source.
    """
    source, slash, name = model.partition("/")
    # `hf-hub:org/name` is a name of timm's
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
    # sorted, so that the file in the repository changes with the content only
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _allow_seeds(content: dict[str, Any]) -> None:
    """Allow several teachers to be one recipe with several seeds."""
    single = content["$defs"]["RecipeTeacher"]["properties"]
    seeds = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0},
        "description": "Seeds of the recipe, one teacher for each.",
    }
    keys = {key: value for key, value in single.items() if key not in ("seed", "name")}
    keys["seeds"] = seeds
    mapping = {
        "type": "object",
        "additionalProperties": False,
        "properties": keys,
        "required": ["recipe", "seeds"],
    }
    listed = content["properties"]["teachers"]
    titles = {key: listed.pop(key) for key in ("description", "title") if key in listed}
    content["properties"]["teachers"] = {**titles, "anyOf": [listed, mapping]}


def _allow_overlap(node: Any) -> None:
    """Let a model fit several sources in the schema, as they share most of their keys.

    Only kdkit knows which name belongs to which source.
    """
    if isinstance(node, list):
        for item in node:
            _allow_overlap(item)
    elif isinstance(node, dict):
        for item in node.values():
            _allow_overlap(item)
        if "oneOf" in node and "discriminator" not in node:
            node["anyOf"] = node.pop("oneOf")
