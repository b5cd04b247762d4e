"""Reads a small subset of YAML, within limits, into nodes that know their place.

Supported: text, whole and decimal numbers, true and false, null, lists, and mappings whose keys are
words. Dates are text.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, cast

import yaml

from kdkit.contracts.options import LARGEST_INT, Text
from kdkit.errors import RecipeError, dotted, one_line, shorten, shown

COMMAND_LINE = "override"

LARGEST_FILE = 1_000_000
"""Maximum size of a file in bytes."""
MOST_NODES = 50_000
"""Maximum number of values and keys in a file, counted again for each alias."""
DEEPEST = 32
"""Maximum nesting of lists and mappings."""

_TAG = "tag:yaml.org,2002:"
# control characters but for tab, line feed and next line (0x85), and lone surrogates
_STRANGE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")


class _Composer(yaml.SafeLoader):
    """Composes nodes, and refuses YAML features that no recipe needs as soon as they occur.

    Numbers and booleans are those of YAML 1.2: `5e-4` is a float, `no` and `off` are words.
    """

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name
        self._depth = 0
        # for each finished node: its number of nodes, and its depth
        self._sizes: dict[yaml.Node, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        self._depth += 1
        if self._depth > DEEPEST:
            raise _refused(f"lists and mappings are more than {DEEPEST} deep", event.start_mark)
        self._check_tag(event)
        node = super().compose_node(parent, index)
        assert node is not None
        self._depth -= 1
        if node not in self._sizes:
            # refers to an unfinished node, so it is recursive
            if isinstance(event, yaml.AliasEvent):
                raise _refused("contains itself", event.start_mark)
            self._sizes[node] = self._measured(node)
        size, depth = self._sizes[node]
        # aliases of aliases multiply, though the text and the number of nodes stay small
        if size > MOST_NODES or len(self._sizes) > MOST_NODES:
            raise _refused(f"more than {MOST_NODES:,} values in one file", event.start_mark)
        if self._depth + depth > DEEPEST:
            raise _refused(f"lists and mappings are more than {DEEPEST} deep", event.start_mark)
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node: yaml.ScalarNode = super().compose_scalar_node(anchor)
        if strange := _STRANGE.search(node.value):
            raise _refused(
                f"holds {strange.group().encode('unicode_escape').decode()}, a control character",
                node.start_mark,
            )
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refused("a key is a word", key.start_mark)
        node.value = [
            *self._merged(node),
            *((key, value) for key, value in node.value if key.tag != f"{_TAG}merge"),
        ]
        # PyYAML keeps the last of two equal keys without a word
        first: dict[str, int] = {}
        for key, _ in node.value:
            if key.value in first:
                says = f"{dotted([key.value])}: is given twice (first on line {first[key.value]})"
                raise _refused(says, key.start_mark)
            first[key.value] = key.start_mark.line + 1
        return node

    def _merged(self, node: yaml.MappingNode) -> list[tuple[yaml.Node, yaml.Node]]:
        """Return the items that `<<: *other` adds: those of keys that the mapping itself lacks."""
        items: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        own = {key.value for key, _ in node.value}
        for key, value in node.value:
            others = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for other in others if key.tag == f"{_TAG}merge" else ():
                if not isinstance(other, yaml.MappingNode):
                    raise _refused("<<: takes a mapping, or a list of mappings", key.start_mark)
                # of several mappings the first one wins, as in YAML 1.1
                items = {**{k.value: (k, v) for k, v in other.value if k.value not in own}, **items}
        return list(items.values())

    def _measured(self, node: yaml.Node) -> tuple[int, int]:
        sizes = [self._sizes[child] for child in children(node)]
        depth = max((depth for _, depth in sizes), default=-1)
        return 1 + sum(size for size, _ in sizes), 1 + depth

    def _check_tag(self, event: yaml.Event) -> None:
        tag = getattr(event, "tag", None)
        # explicit tags are allowed for numbers, and `!!str` for anything
        if isinstance(event, yaml.ScalarEvent):
            usual = {f"{_TAG}str", self.resolve(yaml.ScalarNode, event.value, (True, False))}  # type: ignore[no-untyped-call]
        else:
            usual = {f"{_TAG}seq" if isinstance(event, yaml.SequenceStartEvent) else f"{_TAG}map"}
        if tag not in (None, "!", *usual):
            name = shorten(str(tag).replace(_TAG, "!!"))
            raise _refused(
                f"{name}: values have no tags here; leave it out, and write text in quotes",
                event.start_mark,
            )


def children(node: yaml.Node) -> list[yaml.Node]:
    """List the nodes in a node: items of a list, keys and values of a mapping."""
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    # what YAML 1.2 reads otherwise: `no` as a word, a date as text
    left_out = {f"{_TAG}{kind}" for kind in ("bool", "timestamp", "value")}
    known = yaml.SafeLoader.yaml_implicit_resolvers.items()
    return {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in left_out]
        for first, resolvers in known
    }


_Composer.yaml_implicit_resolvers = _resolvers()
_Composer.add_implicit_resolver(f"{_TAG}bool", re.compile(r"true|True|false|False"), list("tTfF"))
# in YAML 1.1 a number needs a dot and a signed exponent, so that PyYAML reads `5e-4` as text
_Composer.add_implicit_resolver(
    f"{_TAG}float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def read(path: Path) -> yaml.MappingNode:
    """Read the mapping in a file; it is shared, so it must not be changed.

    Raises:
        RecipeError: it cannot be read, is no YAML, or no mapping.
    """
    name = seen_from_here(str(path))
    try:
        # one byte more than allowed, so that a larger file is noticed but not read
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        text = content.decode()
    except OSError as error:
        raise RecipeError(f"{name}: {error.strerror}") from None
    except ValueError as error:  # UnicodeDecodeError is one
        says = "is not UTF-8 text" if isinstance(error, UnicodeError) else error
        raise RecipeError(f"{name}: {says}") from None
    if len(content) > LARGEST_FILE:
        raise RecipeError(f"{name}: is larger than {LARGEST_FILE:,} bytes, which no recipe is")
    root = _composed(text, str(path))
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(f"{name}:1: a recipe is a mapping of keys, such as `name: first`")
    return root


# the variants of a study extend the same files
@functools.lru_cache(maxsize=64)
def _composed(text: str, name: str) -> yaml.Node | None:
    return compose(text, name)


def compose(text: str, name: str) -> yaml.Node | None:
    """Compose the node of a text; None if the text is empty.

    Args:
        text: YAML.
        name: of its file, or `COMMAND_LINE`.

    Raises:
        RecipeError: in one line, with the place.
    """
    if len(text) > LARGEST_FILE:
        raise RecipeError(f"{name}: is longer than {LARGEST_FILE:,} characters")
    try:
        composer = _Composer(text, name)
        try:
            return composer.get_single_node()
        finally:
            composer.dispose()
    except yaml.YAMLError as error:
        raise RecipeError(_told(error, text, name)) from None
    except (ValueError, OverflowError):  # of PyYAML itself
        raise RecipeError(f"{name}: holds an escape or a number that means nothing") from None


def value(node: yaml.Node, location: tuple[str | int, ...] = ()) -> Any:
    """Convert a node to plain values; text remembers the folder of its file.

    Raises:
        RecipeError: a number is too large.
    """
    if isinstance(node, yaml.MappingNode):
        return {key.value: value(item, (*location, key.value)) for key, item in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [value(item, (*location, number)) for number, item in enumerate(node.value)]
    return _scalar(cast("yaml.ScalarNode", node), location)


def _scalar(node: yaml.ScalarNode, location: tuple[str | int, ...]) -> Any:
    kind = node.tag.removeprefix(_TAG)
    if kind == "null":
        return None
    if kind == "bool":
        return node.value.lower() == "true"
    if kind in ("int", "float"):
        try:
            loader = yaml.SafeLoader("")
            construct = loader.construct_yaml_int if kind == "int" else loader.construct_yaml_float
            number = construct(node)
        # too many digits for Python's conversion: treat the number as too large
        except (ValueError, OverflowError, IndexError):
            number = LARGEST_INT + 1
        if isinstance(number, int) and abs(number) > LARGEST_INT:
            where = place(node.start_mark)
            where += f": {dotted(location)}" if location else ""
            raise RecipeError(
                f"{where}: {shorten(node.value, 40)} is too large, or is no number; write text in"
                " quotes"
            )
        return number
    name = node.start_mark.name
    return Text.of(node.value, Path.cwd() if name == COMMAND_LINE else Path(name).parent)


def place(mark: yaml.Mark) -> str:
    """Format a place as `file:line`, or as the command line."""
    if mark.name == COMMAND_LINE:
        return COMMAND_LINE
    return f"{seen_from_here(mark.name)}:{mark.line + 1}"


def seen_from_here(name: str) -> str:
    """Return a path relative to the current folder if it lies below that."""
    path = Path(name)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else name


def _refused(says: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=says, problem_mark=mark)


def _told(error: yaml.YAMLError, text: str, name: str) -> str:
    # the only error without a mark: it is found before the text is divided into lines
    if isinstance(error, yaml.reader.ReaderError):
        mark = yaml.Mark(name, 0, text.count("\n", 0, error.position), 0, None, 0)
        return (
            f"{place(mark)}: holds {shown(chr(error.character))}, a character that no text file has"
        )
    assert isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None
    problem, mark = str(error.problem or error.context), error.problem_mark
    says = next(
        (words for begin, words in _IN_PLAIN_WORDS.items() if problem.startswith(begin)), problem
    )
    # a missing bracket is noticed at the end of the file; its beginning is more of a help
    begins = error.context_mark
    if begins is not None and says.startswith(_UNCLOSED):
        mark = begins
    if begins is not None and "{line}" in says:
        says = says.format(line=begins.line + 1)
    return f"{place(mark)}: {one_line(says)}"


_UNCLOSED = "what is opened here is not closed"
_IN_PLAIN_WORDS = {  # by the beginning of PyYAML's message
    "found character '\\t'": "a tab, which cannot indent YAML: use spaces",
    "found character": "begins with a character that has a meaning in YAML: write text in quotes",
    "could not find expected ':'": (
        "a line that is no `key: value`; is the `:` missing, or the space behind it?"
    ),
    "mapping values are not allowed": (
        "a `:` where none can be: is the line above no `key: value`, or this one indented too far?"
    ),
    "sequence entries are not allowed": (
        "a `- ` where no list can begin; put it on a line of its own, below its key"
    ),
    "mapping keys are not allowed": "a `? ` where no key can begin; write text in quotes",
    "found unexpected end of stream": f"{_UNCLOSED}: a quote is missing",
    "found unexpected document separator": f"{_UNCLOSED}: a quote is missing",
    "found unknown escape character": "an unknown escape; in single quotes a `\\` is just that",
    "expected escape sequence": "an escape is too short; in single quotes a `\\` is just that",
    "expected alphabetic or numeric": (
        "begins with a character that has a meaning in YAML: write text in quotes"
    ),
    "expected <block end>, but found '<block": (
        "is indented otherwise than what it belongs to, which begins on line {line}"
    ),
    "expected <block end>, but found": (
        "does not belong to what begins on line {line}; is it indented otherwise, or is a quote"
        " missing?"
    ),
    "expected ',' or ']'": f"{_UNCLOSED}: a `]` or a `,` is missing",
    "expected ',' or '}'": f"{_UNCLOSED}: a `}}` or a `,` is missing",
    "expected the node content": "a value is missing before this",
    "expected '<document start>'": (
        "does not belong to the mapping above; is it indented otherwise?"
    ),
    "but found another document": "a second document (`---`) begins, and a file holds one",
    "found undefined alias": (
        "a `*name` without the `&name` that it stands for; write text in quotes"
    ),
    "found duplicate anchor": "a second `&name` of one name",
    "second occurrence": "a second `&name` of one name",
    "expected a comment or a line break": (
        "text behind a `|` or `>`: write it on the next line, or in quotes"
    ),
    "expected chomping or indentation": (
        "text behind a `|` or `>`: write it on the next line, or in quotes"
    ),
}
