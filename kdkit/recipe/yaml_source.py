"""A recipe's data with their places, merged from files and overrides."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PosixPath, WindowsPath
from typing import Any, cast

import yaml

from kdkit.contracts.options import Text, path_of
from kdkit.errors import RecipeError, dotted, one_line, shorten, shown
from kdkit.recipe import reading
from kdkit.recipe.reading import COMMAND_LINE, place, seen_from_here

LONGEST_CHAIN = 20
"""Maximum number of files that extend each other."""


class _Dumper(yaml.SafeDumper):
    """Writes the types that overrides may contain besides YAML's own."""


for _kind in (Text, PosixPath, WindowsPath):
    _Dumper.add_representer(_kind, lambda dumper, value: dumper.represent_str(str(value)))
_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(value))


class Source:
    """A recipe's data and the place of each key.

    `extends: other.yaml` is merged in (mappings merge, lists replace), then the overrides
    (`key.path` to value; a list's item is named by its position, or by its `name` or `use`).

    Args:
        path: the file.
        overrides: values, or nodes of a file, which retain their places.
        root: used as the file's content (None: the file is read).

    Raises:
        RecipeError: unreadable file, broken YAML, a duplicate key, an override of something that
            does not exist.
    """

    def __init__(
        self,
        path: Path,
        overrides: Mapping[str, Any] | None = None,
        *,
        root: yaml.MappingNode | None = None,
    ) -> None:
        self.path = path
        # copied: overrides change nodes, and aliases or other sources share them
        self._root = _copied(root or _merged(path, ()))
        for key, value in (overrides or {}).items():
            _override(self._root, key, value)
        self.data: dict[str, Any] = reading.value(self._root)

    def section(self, location: Sequence[str], *, but: Sequence[str] = ()) -> Source:
        """Return a mapping in it as a source, with what it `extends` but without the keys `but`."""
        node = self._node(location)
        if not isinstance(node, yaml.MappingNode):
            node = yaml.MappingNode(
                "tag:yaml.org,2002:map", [], self._root.start_mark, self._root.end_mark
            )
        items = [(key, value) for key, value in node.value if key.value not in but]
        root = yaml.MappingNode(node.tag, items, node.start_mark, node.end_mark, node.flow_style)
        return Source(self.path, root=_with_parent(root, ()))

    def items(self, location: Sequence[str]) -> list[yaml.Node]:
        """Return the items of a list, as values for an override."""
        node = self._node(location)
        return _items(node) if node else []

    def placed(self, location: Sequence[str], values: Iterable[Any]) -> list[yaml.Node]:
        """Return values that are not in the file as nodes with the place of a mapping in it."""
        node = self._node(location) or self._root
        return [_node_of(value, ".".join(location), node.start_mark) for value in values]

    def over(self, base: Source) -> Source:
        """Merge with another source; this one's values win."""
        return Source(self.path, root=_merge(base._root, self._root))

    def changed(self, overrides: Mapping[str, Any]) -> Source:
        """Return the same source with overrides."""
        return Source(self.path, overrides, root=self._root)

    def _node(self, location: Sequence[str]) -> yaml.Node | None:
        node: yaml.Node | None = self._root
        for step in location:
            entry = _entry(node, step) if isinstance(node, yaml.MappingNode) else None
            node = entry[1] if entry else None
        return node

    def where(self, location: Sequence[str | int]) -> str:
        """Return `file:line` of the deepest existing key of `location`."""
        node: yaml.Node = self._root
        mark = node.start_mark
        for step in location:
            if isinstance(node, yaml.MappingNode) and (entry := _entry(node, step)):
                mark, node = entry[0].start_mark, entry[1]
            elif isinstance(step, int) and step < len(items := _items(node)):
                node = items[step]
                mark = node.start_mark
        return place(mark)


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """Parse `key.path=value` words into a mapping; values are read as YAML.

    Raises:
        RecipeError: a word without `=`, or whose value is not YAML.
    """
    overrides: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise RecipeError(
                f"{COMMAND_LINE}: '{shorten(one_line(word))}' is not of the form key.path=value,"
                " such as train.epochs=3"
            )
        try:
            node = reading.compose(value, COMMAND_LINE)
            overrides[key] = None if node is None else reading.value(node)
        except RecipeError as error:
            raise RecipeError(
                f"{COMMAND_LINE}: {dotted([key])}: {str(error).removeprefix(f'{COMMAND_LINE}: ')}"
            ) from None
    return overrides


def override_words(overrides: Mapping[str, Any]) -> list[str]:
    """Format overrides as command-line words that `parse_overrides` reads."""
    return [f"{key}={flow(value)}" for key, value in overrides.items()]


def flow(value: Any) -> str:
    """Format a value as YAML in one line: `{size: 16, grey: true}`."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=10_000
    )
    # PyYAML ends a document that is a plain scalar with `...`
    return text.strip().removesuffix("...").strip()


def nested(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Convert values by `key.path` to nested mappings."""
    tree: dict[str, Any] = {}
    for path, value in overrides.items():
        *above, last = path.split(".")
        node = tree
        for step in above:
            node = node.setdefault(step, {})
        node[last] = value
    return tree


def _merged(path: Path, children: tuple[Path, ...]) -> yaml.MappingNode:
    path = path.absolute()
    real = Path(os.path.realpath(path))
    # by real paths: a link to a child is the child
    if real in children:
        raise RecipeError(
            f"{seen_from_here(str(path))}: extends itself, by way of"
            f" {' -> '.join(seen_from_here(str(child)) for child in children)}"
        )
    if len(children) == LONGEST_CHAIN:
        raise RecipeError(
            f"{seen_from_here(str(children[0]))}: extends a file that extends another, and so on,"
            f" more than {LONGEST_CHAIN} times"
        )
    return _with_parent(reading.read(path), (*children, real))


def _with_parent(root: yaml.MappingNode, children: tuple[Path, ...]) -> yaml.MappingNode:
    """Merge a mapping over the file that it `extends`, if any."""
    entry = _entry(root, "extends")
    if entry is None:
        return root
    others = [item for item in root.value if item[0] is not entry[0]]
    root = yaml.MappingNode(root.tag, others, root.start_mark, root.end_mark, root.flow_style)
    at = f"{place(entry[0].start_mark)}: extends"
    if not isinstance(entry[1], yaml.ScalarNode):
        raise RecipeError(f"{at}: names one recipe file")
    try:
        parent = path_of(Text.of(entry[1].value, Path(entry[0].start_mark.name).parent))
    except ValueError as error:
        raise RecipeError(f"{at}: {error}") from None
    # `Path.is_file` raises an error for a name that is too long
    if not os.path.isfile(parent):
        raise RecipeError(f"{at}: no such file: {entry[1].value}")
    return _merge(_merged(parent, children), root)


def _copied(node: Any) -> Any:
    """Copy a node, so that changes stay local; an alias (`*a`) becomes a node of its own."""
    if isinstance(node, yaml.MappingNode):
        children: list[Any] = [(key, _copied(value)) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [_copied(item) for item in node.value]
    else:
        return node
    return type(node)(node.tag, children, node.start_mark, node.end_mark, node.flow_style)


def _entry(node: yaml.MappingNode, key: object) -> tuple[yaml.Node, yaml.Node] | None:
    return next(((k, v) for k, v in node.value if k.value == str(key)), None)


def _merge(base: yaml.MappingNode, over: yaml.MappingNode) -> yaml.MappingNode:
    entries = {key.value: (key, value) for key, value in base.value}
    for key, value in over.value:
        old = entries.get(key.value)
        if old and isinstance(old[1], yaml.MappingNode) and isinstance(value, yaml.MappingNode):
            value = _merge(old[1], value)
        entries[key.value] = (key, value)
    return yaml.MappingNode(
        over.tag, list(entries.values()), over.start_mark, over.end_mark, over.flow_style
    )


def _items(node: yaml.Node) -> list[yaml.Node]:
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _override(root: yaml.MappingNode, path: str, value: Any) -> None:
    mark = (
        value.start_mark
        if isinstance(value, yaml.Node)
        else yaml.Mark(COMMAND_LINE, 0, 0, 0, None, 0)
    )
    *steps, last = path.split(".")
    if len(steps) >= reading.DEEPEST:
        raise RecipeError(f"{place(mark)}: {dotted([path])}: no key lies as deep as that")
    node: yaml.Node = root
    for step in steps:
        if isinstance(node, yaml.SequenceNode):
            node = node.value[_position(node, step, path, mark)]
        elif isinstance(node, yaml.MappingNode):
            entry = _entry(node, step)
            # a value in the way, as in `teacher: null`, becomes a mapping
            if entry is None or not isinstance(entry[1], yaml.CollectionNode):
                entry = (_node_of(step, path, mark), _node_of({}, path, mark))
                node.value = [item for item in node.value if item[0].value != step] + [entry]
            node = entry[1]
    if isinstance(node, yaml.SequenceNode):
        node.value[_position(node, last, path, mark)] = _node_of(value, path, mark)
    elif isinstance(node, yaml.MappingNode):
        node.value = [(k, v) for k, v in node.value if k.value != last] + [
            (_node_of(last, path, mark), _node_of(value, path, mark))
        ]
    else:
        raise RecipeError(f"{place(mark)}: {dotted([path])}: leads into a value that has no keys")


def _node_of(data: Any, path: str, mark: yaml.Mark) -> yaml.Node:
    """Convert a value to a node with the place of the override."""
    if isinstance(data, yaml.Node):
        return cast("yaml.Node", _copied(data))
    at = f"{place(mark)}: {dotted([path])}"
    try:
        node = cast("yaml.Node", reading.compose(yaml.dump(data, Dumper=_Dumper), COMMAND_LINE))
    except yaml.representer.RepresenterError:
        raise RecipeError(f"{at}: no value of a recipe: {shown(data)}") from None
    # raised while dumping, before the reader's own limit is checked
    except RecursionError:
        raise RecipeError(
            f"{at}: lists and mappings are more than {reading.DEEPEST} deep"
        ) from None
    except RecipeError as error:
        raise RecipeError(f"{at}: {str(error).removeprefix(f'{COMMAND_LINE}: ')}") from None
    _mark(node, mark)
    return node


def _position(node: yaml.SequenceNode, step: str, path: str, mark: yaml.Mark) -> int:
    def called(item: yaml.Node) -> list[str]:
        if not isinstance(item, yaml.MappingNode):
            return []
        entries = [_entry(item, key) for key in ("name", "use")]
        values = [entry[1] for entry in entries if entry]
        return [str(value.value) for value in values if isinstance(value, yaml.ScalarNode)]

    # `isdecimal` alone takes digits of other scripts; `int` refuses numbers of thousands of digits
    if step.isascii() and step.isdecimal() and len(step) < 9 and int(step) < len(node.value):
        return int(step)
    matches = [i for i, item in enumerate(node.value) if step in called(item)]
    if len(matches) != 1:
        problem = "no item" if not matches else f"{len(matches)} items"
        items = ", ".join(
            f"{i} {shorten((called(item) or [''])[0], 40)}".rstrip()
            for i, item in enumerate(node.value[:20])
        )
        says = (
            f"{problem} called '{dotted([step])}' in a list of {len(node.value)}; there are"
            f" {items or 'none'}"
        )
        raise RecipeError(f"{place(mark)}: {dotted([path])}: {says}")
    return matches[0]


def _mark(node: yaml.Node, mark: yaml.Mark) -> None:
    node.start_mark = mark
    for child in reading.children(node):
        _mark(child, mark)
