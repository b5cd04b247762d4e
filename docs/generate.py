"""Writes the reference pages that follow from the code: recipe keys, plugins, commands, the
Python interface.

python docs/generate.py
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import yaml
from blocks import slug, table, unwrapped
from interface import cli_page, python_page
from pydantic import BaseModel

from kdkit.contracts.dataset_source import DatasetOptions
from kdkit.contracts.loss_options import LayerPair
from kdkit.contracts.model_source import (
    CacheOptions,
    CropOptions,
    InputOptions,
    ModelOptions,
    Normalize,
    RecipeTeacher,
    TeacherOptions,
)
from kdkit.contracts.options import Options, Ramp
from kdkit.recipe import catalogue, data_section, registry, sections
from kdkit.recipe.types import recipe_type

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "reference"
GROUPS = {"loss": "knowledge", "schedule": "scheme", "task": "rows are"}
NOTE = "<!-- Written by docs/generate.py; do not edit. -->"

# Every section of a recipe: its key path, the record behind it, and what there is to say beside the
# record's own docstring.
SECTIONS: list[tuple[str, type[Options], str]] = [
    ("recipe", sections.RecipeBase, ""),
    ("task", sections.TaskEntry, "Each task plugin adds [options of its own](plugins.md#tasks)."),
    (
        "metrics",
        sections.MetricEntry,
        "Each metric plugin adds [options of its own](plugins.md#metrics).",
    ),
    ("data", data_section.DataSpec, ""),
    (
        "data.dataset",
        data_section.DatasetEntry,
        "Each dataset plugin adds [options of its own](plugins.md#datasets).",
    ),
    ("data.augment", data_section.BatchAugment, ""),
    ("data.timm_augment", data_section.TimmAugment, ""),
    (
        "data.joint_augment",
        data_section.JointAugment,
        "See [how to distil segmentation](../how-to/segmentation.md).",
    ),
    (
        "data.unlabelled",
        data_section.UnlabelledSpec,
        "See [images without labels beside labelled ones](../how-to/unlabelled.md).",
    ),
    (
        "data.distilled",
        data_section.DistilledSpec,
        "See [distill a dataset](../how-to/distill-a-dataset.md).",
    ),
    (
        "student, teacher",
        ModelOptions,
        (
            "Keys of every model. Each model source adds [options of its"
            " own](plugins.md#model-sources)."
        ),
    ),
    ("student.normalize, teacher.normalize", Normalize, ""),
    (
        "student.input, teacher.input",
        InputOptions,
        "See [other input for each network](../how-to/another-input.md).",
    ),
    ("student.input.crop, teacher.input.crop", CropOptions, ""),
    ("teacher", TeacherOptions, "These keys stand beside those of every model."),
    ("teacher, trained by another recipe", RecipeTeacher, ""),
    ("teacher.cache", CacheOptions, ""),
    (
        "schedule",
        sections.ScheduleEntry,
        "Each schedule plugin adds [options of its own](plugins.md#schedules).",
    ),
    (
        "losses",
        sections.LossEntry,
        "A list. Each loss plugin adds [options of its own](losses.md).",
    ),
    (
        "losses.N.layers",
        LayerPair,
        "A list, for losses that compare layers: most feature and relation losses.",
    ),
    ("a ramp", Ramp, "Stands in the place of a number where the type says `or a ramp`."),
    (
        "balance",
        sections.BalanceEntry,
        "Each balance plugin adds [options of its own](plugins.md#balances).",
    ),
    (
        "distill_data",
        sections.DistillerEntry,
        "Each distiller plugin adds [options of its own](plugins.md#distillers).",
    ),
    ("train", sections.TrainSpec, ""),
    ("train.optimizer", sections.OptimizerSpec, ""),
    ("train.adapters", sections.AdapterSpec, ""),
    ("train.lr_schedule", sections.LrScheduleSpec, ""),
    ("train.ema", sections.EmaSpec, ""),
    ("train.mixup", sections.MixupSpec, ""),
    ("run", sections.RunSpec, "None of these keys changes what is learnt."),
]

KNOWLEDGE = ["response", "feature", "relation", "labels"]
COMMAND = ("", "`kdkit plugins` lists them, and your own; `kdkit plugins NAME` shows one.", "")
CONVENTIONS = """\
z_s, z_t are the student's and the teacher's logits, f_s, f_t features; B or N the batch, C channels, H and W height and width, K classes;
p = softmax(z_s), q = softmax(z_t). Every loss is unweighted: a paper's weight belongs in the recipe. Losses compute in fp32 (or fp64) with
autocast off, and stay finite on degenerate input. Weights that the recipes under `recipes/` use are told with each loss; they fit those
networks and data, and are a place to begin. Features may be maps (B, C, H, W), a vision transformer's tokens (B, N, D), which fold to
a map where a loss needs one, or vectors (B, D); what a loss cannot compare is told by `kdkit check`.
"""  # noqa: E501

RECIPE_RULES = """\
A recipe is a YAML file. `kdkit check RECIPE` says what one would do. All problems of a file are told at once, one line each,
with file, line and key. `kdkit schema` prints a JSON Schema; `recipes/recipe.schema.json` is that of the standard plugins.

- `extends: FILE` builds on one other recipe, named relative to this file. Mappings merge, lists replace.
- On the command line, `key.path=value` replaces a value. An item of a list is named by its position from 0, or by its `name` or
  `use`: `losses.logit_kl.temperature=2`.
- Paths are relative to the file they are written in; on the command line, and in `run.folder`, to the current folder.
- Numbers and booleans are as in YAML 1.2: `5e-4` is a number, `no` and `off` are words. A key given twice is an error.
"""  # noqa: E501


def pages() -> dict[Path, str]:
    """The generated pages by their path."""
    makers = {
        "recipe.md": recipe_page,
        "losses.md": losses_page,
        "plugins.md": plugins_page,
        "cli.md": cli_page,
        "python.md": python_page,
    }
    return {
        REFERENCE / name: "\n".join([NOTE, *make()]).rstrip() + "\n"
        for name, make in makers.items()
    }


def recipe_page() -> Iterator[str]:
    """Every key of a recipe, section by section."""
    if missing := {cls.__name__ for cls in _nested(sections.RecipeBase)} - {
        cls.__name__ for _, cls, _ in SECTIONS
    }:
        raise SystemExit(f"docs/generate.py: SECTIONS lacks {', '.join(sorted(missing))}")
    yield from ("# Recipe keys", "", RECIPE_RULES)
    for path, cls, note in SECTIONS:
        yield from (f"## {path}", "", _first_paragraph(cls), *(["", note] if note else []), "")
        # by the section before it
        told = set(TeacherOptions.model_fields) if cls is RecipeTeacher else set()
        yield from _option_table(option for option in _options(cls) if option.name not in told)
        yield ""


def plugins_page() -> Iterator[str]:
    """Every standard plugin that is no loss, with its options and source."""
    yield from ("# Plugins", "", "The standard plugins, beside the [losses](losses.md).", *COMMAND)
    titles = {
        "schedule": "Schedules",
        "model source": "Model sources",
        "dataset": "Datasets",
        "task": "Tasks",
        "metric": "Metrics",
        "balance": "Balances",
        "compression": "Compressions",
        "distiller": "Distillers",
    }
    for kind, title in titles.items():
        entries = _entries(kind)
        yield from (f"## {title}", "")
        columns = ["name", *([GROUPS[kind]] if kind in GROUPS else []), "what it is"]
        rows = [
            [f"[{e.name}](#{_anchor(e)})", *([e.group] if kind in GROUPS else []), e.summary]
            for e in entries
        ]
        yield from (*table(columns, rows), "")
        for entry in entries:
            yield from _plugin(entry)


def losses_page() -> Iterator[str]:
    """Every standard loss: its formula, paper and options."""
    entries = sorted(_entries("loss"), key=lambda entry: (KNOWLEDGE.index(entry.group), entry.name))
    yield from (
        "# Losses",
        "",
        f"The {len(entries)} standard losses. Any of them mixes with any other in a recipe.",
        *COMMAND,
        CONVENTIONS,
    )
    for knowledge in KNOWLEDGE:
        mine = [entry for entry in entries if entry.group == knowledge]
        yield from (f"## {knowledge.capitalize()} knowledge", "")
        rows = [
            [f"[{e.name}](#{_anchor(e)})", e.summary, f"`{e.formula}`", _source(e)] for e in mine
        ]
        yield from (*table(["name", "what it is", "formula", "source"], rows), "")
        for entry in mine:
            yield from _plugin(entry)


def _entries(kind: str) -> list[catalogue.Entry]:
    found = [entry for entry in catalogue.entries(registry.load()) if entry.kind == kind]
    return [
        entry
        for entry in found
        if (Path.cwd() / entry.origin).resolve().is_relative_to(ROOT / "plugins")
    ]


@functools.cache
def shipped_weights() -> dict[str, str]:
    """The weights that the files under recipes/ give to each loss, and for which data: `25
    (cifar100), 10 (digits)`.

    A weight of 0 is left out: it is where a grid begins, and teaches nothing.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for file in sorted((ROOT / "recipes").rglob("*.yaml")):
        data = file.relative_to(ROOT / "recipes").parts[0]
        for loss in _listed_losses(yaml.safe_load(file.read_text(encoding="utf-8"))):
            if weight := loss.get("weight", 1):
                places = found.setdefault(loss["use"], {}).setdefault(_weight(weight), [])
                places += [data] if data not in places else []
    return {
        name: ", ".join(f"{weight} ({', '.join(places)})" for weight, places in weights.items())
        for name, weights in found.items()
    }


def _listed_losses(content: Any) -> Iterator[dict[str, Any]]:
    """The items of every list `losses`, of a recipe or of a study's variants."""
    values = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    for key, value in values:
        if key == "losses" and isinstance(value, list):
            yield from (item for item in value if isinstance(item, dict))  # stages list names
        else:
            yield from _listed_losses(value)


def _weight(weight: float | dict[str, float]) -> str:
    """A number, or a ramp in words."""
    if not isinstance(weight, dict):
        return f"{weight:.12g}"
    start = f" from epoch {weight['start']}" if "start" in weight else ""
    return f"{weight['from']:g} to {weight['to']:g} over {weight['epochs']} epochs{start}"


def _source(entry: catalogue.Entry) -> str:
    """Venue and link of the paper that a plugin's file cites first."""
    cited = re.match(
        r'[^"]*"[^"]+",\s+(?:([^"]+?),\s+)?(arXiv:|doi:|https://)(\S+?)[.,;:]?(?:\s|$)',
        unwrapped(entry.paper),
    )
    sites = {"arXiv:": "https://arxiv.org/abs/", "doi:": "https://doi.org/", "https://": "https://"}
    return f"[{cited[1] or 'arXiv'}]({sites[cited[2]]}{cited[3]})" if cited else ""


def _plugin(entry: catalogue.Entry) -> Iterator[str]:
    yield from (
        f"### {_title(entry)}",
        "",
        f"{entry.summary}{f' {GROUPS[entry.kind].title()}: {entry.group}.' if entry.group else ''}",
        "",
    )
    if entry.formula:
        yield from ("```text", entry.formula, "```", "")
    rest = re.sub(
        r"^Formula:.*?(\n\n|\Z)", "", entry.details, flags=re.MULTILINE | re.DOTALL
    ).strip()
    yield from (line for text in (rest, entry.paper) if text for line in (text, ""))
    base = (
        set(ModelOptions.model_fields) | set(DatasetOptions.model_fields)
        if entry.kind == "model source"
        else set()
    )
    if options := [option for option in entry.options if option.name not in base]:
        yield from (*_option_table(options), "")
    else:
        yield from ("No options of its own.", "")
    if entry.kind == "loss" and (weights := shipped_weights().get(entry.name)):
        yield from (f"Weight in the shipped recipes: {weights}.", "")
    file = (Path.cwd() / entry.origin).resolve().relative_to(ROOT)
    yield from (f"File: [{file}](../../{file})", "")


def _title(entry: catalogue.Entry) -> str:
    return f"{entry.name} ({entry.kind})"


def _anchor(entry: catalogue.Entry) -> str:
    return slug(_title(entry))


def _records(annotation: Any) -> list[type[BaseModel]]:
    """The records that an annotation names."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [record for part in get_args(annotation) for record in _records(part)]


def _nested(cls: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The records inside a record, and inside those."""
    for info in cls.model_fields.values():
        for record in _records(info.annotation):
            yield from (record, *_nested(record))


def _options(cls: type[Options]) -> Iterable[catalogue.Option]:
    """What the catalogue says of a record's fields; a field that is a section of its own is a
    link to it.
    """
    plugin: Any = SimpleNamespace(
        Options=recipe_type(registry.load()) if cls is sections.RecipeBase else cls
    )
    described = {option.name: option.description for option in catalogue.options(plugin)}
    plugin.Options = cls
    for option, field in zip(catalogue.options(plugin), cls.model_fields.values(), strict=True):
        own = [
            (path, record)
            for path, record, _ in SECTIONS
            if record in _records(field.annotation) and record is not Ramp
        ]
        kind = option.type
        meaning = described[option.name]
        default = option.default
        if own:
            links = " or ".join(f"[{path}](#{slug(path)})" for path, _ in own)
            kind = f"{'list of ' if kind.startswith('list of') else ''}{links}"
            meaning = meaning or _first_paragraph(own[0][1])
            default = default if default in ("required", "none") else "its defaults"
        yield catalogue.Option(option.name, kind, default, meaning)


def _option_table(options: Iterable[catalogue.Option]) -> list[str]:
    def shown(option: catalogue.Option) -> str:
        value = (
            option.default.lower() if option.type == "true | false" else option.default or "(empty)"
        )
        return value if value in ("required", "none", "its defaults") else f"`{value}`"

    rows = [[f"`{o.name}`", o.type, shown(o), o.description] for o in options]
    return table(["key", "type", "default", "meaning"], rows)


def _first_paragraph(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "")


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
