"""A console for untrusted text: nothing in it is taken for markup or control sequences."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text


class Terminal(Console):
    """Shows text letter by letter, control characters as escapes such as `\\x1b`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        # again here: a `Text`, as in the cells of a table, does not pass `render_str`
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def printable(text: str) -> str:
    """Escape a text, of any number of lines, so that it is safe to print."""
    return "".join(
        sign if sign == "\n" or sign.isprintable() else ascii(sign)[1:-1] for sign in text
    )
