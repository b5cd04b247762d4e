"""Writes the reference pages that follow from the code: recipe keys, plugins, commands, the
Python interface.

python docs/generate.py
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel
from typer.models import ArgumentInfo

import kdkit
from kdkit import testing
from kdkit.cli import app
from kdkit.contracts.dataset_source import DatasetOptions
from kdkit.contracts.loss_options import LayerPair
from kdkit.contracts.model_source import (
    CacheOptions,
    ModelOptions,
    Normalize,
    RecipeTeacher,
    TeacherOptions,
)
from kdkit.contracts.options import Options, Ramp
from kdkit.recipe import catalogue, registry, sections
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
    ("metrics", sections.MetricEntry, ""),
    ("data", sections.DataSpec, ""),
    (
        "data.dataset",
        sections.DatasetEntry,
        "Each dataset plugin adds [options of its own](plugins.md#datasets).",
    ),
    ("data.augment", sections.BatchAugment, ""),
    ("data.timm_augment", sections.TimmAugment, ""),
    (
        "student, teacher",
        ModelOptions,
        (
            "Keys of every model. Each model source adds [options of its"
            " own](plugins.md#model-sources)."
        ),
    ),
    ("student.normalize, teacher.normalize", Normalize, ""),
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
    }
    for kind, title in titles.items():
        entries = _entries(kind)
        yield from (f"## {title}", "")
        columns = ["name", *([GROUPS[kind]] if kind in GROUPS else []), "what it is"]
        rows = [
            [f"[{e.name}](#{_anchor(e)})", *([e.group] if kind in GROUPS else []), e.summary]
            for e in entries
        ]
        yield from (*_table(columns, rows), "")
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
        yield from (*_table(["name", "what it is", "formula", "source"], rows), "")
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
        _line(entry.paper),
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
    return _slug(_title(entry))


def cli_page() -> Iterator[str]:
    """Every command with its arguments and options, read off the functions: what typer makes of
    them differs between its versions.
    """
    parts = [app, *(group.typer_instance for group in app.registered_groups)]
    commands = {
        info.name or _name_of(info.callback): info.callback
        for part in parts
        for info in part.registered_commands
    }
    yield from ("# Command line", "", f"{app.info.help}", "")
    yield from (
        (
            "A mistake of the user's is told on one line and ends with code 2; a run stopped by a"
            " signal ends with 128 plus its number."
        ),
        "",
    )
    rows = [
        [f"[{name}](#kdkit-{name})", _line(function.__doc__)] for name, function in commands.items()
    ]
    yield from (*_table(["command", "what it does"], rows), "")
    for name, function in commands.items():
        yield from (f"## kdkit {name}", "", _line(function.__doc__), "")
        found = list(_parameters(function))
        usage = " ".join(["kdkit", name, *(p.called for p in found if p.is_argument)])
        yield from (
            "```text",
            usage if all(p.is_argument for p in found) else f"{usage} [OPTIONS]",
            "```",
            "",
        )
        if found:
            rows = [[f"`{p.called}`", p.default, p.help] for p in found]
            yield from (*_table(["argument or option", "default", "meaning"], rows), "")


@dataclass(frozen=True)
class Parameter:
    """An argument or option of a command, as its page shows it."""

    called: str
    is_argument: bool
    default: str
    help: str


def _parameters(function: Callable[..., None]) -> Iterator[Parameter]:
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        kind, info = get_args(hints[name])[:2]
        required = parameter.default is inspect.Parameter.empty
        value = getattr(parameter.default, "value", parameter.default)  # of an enumeration
        default = "required" if required else "" if value in (None, False) else f"`{value}`"
        if is_argument := isinstance(info, ArgumentInfo):
            word = (info.metavar or name).upper().removesuffix("...")
            many = "..." if list in [get_origin(part) for part in (kind, *get_args(kind))] else ""
            called = (word if required else f"[{word}]") + many
        else:
            written = [
                word for word in (info.default, *(info.param_decls or ())) if isinstance(word, str)
            ]
            choices = _choices(kind)
            called = next(iter(written), f"--{name}") + (
                "" if kind is bool else f" {'|'.join(choices) or name.upper()}"
            )
        yield Parameter(called, is_argument, default, _line(info.help or ""))


def _choices(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    return (
        [str(member.value) for member in kind]
        if inspect.isclass(kind) and issubclass(kind, Enum)
        else []
    )


def _name_of(function: Callable[..., None]) -> str:
    return function.__name__.replace("_", "-")


def python_page() -> Iterator[str]:
    """All of `import kdkit`, by what it is for."""
    yield from (
        "# Python interface",
        "",
        (
            "What `import kdkit` offers. A plugin needs nothing else of kdkit; `kdkit.testing`"
            " checks one."
        ),
        "",
    )
    values = {name: getattr(kdkit, name) for name in kdkit.__all__}
    functions = {name: value for name, value in values.items() if inspect.isfunction(value)}
    errors = {
        name: value
        for name, value in values.items()
        if inspect.isclass(value) and issubclass(value, Exception)
    }
    others = {
        name: value
        for name, value in values.items()
        if name not in functions and name not in errors
    }
    yield from ("## Functions", "")
    for name, value in functions.items():
        yield from _function(f"kdkit.{name}", value)
    yield from ("## Classes and types", "")
    yield from (
        *_table(
            ["name", "what it is"],
            [[f"`{name}`", _about(name, value)] for name, value in others.items()],
        ),
        "",
    )
    yield from ("## Errors", "", "A message has one line for each problem.", "")
    yield from _table(
        ["name", "derives from", "raised for"],
        [[f"`{n}`", f"`{v.__base__.__name__}`", _about(n, v)] for n, v in errors.items()],
    )
    yield from ("", "## kdkit.testing", "")
    for function in (testing.check_loss, testing.assert_agrees):
        yield from _function(f"kdkit.testing.{function.__name__}", function)
    yield from (
        (
            "`kdkit.testing.LOSS_CHECKS` holds the checks. A loss that fails one on purpose says"
            " so, with the reason, in its class attribute"
        ),
        "`exceptions`; the report shows both.",
        "",
        *_table(
            ["check", "what is promised"],
            [
                [f"`{one.__name__}`", _line(inspect.getdoc(one) or "")]
                for one in testing.LOSS_CHECKS
            ],
        ),
    )


def _function(name: str, value: Callable[..., Any]) -> Iterator[str]:
    """A function's signature and docstring."""
    signature = re.sub(r"'([^']*)'", r"\1", str(inspect.signature(value)))
    yield from (f"### {name}", "", "```text", f"{value.__name__}{signature}", "```", "")
    yield from (*_docstring(inspect.getdoc(value) or ""), "")


def _docstring(text: str) -> Iterator[str]:
    """A Google-style docstring as Markdown: its sections become lists."""
    for line in text.splitlines():
        if re.fullmatch(r"(Args|Raises|Returns):", line):
            yield from (f"{line}", "")
        elif match := re.match(r"    (\*{0,2}\w+): (.*)", line):
            yield f"- `{match[1]}`: {match[2]}"
        else:
            yield line.strip() if not line.startswith("        ") else f"  {line.strip()}"


def _about(name: str, value: Any) -> str:
    if name == "hookimpl":
        return (
            "Marks a function of a plugin file as a hook: `kdkit_losses`, `kdkit_schedules`,"
            " `kdkit_models`, `kdkit_datasets`, `kdkit_tasks` or `kdkit_metrics`."
        )
    if inspect.isclass(value) and value.__doc__:
        return _line(inspect.cleandoc(value.__doc__).split("\n\n")[0])
    for module in list(sys.modules.values()):
        if (
            module.__name__.startswith("kdkit.")
            and getattr(module, name, None) is value
            and (text := _written_below(module, name))
        ):
            return _line(text)
    return ""


def _written_below(module: Any, name: str) -> str:
    """The string that follows `name = ...` in a module's source."""
    body = ast.parse(inspect.getsource(module)).body
    for statement, following in zip(body, body[1:], strict=False):
        targets = (
            statement.targets
            if isinstance(statement, ast.Assign)
            else [statement.target]
            if isinstance(statement, ast.AnnAssign)
            else []
        )
        if [ast.unparse(target) for target in targets] == [name]:
            constant = following.value if isinstance(following, ast.Expr) else None
            return str(constant.value) if isinstance(constant, ast.Constant) else ""
    return ""


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
    for option in catalogue.options(plugin):
        field = cls.model_fields[option.name]
        own = [
            (path, record)
            for path, record, _ in SECTIONS
            if record in _records(field.annotation) and record is not Ramp
        ]
        kind = option.type
        meaning = described[option.name]
        default = option.default
        if own:
            links = " or ".join(f"[{path}](#{_slug(path)})" for path, _ in own)
            kind = f"{'list of ' if kind.startswith('list of') else ''}{links}"
            meaning = meaning or _first_paragraph(own[0][1])
            default = default if default in ("required", "none") else "its defaults"
        yield catalogue.Option(field.alias or option.name, kind, default, meaning)


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _option_table(options: Iterable[catalogue.Option]) -> list[str]:
    def shown(option: catalogue.Option) -> str:
        value = (
            option.default.lower() if option.type == "true | false" else option.default or "(empty)"
        )
        return value if value in ("required", "none", "its defaults") else f"`{value}`"

    rows = [[f"`{o.name}`", o.type, shown(o), o.description] for o in options]
    return _table(["key", "type", "default", "meaning"], rows)


def _table(columns: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(columns), line(["---"] * len(columns)), *map(line, rows)]


def _first_paragraph(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "")


def _line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
