"""The reference pages of the command line and of the Python interface."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer
from blocks import slug, table, unwrapped
from typer.models import ArgumentInfo

import kdkit
from kdkit import testing
from kdkit.cli import app


def cli_page() -> Iterator[str]:
    """Every command with its arguments and options, read off the functions: what typer makes of
    them differs between its versions.
    """
    commands = dict(_commands(app))
    yield from ("# Command line", "", f"{app.info.help}", "")
    yield from (
        (
            "A mistake of the user's is told on one line and ends with code 2; a run stopped by a"
            " signal ends with 128 plus its number."
        ),
        "",
    )
    rows = [
        [f"[{name}](#{slug(f'kdkit {name}')})", unwrapped(function.__doc__)]
        for name, function in commands.items()
    ]
    yield from (*table(["command", "what it does"], rows), "")
    for name, function in commands.items():
        yield from (f"## kdkit {name}", "", unwrapped(function.__doc__), "")
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
            yield from (*table(["argument or option", "default", "meaning"], rows), "")


def _commands(app: typer.Typer, before: str = "") -> Iterator[tuple[str, Callable[..., None]]]:
    """Every command by its words; those of a group with a name have it before theirs."""
    for info in app.registered_commands:
        yield before + (info.name or _name_of(info.callback)), info.callback
    for group in app.registered_groups:
        # typer marks a name that is not given by a placeholder
        name = f"{group.name} " if isinstance(group.name, str) else ""
        yield from _commands(group.typer_instance, before + name)


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
        yield Parameter(called, is_argument, default, unwrapped(info.help or ""))


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
        *table(
            ["name", "what it is"],
            [[f"`{name}`", _about(name, value)] for name, value in others.items()],
        ),
        "",
    )
    yield from ("## Errors", "", "A message has one line for each problem.", "")
    yield from table(
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
        *table(
            ["check", "what is promised"],
            [
                [f"`{one.__name__}`", unwrapped(inspect.getdoc(one) or "")]
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
            " `kdkit_models`, `kdkit_datasets`, `kdkit_tasks`, `kdkit_metrics`, `kdkit_balances` or"
            " `kdkit_distillers`."
        )
    if inspect.isclass(value) and value.__doc__:
        return unwrapped(inspect.cleandoc(value.__doc__).split("\n\n")[0])
    for module in list(sys.modules.values()):
        if (
            module.__name__.startswith("kdkit.")
            and getattr(module, name, None) is value
            and (text := _written_below(module, name))
        ):
            return unwrapped(text)
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
