"""YAML with positions: every value can say which file and line it came from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PosixPath, WindowsPath
from typing import Any, cast

import yaml

from kdkit.errors import RecipeError
from kdkit.options import Text

COMMAND_LINE = "override"


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's numbers and booleans: `5e-4` is a float, `no` and `off` are words."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"true|True|false|False"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789"))


def _text(loader: _Loader, node: yaml.ScalarNode) -> Text:
    name = node.start_mark.name
    return Text.of(str(loader.construct_scalar(node)), Path.cwd() if name == COMMAND_LINE else Path(name).parent)


_Loader.add_constructor("tag:yaml.org,2002:str", _text)


class _Dumper(yaml.SafeDumper):
    """Writes what overrides may hold beside YAML's own types."""


for _kind in (Text, PosixPath, WindowsPath):
    _Dumper.add_representer(_kind, lambda dumper, value: dumper.represent_str(str(value)))
_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(value))


class Source:
    """A recipe's data and where each key of it stands.

    `extends: other.yaml` is merged in (mappings merge, lists replace), then the overrides (`key.path` to value; a list's
    item is named by its position, or by its `name` or `use`).

    Args:
        path: the file.
        overrides: values, or nodes of a file, which keep their places.
        root: what is taken for the file's content (None: the file is read).

    Raises:
        RecipeError: unreadable file, broken YAML, a key given twice, an override that leads nowhere.
    """

    def __init__(self, path: Path, overrides: Mapping[str, Any] | None = None, *, root: yaml.MappingNode | None = None) -> None:
        self.path = path
        self._root = _copied(root or _merged(path, ()))
        for key, value in (overrides or {}).items():
            _override(self._root, key, value)
        loader = _Loader("")
        try:
            self.data: dict[str, Any] = loader.construct_document(self._root)
        except yaml.YAMLError as error:
            raise RecipeError(_explain(error, path)) from None
        finally:
            loader.dispose()

    def section(self, location: Sequence[str], *, but: Sequence[str] = ()) -> Source:
        """A mapping in it as a source of its own, with what it `extends`; empty where nothing stands there. The keys `but` are left out."""
        node = self._node(location)
        if not isinstance(node, yaml.MappingNode):
            node = yaml.MappingNode("tag:yaml.org,2002:map", [], self._root.start_mark, self._root.end_mark)
        kept = [(key, value) for key, value in node.value if key.value not in but]
        root = yaml.MappingNode(node.tag, kept, node.start_mark, node.end_mark, node.flow_style)
        return Source(self.path, root=_with_parent(root, ()))

    def items(self, location: Sequence[str]) -> list[yaml.Node]:
        """What stands in a list, to override something with."""
        node = self._node(location)
        return list(node.value) if isinstance(node, yaml.SequenceNode) else []

    def over(self, base: Source) -> Source:
        """Its keys over those of another source."""
        return Source(self.path, root=_merge(base._root, self._root))

    def changed(self, overrides: Mapping[str, Any]) -> Source:
        """The same with overrides."""
        return Source(self.path, overrides, root=self._root)

    def _node(self, location: Sequence[str]) -> yaml.Node | None:
        node: yaml.Node | None = self._root
        for step in location:
            entry = _entry(node, step) if isinstance(node, yaml.MappingNode) else None
            node = entry[1] if entry else None
        return node

    def where(self, location: Sequence[str | int]) -> str:
        """`file:line` of the deepest part of `location` that exists; a key counts where it is written."""
        node: yaml.Node = self._root
        mark = node.start_mark
        for step in location:
            if isinstance(node, yaml.MappingNode) and (entry := _entry(node, step)):
                mark, node = entry[0].start_mark, entry[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
                mark = node.start_mark
        return _place(mark)


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """`key.path=value` words as a mapping; values are read as YAML.

    Raises:
        RecipeError: a word without `=`, or whose value is not YAML.
    """
    overrides: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise RecipeError(f"{COMMAND_LINE}: '{word}' is not of the form key.path=value, such as train.epochs=3")
        try:
            overrides[key] = yaml.load(value, _Loader)  # noqa: S506 -- a SafeLoader
        except yaml.YAMLError as error:
            raise RecipeError(f"{COMMAND_LINE}: {key}: {' '.join(str(error).split())}") from None
    return overrides


def override_words(overrides: Mapping[str, Any]) -> list[str]:
    """Overrides as the words of a command line that `parse_overrides` reads."""

    def plain(value: Any) -> str:
        text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10_000)
        return text.strip().removesuffix("...").strip()

    return [f"{key}={plain(value)}" for key, value in overrides.items()]


def nested(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Values by `key.path` as mappings in mappings."""
    tree: dict[str, Any] = {}
    for path, value in overrides.items():
        *above, last = path.split(".")
        node = tree
        for step in above:
            node = node.setdefault(step, {})
        node[last] = value
    return tree


def _composed(text: Any) -> Any:
    return yaml.compose(text, _Loader)


def _place(mark: yaml.Mark) -> str:
    return COMMAND_LINE if mark.name == COMMAND_LINE else f"{_shown(mark.name)}:{mark.line + 1}"


def _shown(name: str) -> str:
    path = Path(name)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else name


def _explain(error: yaml.YAMLError, path: Path) -> str:
    mark = getattr(error, "problem_mark", None)
    says = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"{_shown(str(path))}{f':{mark.line + 1}' if mark else ''}: {says}"


def _merged(path: Path, children: tuple[Path, ...]) -> yaml.MappingNode:
    path = path.absolute()
    shown = _shown(str(path))
    if path.resolve() in children:
        raise RecipeError(f"{shown}: extends itself, by way of {' -> '.join(_shown(str(p)) for p in children)}")
    return _with_parent(_read(path, shown), (*children, path.resolve()))


def _read(path: Path, shown: str) -> yaml.MappingNode:
    try:
        with path.open(encoding="utf-8") as stream:
            root = _composed(stream)
    except OSError as error:
        raise RecipeError(f"{shown}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{shown}: is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise RecipeError(_explain(error, path)) from None
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(f"{shown}:1: a recipe is a mapping of keys, such as `name: first`")
    _check_keys(root, ())
    return root


def _with_parent(root: yaml.MappingNode, children: tuple[Path, ...]) -> yaml.MappingNode:
    """A mapping over the file that it `extends`, if it does."""
    entry = _entry(root, "extends")
    if entry is None:
        return root
    root.value.remove(entry)
    mark = entry[0].start_mark
    if not isinstance(entry[1], yaml.ScalarNode):
        raise RecipeError(f"{_shown(mark.name)}:{mark.line + 1}: extends: names one recipe file")
    parent = Path(mark.name).parent / entry[1].value
    if not parent.is_file():
        raise RecipeError(f"{_shown(mark.name)}:{mark.line + 1}: extends: no such file: {entry[1].value}")
    return _merge(_merged(parent, children), root)


def _copied(node: Any) -> Any:
    """A node that can be changed without changing another; what has two names (`&a`, `*a`) is two things."""
    if isinstance(node, yaml.MappingNode):
        children: list[Any] = [(key, _copied(value)) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [_copied(item) for item in node.value]
    else:
        return node
    return type(node)(node.tag, children, node.start_mark, node.end_mark, node.flow_style)


def _check_keys(node: yaml.Node, above: tuple[yaml.Node, ...]) -> None:
    if node in above:
        raise RecipeError(f"{_shown(node.start_mark.name)}:{node.start_mark.line + 1}: contains itself")
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _check_keys(child, (*above, node))
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            at = f"{_shown(key.start_mark.name)}:{key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"{at}: a key is a word")
            if key.value in seen:
                raise RecipeError(f"{at}: {key.value}: is given twice (first on line {seen[key.value]})")
            seen[key.value] = key.start_mark.line + 1
            _check_keys(value, (*above, node))


def _entry(node: yaml.MappingNode, key: object) -> tuple[yaml.Node, yaml.Node] | None:
    return next(((k, v) for k, v in node.value if k.value == str(key)), None)


def _merge(base: yaml.MappingNode, over: yaml.MappingNode) -> yaml.MappingNode:
    entries = {key.value: (key, value) for key, value in base.value}
    for key, value in over.value:
        old = entries.get(key.value)
        if old and isinstance(old[1], yaml.MappingNode) and isinstance(value, yaml.MappingNode):
            value = _merge(old[1], value)
        entries[key.value] = (key, value)
    return yaml.MappingNode(over.tag, list(entries.values()), over.start_mark, over.end_mark, over.flow_style)


def _override(root: yaml.MappingNode, path: str, value: Any) -> None:
    mark = value.start_mark if isinstance(value, yaml.Node) else yaml.Mark(COMMAND_LINE, 0, 0, 0, None, 0)

    def node_of(data: Any) -> yaml.Node:
        if isinstance(data, yaml.Node):
            return cast("yaml.Node", _copied(data))
        node: yaml.Node = _composed(yaml.dump(data, Dumper=_Dumper))
        for part in _walk(node):
            part.start_mark = mark
        return node

    *steps, last = path.split(".")
    node: yaml.Node = root
    for step in steps:
        if isinstance(node, yaml.SequenceNode):
            node = node.value[_position(node, step, path, mark)]
        elif isinstance(node, yaml.MappingNode):
            entry = _entry(node, step)
            if entry is None or not isinstance(entry[1], yaml.CollectionNode):
                entry = (node_of(step), node_of({}))
                node.value = [(k, v) for k, v in node.value if k.value != step] + [entry]
            node = entry[1]
    if isinstance(node, yaml.SequenceNode):
        node.value[_position(node, last, path, mark)] = node_of(value)
    elif isinstance(node, yaml.MappingNode):
        node.value = [(k, v) for k, v in node.value if k.value != last] + [(node_of(last), node_of(value))]
    else:
        raise RecipeError(f"{_place(mark)}: {path}: leads into a value that has no keys")


def _position(node: yaml.SequenceNode, step: str, path: str, mark: yaml.Mark) -> int:
    def called(item: yaml.Node) -> set[str]:
        entries = [_entry(item, key) for key in ("name", "use")] if isinstance(item, yaml.MappingNode) else []
        return {entry[1].value for entry in entries if entry}

    if step.isdecimal() and int(step) < len(node.value):
        return int(step)
    matches = [i for i, item in enumerate(node.value) if step in called(item)]
    if len(matches) != 1:
        problem = "no item" if not matches else f"{len(matches)} items"
        raise RecipeError(f"{_place(mark)}: {path}: {problem} called '{step}' in a list of {len(node.value)}; count from 0")
    return matches[0]


def _walk(node: yaml.Node) -> Iterable[yaml.Node]:
    yield node
    children = (
        node.value
        if isinstance(node, yaml.SequenceNode)
        else [n for pair in node.value for n in pair]
        if isinstance(node, yaml.MappingNode)
        else []
    )
    for child in children:
        yield from _walk(child)
