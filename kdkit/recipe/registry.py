"""Finds plugins and checks what they return."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pluggy

from kdkit.contracts import hooks
from kdkit.contracts.balance import Balance
from kdkit.contracts.compression import Compression
from kdkit.contracts.data_distiller import DataDistiller
from kdkit.contracts.dataset_source import DatasetSource
from kdkit.contracts.loss import Loss
from kdkit.contracts.metric_source import MetricSource
from kdkit.contracts.model_source import ModelSource
from kdkit.contracts.options import Options
from kdkit.contracts.schedule import Schedule
from kdkit.contracts.task import RowMeaning, Task
from kdkit.errors import PluginError, cause, suggest
from kdkit.recipe.dependencies import beside

Plugin = (
    type[Loss]
    | type[Schedule]
    | type[ModelSource]
    | type[DatasetSource]
    | type[Task]
    | type[MetricSource]
    | type[Balance]
    | type[Compression]
    | type[DataDistiller]
)

KINDS: Mapping[str, type] = {
    "kdkit_losses": Loss,
    "kdkit_schedules": Schedule,
    "kdkit_models": ModelSource,
    "kdkit_datasets": DatasetSource,
    "kdkit_tasks": Task,
    "kdkit_metrics": MetricSource,
    "kdkit_balances": Balance,
    "kdkit_compressions": Compression,
    "kdkit_distillers": DataDistiller,
}
ENTRY_POINTS = "kdkit"
FROM_A_FILE = "kdkit_plugin_"
"""Prefix of the module name of a plugin that is not installed."""
NAME = re.compile(r"[a-z][a-z0-9_]*")
# keys that a recipe adds to the options of losses and other plugins
RESERVED = {"use", "weight", "name", "teacher"}
KNOWLEDGE = {"labels", "response", "feature", "relation"}
ROWS = set(get_args(RowMeaning))
SCHEMES = {"none", "offline", "online", "self"}


@dataclass(frozen=True)
class Registry:
    """The plugin classes found, by kind and name, and the file or distribution of each."""

    losses: Mapping[str, type[Loss]]
    schedules: Mapping[str, type[Schedule]]
    models: Mapping[str, type[ModelSource]]
    datasets: Mapping[str, type[DatasetSource]]
    tasks: Mapping[str, type[Task]]
    metrics: Mapping[str, type[MetricSource]]
    balances: Mapping[str, type[Balance]]
    compressions: Mapping[str, type[Compression]]
    distillers: Mapping[str, type[DataDistiller]]
    origins: Mapping[Plugin, str]

    def __iter__(self) -> Iterator[tuple[str, Plugin]]:
        """Iterate over (kind, class) of every plugin, by kind and name."""
        for kind in (hook.removeprefix("kdkit_") for hook in KINDS):
            for plugin in getattr(self, kind).values():
                yield kind, plugin


def load(files: tuple[Path, ...] = (), *, installed: bool = True) -> Registry:
    """Load all plugins: installed ones (entry-point group `kdkit`), then files and folders.

    An entry point names a module, or a package whose modules are all plugins. Folders are searched
    recursively; names that begin with `_` are skipped. The result does not depend on what was
    loaded before.

    Raises:
        PluginError: naming the plugin and what is wrong with it.
    """
    # a file may be named by the recipe and by the command
    sources = tuple({path.resolve(): path for path in _plugin_files(files)}.values())
    return _load(
        tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in sources), installed
    )


# cached, as every recipe of a study and of a teacher asks for the same plugins
@functools.lru_cache(maxsize=8)
def _load(files: tuple[tuple[Path, int, int], ...], installed: bool) -> Registry:
    """Load the plugins; times and sizes of the files are arguments so that edits are noticed."""
    manager = pluggy.PluginManager("kdkit")
    manager.add_hookspecs(hooks)
    modules = [
        *(_installed() if installed else ()),
        *((str(path), _import(path)) for path, _, _ in files),
    ]
    for origin, module in modules:
        try:
            manager.register(module, name=origin)
        except pluggy.PluginValidationError as error:
            raise PluginError(f"{origin}: {str(error).splitlines()[-1].strip()}") from error
    # pluggy ignores functions that are no hooks
    _refuse_misspelt_hooks(modules)
    origins: dict[Plugin, str] = {}
    by_kind = {
        hook.removeprefix("kdkit_"): _collect(getattr(manager.hook, hook), base, origins)
        for hook, base in KINDS.items()
    }
    return Registry(**by_kind, origins=origins)


def _installed() -> Iterator[tuple[str, ModuleType]]:
    # sorted: their order in the environment depends on how packages were installed
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda p: (p.name, p.value)):
        distribution = point.dist.name if point.dist else point.value
        try:
            module = point.load()
        except Exception as error:
            raise PluginError(
                f"{distribution} (entry point '{point.name}'): cannot be imported: {cause(error)}"
            ) from error
        # a package: each of its modules is a plugin, as in the standard ones
        if module.__spec__ and module.__spec__.submodule_search_locations:
            root = Path(next(iter(module.__path__)))
            for path in _plugin_files([Path(folder) for folder in module.__path__]):
                yield str(path), _import(path, package=module.__name__, root=root)
        else:
            yield f"{distribution} ({module.__name__})", module


def _plugin_files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            for file in sorted(path.rglob("*.py")):
                names = file.relative_to(path).parts
                if not any(name.startswith((".", "_")) for name in names):
                    yield file
        elif path.is_file():
            yield path
        else:
            raise PluginError(f"{path}: no such plugin file or folder")


def _import(path: Path, package: str = "", root: Path | None = None) -> ModuleType:
    if root:
        name = ".".join([package, *path.relative_to(root).with_suffix("").parts])
    else:
        # two plugins of different folders may have one file name
        digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
        name = f"{FROM_A_FILE}{path.stem}_{digest[:8]}"
    # modules of a package may be imported already, by one another
    if package and name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"{path}: a plugin file is Python source and ends in .py")
    module = importlib.util.module_from_spec(spec)
    # registered before it runs, so that pickle, inspect and pydantic find its classes
    sys.modules[name] = module
    try:
        with contextlib.nullcontext() if root else beside(path):
            spec.loader.exec_module(module)
    except Exception as error:
        # a half-initialised module must not be found by a later import
        del sys.modules[name]
        raise PluginError(f"{path}: cannot be imported: {cause(error)}") from error
    return module


def _refuse_misspelt_hooks(modules: Iterable[tuple[str, ModuleType]]) -> None:
    for origin, module in modules:
        functions = {n: value for n, value in vars(module).items() if inspect.isfunction(value)}
        hooks = [name for name in functions if name.startswith("kdkit_")]
        marked = [name for name, value in functions.items() if getattr(value, "kdkit_impl", None)]
        if wrong := sorted({*hooks, *marked} - KINDS.keys()):
            raise PluginError(
                f"{origin}: '{wrong[0]}' is no kdkit hook; {suggest(wrong[0], KINDS)}"
            )
        if unmarked := sorted(set(hooks) - set(marked)):
            raise PluginError(f"{origin}: {unmarked[0]}() lacks @kdkit.hookimpl")
        if not marked:
            raise PluginError(f"{origin}: defines no kdkit hook; {suggest('', KINDS)}")


def _collect(
    hook: pluggy.HookCaller, base: type[Any], origins: dict[Plugin, str]
) -> dict[str, Any]:
    plugins: dict[str, Plugin] = {}
    # one by one, so that an error names its plugin; reversed, as pluggy would call them
    for impl in reversed(hook.get_hookimpls()):
        try:
            returned = impl.function()
        except Exception as error:
            raise PluginError(
                f"{impl.plugin_name}: {hook.name}() failed: {cause(error)}"
            ) from error
        if not isinstance(returned, Sequence):
            raise PluginError(
                f"{impl.plugin_name}: {hook.name}() must return a list of classes, not {returned!r}"
            )
        for cls in returned:
            _check(cls, base, impl.plugin_name)
            if cls.name in plugins:
                raise PluginError(
                    f"'{cls.name}' is registered twice: by {origins[plugins[cls.name]]} and by"
                    f" {impl.plugin_name}"
                )
            plugins[cls.name] = cls
            origins[cls] = impl.plugin_name
    return dict(sorted(plugins.items()))


def _check(cls: Any, base: type, plugin: str) -> None:
    def require(condition: object, says: str) -> None:
        if not condition:
            raise PluginError(f"{plugin}: {says}")

    def require_one_of(attribute: str, allowed: Set[str]) -> None:
        value = getattr(cls, attribute, None)
        says = f"{cls.__name__}.{attribute} is {value!r}; {suggest(str(value), allowed)}"
        require(value in allowed, says)

    require(
        inspect.isclass(cls) and issubclass(cls, base),
        f"{cls!r} is not a kdkit.{base.__name__} class",
    )
    # a class that lacks methods would fail only when a recipe uses it
    missing = ", ".join(sorted(cls.__abstractmethods__))
    require(not missing, f"{cls.__name__} does not implement {missing}")
    name = getattr(cls, "name", None)
    require(
        isinstance(name, str) and NAME.fullmatch(name),
        f"{cls.__name__}.name must be snake_case, got {name!r}",
    )
    require(
        inspect.isclass(cls.Options) and issubclass(cls.Options, Options),
        f"{cls.__name__}.Options must derive from the base's Options",
    )
    clash = ", ".join(sorted(RESERVED & cls.Options.model_fields.keys()))
    require(not clash, f"{cls.__name__}.Options may not define {clash}: the recipe uses that key")
    # `__dict__`: an inherited docstring describes the base
    require(
        cls.__dict__.get("__doc__"),
        f"{cls.__name__} has no docstring: its first line is what `kdkit plugins` shows",
    )
    undescribed = ", ".join(
        key for key, value in cls.Options.model_fields.items() if not value.description
    )
    require(not undescribed, f"{cls.__name__}.Options: {undescribed} lacks Field(description=...)")
    if base is Loss:
        require_one_of("knowledge", KNOWLEDGE)
    if base is Task:
        require_one_of("rows_are", ROWS)
        require(
            isinstance(getattr(cls, "default_loss", None), str),
            f"{cls.__name__}.default_loss must be the name of a loss",
        )
    if base is MetricSource:
        require(
            getattr(cls, "tasks", None) == "any" or isinstance(getattr(cls, "tasks", None), Set),
            f"{cls.__name__}.tasks must be a set of names, or 'any'",
        )
    if base is Schedule:
        require_one_of("scheme", SCHEMES)
        require(
            isinstance(getattr(cls, "needs_teacher", None), bool),
            f"{cls.__name__}.needs_teacher must be True or False",
        )
