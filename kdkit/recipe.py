"""Loads a recipe file: its type is built from whatever plugins there are; every problem is told with file and line."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast, get_args

import yaml
from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, create_model
from pydantic_core import ErrorDetails

from kdkit import registry
from kdkit.errors import ModelError, RecipeError, suggest
from kdkit.options import Options, Ramp, Text
from kdkit.providers import ModelOptions
from kdkit.registry import Registry
from kdkit.schema import DatasetEntry, DataSpec, LossEntry, RecipeBase, RecipeTeacher, ScheduleEntry, TeacherOptions
from kdkit.source import Source

Location = Sequence[str | int]
DEFAULT_SOURCE = "timm"
RECIPE = "recipe"  # key of a teacher that another recipe trains


@dataclass(frozen=True)
class Recipe:
    """A valid recipe, with the plugins it may use and the places of its keys."""

    spec: RecipeBase
    source: Source
    plugins: Registry

    def problem(self, location: Location, says: str) -> str:
        """`file:line: key: what`."""
        return f"{self.source.where(location)}: {'.'.join(map(str, location))}: {says}"

    def error(self, location: Location, says: str) -> RecipeError:
        return RecipeError(self.problem(location, says))

    def loss_names(self) -> list[str]:
        """The terms' names in order: `name`, or `use` (numbered where it comes again)."""
        names: list[str] = []
        for entry in self.spec.losses:
            name, count = entry.name or entry.use, 2
            while name in names:
                name, count = f"{entry.name or entry.use}_{count}", count + 1
            names.append(name)
        return names

    def plain(self) -> dict[str, Any]:
        """The resolved recipe as plain values: no parents, no overrides, paths absolute, defaults spelt out."""
        return self.spec.model_dump(mode="json", by_alias=True, exclude_none=True)

    def dump(self) -> str:
        """The resolved recipe as a flat YAML file."""
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True, width=120)

    def content(self) -> dict[str, Any]:
        """All that the trained weights depend on: `plain` without bookkeeping, files by what is in them."""
        plain = cast("dict[str, Any]", _content(self.spec))
        del plain["name"]
        return plain

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()


def load(path: Path | str, overrides: Mapping[str, Any] | None = None, plugins: Sequence[Path] = (), *, files: bool = True) -> Recipe:
    """Read and check a recipe file.

    Args:
        path: the file.
        overrides: values by `key.path`, stronger than the file's.
        plugins: further plugin files or folders.
        files: whether the files that it names must be there; a run that is finished needs them no more.

    Raises:
        RecipeError: all problems found, one line each.
        PluginError: a plugin that the recipe names is wrong.
    """
    source = Source(Path(path), overrides)
    found = registry.load((*plugins, *_plugin_paths(source)))
    model = recipe_type(found)
    try:
        spec = model.model_validate(source.data)
    except ValidationError as error:
        told = dict.fromkeys(_explain(e, source, model) for e in error.errors() if not _is_echo(e))
        raise RecipeError("\n".join(told)) from None
    recipe = Recipe(spec, source, found)
    if problems := [*_cross_check(recipe), *(_missing_files(recipe) if files else ())]:
        raise RecipeError("\n".join(problems))
    return recipe


def _plugin_paths(source: Source) -> list[Path]:
    named = source.data.get("plugins") or []
    texts = [p for p in named if isinstance(p, Text)] if isinstance(named, list) else []
    paths = [(p.folder / Path(p).expanduser()).resolve() for p in texts]
    if missing := [f"{source.where(['plugins', i])}: plugins.{i}: no such file or folder: {p}" for i, p in enumerate(paths) if not p.exists()]:
        raise RecipeError("\n".join(missing))
    return paths


def _cross_check(recipe: Recipe) -> Iterable[str]:
    spec = recipe.spec
    needs = recipe.plugins.schedules[spec.schedule.use].needs_teacher
    if needs and spec.teacher is None:
        yield recipe.problem(["schedule"], f"schedule '{spec.schedule.use}' needs a `teacher:`")
    if not needs and spec.teacher is not None:
        yield recipe.problem(["teacher"], f"schedule '{spec.schedule.use}' has no teacher; leave it out or write `teacher: null`")
    for section, options in (("teacher", spec.teacher), ("student", spec.student)):
        if isinstance(options, ModelOptions):
            try:
                source_of(options.model, recipe.plugins.models)
            except ModelError as error:
                yield recipe.problem([section, "model"], str(error))
    given = [entry.name for entry in spec.losses if entry.name]
    for i, entry in enumerate(spec.losses):
        if entry.name and given.count(entry.name) > 1:
            yield recipe.problem(["losses", i, "name"], f"'{entry.name}' names two losses")
    if isinstance(spec.teacher, TeacherOptions) and spec.teacher.fold_batchnorm and spec.teacher.mode == "train":
        yield recipe.problem(["teacher", "fold_batchnorm"], "folded layers have no batch statistics, which `mode: train` asks for")
    if spec.train.lr_schedule.warmup_epochs + spec.train.lr_schedule.cooldown_epochs > spec.train.epochs:
        yield recipe.problem(["train", "lr_schedule"], f"warm-up and cool-down are longer than the {spec.train.epochs} epochs")
    if spec.train.mixup and spec.data.batch_size % 2:
        yield recipe.problem(["data", "batch_size"], f"`train.mixup` mixes pairs: {spec.data.batch_size} is not even")


def _missing_files(recipe: Recipe) -> Iterable[str]:
    for location, path in _paths(recipe.spec, []):
        if not path.exists() and location[:2] != ["data", "dataset"]:
            yield recipe.problem(location, f"no such file: {path}")


def _paths(value: Any, location: list[str | int]) -> Iterable[tuple[list[str | int], Path]]:
    """Every path in the recipe that must exist: not those of bookkeeping; datasets look after their own."""
    if isinstance(value, Path):
        yield location, value
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _paths(item, [*location, i])
    elif isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            if not _bookkeeping(field):
                yield from _paths(getattr(value, name), [*location, name])


def _bookkeeping(field: Any) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("bookkeeping"))


def _content(value: Any) -> Any:
    if isinstance(value, RecipeTeacher):
        return {**{k: _content(v) for k, v in value if k != "recipe"}, "recipe": load(value.recipe).fingerprint}
    if isinstance(value, BaseModel):
        return {name: _content(getattr(value, name)) for name, field in type(value).model_fields.items() if not _bookkeeping(field)}
    if isinstance(value, tuple | list):
        return [_content(item) for item in value]
    if isinstance(value, Path):
        return hashlib.sha256(value.read_bytes()).hexdigest() if value.is_file() else str(value)
    return value


@functools.lru_cache(maxsize=8)
def _recipe_type(losses: tuple[Any, ...], schedules: tuple[Any, ...], models: tuple[Any, ...], datasets: tuple[Any, ...]) -> type[RecipeBase]:
    def variants(plugins: Iterable[Any], kind: str, base: type[Options]) -> dict[str, type[Options]]:
        return {p.name: _variant(f"{p.name}_{kind}", (base, p.Options), p.__doc__, p.name) for p in plugins}

    students = {p.name: _variant(f"{p.name}_student", (p.Options,), p.__doc__) for p in models}
    teachers = {p.name: _variant(f"{p.name}_teacher", (TeacherOptions, p.Options), p.__doc__) for p in models}
    data = create_model("DataSpec", __base__=DataSpec, __doc__=DataSpec.__doc__, dataset=(_by_use(variants(datasets, "dataset", DatasetEntry)), Field(description="A dataset plugin and its options.")))
    return create_model(
        "Recipe",
        __base__=RecipeBase,
        __doc__=RecipeBase.__doc__,
        data=(data, Field(description="What is trained and measured on.")),
        teacher=(_by_source({**teachers, RECIPE: RecipeTeacher}) | None, RecipeBase.model_fields["teacher"]),
        student=(_by_source(students), Field(description="Who learns.")),
        schedule=(_by_use(variants(schedules, "schedule", ScheduleEntry)), Field(description="Who teaches whom, and when.")),
        losses=(_several(_by_use(variants(losses, "loss", LossEntry))), RecipeBase.model_fields["losses"]),
    )


def _several(item: Any) -> Any:
    return tuple[item, ...]


def recipe_type(plugins: Registry) -> type[RecipeBase]:
    """A RecipeBase that accepts exactly the registered plugins and their options."""
    return _recipe_type(*(tuple(kind.values()) for kind in (plugins.losses, plugins.schedules, plugins.models, plugins.datasets)))


def _variant(name: str, bases: tuple[type[Options], ...], doc: str | None, use: str | None = None) -> type[Options]:
    fields: dict[str, Any] = {"use": (Literal[use], Field(description="Name of the plugin."))} if use else {}
    return create_model(name, __base__=bases, __doc__=(doc or "").strip().split("\n")[0], **fields)


def _by_use(variants: Mapping[str, type[Options]]) -> Any:
    if len(variants) == 1:
        return next(iter(variants.values()))
    return Annotated[Union[tuple(variants.values())], Field(discriminator="use")]  # noqa: UP007


def _by_source(variants: Mapping[str, type[Options]]) -> Any:
    tagged = tuple(Annotated[variant, Tag(tag)] for tag, variant in variants.items())

    def which(value: Any) -> str:
        if isinstance(value, BaseModel):
            return next((tag for tag, variant in variants.items() if isinstance(value, variant)), DEFAULT_SOURCE)
        if isinstance(value, Mapping) and RECIPE in value and RECIPE in variants:
            return RECIPE
        model = value.get("model") if isinstance(value, Mapping) else None
        try:
            return source_of(model, variants)[0] if isinstance(model, str) else DEFAULT_SOURCE
        except ModelError:
            return DEFAULT_SOURCE  # told by _cross_check, with the place

    return Annotated[Union[tagged], Discriminator(which)]  # noqa: UP007


def source_of(model: str, sources: Iterable[str]) -> tuple[str, str]:
    """Source and name of `model:`; a bare name, and one that begins with `hf-hub:`, is timm's.

    Raises:
        ModelError: there is no such source.
    """
    source, slash, name = model.partition("/")
    if not slash or ":" in source:
        return DEFAULT_SOURCE, model
    names = set(sources) - {RECIPE}
    if source not in names:
        raise ModelError(f"no model source is called '{source}'; {suggest(source, names)}")
    return source, name


def _is_echo(error: ErrorDetails) -> bool:
    """A list that is called too short because its items are wrong."""
    return error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]


def _explain(error: ErrorDetails, source: Source, model: type[RecipeBase]) -> str:
    kind, context = error["type"], error.get("ctx", {})
    location = _in_file(error, source)
    if kind == "union_tag_invalid":
        location.append("use")
        tags = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
        says = f"unknown '{context['tag']}'; {suggest(context['tag'], tags)}"
    elif kind == "union_tag_not_found":
        says = "needs a `use:` that names the plugin"
    elif kind == "extra_forbidden":
        says = f"no such key; {suggest(str(location[-1]), _keys_at(error['loc'][:-1], model))}"
    elif kind == "literal_error":
        allowed = [word.strip(" '") for word in context["expected"].replace(" or ", ", ").split(",")]
        says = f"got {error['input']!r}; {suggest(str(error['input']), allowed)}"
    elif kind == "missing":
        says = "this key is required"
    elif kind == "value_error":
        says = str(context["error"])
    else:
        says = f"{error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"
    return f"{source.where(location)}: {'.'.join(map(str, location))}: {says}"


def _in_file(error: ErrorDetails, source: Source) -> list[str | int]:
    """The error's location without the names of union members that pydantic puts into it."""
    location: list[str | int] = []
    data: Any = source.data
    for position, step in enumerate(error["loc"]):
        is_last = position == len(error["loc"]) - 1
        inside = data if isinstance(data, dict) else dict(enumerate(data)) if isinstance(data, list) else {}
        if step in inside:
            data = inside[step]
            location.append(step)
        elif is_last and error["type"] == "missing":
            location.append(step)
    return location


def _keys_at(location: Location, model: type[BaseModel]) -> list[str]:
    """The keys allowed in the mapping at pydantic's `location`, which names the members of unions."""
    here: list[type[BaseModel]] = [model]
    for step in location:
        fields = [m.model_fields[step] for m in here if step in m.model_fields]
        if fields:
            here = [m for field in fields for m in _models_in(field.annotation)]
        elif step == "ramp":
            here = [Ramp]
        elif isinstance(step, str):
            here = [m for m in here if m.__name__.lower().startswith(step.lower()) or (step == RECIPE and m is RecipeTeacher)] or here
    return sorted({field.alias or name for m in here for name, field in m.model_fields.items()})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in get_args(annotation) for m in _models_in(part)]


def schema(plugins: Registry) -> str:
    """The recipe's JSON Schema, for editors."""
    content = recipe_type(plugins).model_json_schema(by_alias=True)
    content["properties"]["extends"] = {"type": "string", "description": "Recipe file that this one builds on: mappings merge, lists replace."}
    content.pop("required", None)  # what is required may come from the parent
    _allow_overlap(content)
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _allow_overlap(node: Any) -> None:
    """Model sources take many of the same keys, and only kdkit knows which name is whose: any may fit, not exactly one."""
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _allow_overlap(child)
    if isinstance(node, dict) and "oneOf" in node and "discriminator" not in node:
        node["anyOf"] = node.pop("oneOf")
