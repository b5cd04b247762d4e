"""Writes a report as one page for a browser, or as Markdown with its pictures beside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator

from markupsafe import Markup, escape

from kdkit.study.report.document import (
    Block,
    Document,
    Facts,
    Figures,
    Forest,
    Picture,
    Pictures,
    Words,
)
from kdkit.study.report.drawing import inline, png

TEMPLATE = "page.html.jinja"
PIXELS = 110  # screen pixels per inch of a picture
SHRUNK = 0.6
# Characters that Markdown, or GitHub's dialect of it, would take for a mark.
SIGNS = re.compile(r"([\\`*_{}\[\]<>|#~$])")


def html(document: Document) -> str:
    """Write one self-contained page: style and pictures are inside, all text is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("kdkit.study", "report"),
        autoescape=True,
        # A misspelt name in the template is an error, not an empty place on the page.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"drawn": drawn, "breakable": breakable}
    return environment.get_template(TEMPLATE).render(document=document)


def drawn(picture: Picture) -> Markup:
    """Return the element of a picture: lines as SVG, photographs as PNG."""
    pixels = round(picture.figure.get_figwidth() * PIXELS)
    if picture.photo:
        data = base64.b64encode(png(picture.figure)).decode()
        return Markup('<img src="data:image/png;base64,{}" width="{}" alt="{}">').format(
            data, pixels, picture.alt
        )
    element = inline(picture.figure, picture.name)
    head, _, rest = element.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None  # matplotlib's SVG has one
    # A narrow screen shrinks it, but not until its numbers cannot be read: it is scrolled then.
    least = round(SHRUNK * pixels) if picture.wide else 0
    start = Markup('<svg {} width="{}" style="min-width:{}px" role="img" aria-label="{}">').format(
        Markup(box[0]), pixels, least, picture.alt
    )
    return start + Markup(rest)


def breakable(name: str) -> Markup:
    """Let a name be broken after its signs only, not within a word."""
    return Markup(re.sub(r"([_./-])", r"\1<wbr>", str(escape(name))))


def markdown(document: Document, pictures: str) -> str:
    """Write the report as Markdown.

    Args:
        document: the report.
        pictures: folder of their files, relative to the page.
    """
    parts = [f"# {escaped(document.title)}", escaped(document.question)]
    parts += [
        f"**{escaped(text)}**" if i == 0 else escaped(text)
        for i, text in enumerate(document.answer)
    ]
    for section in document.sections:
        parts.append(f"## {escaped(section.title)}")
        for block in section.blocks:
            parts += _block(document, block, pictures)
    return "\n\n".join(part for part in parts if part) + "\n"


def _block(document: Document, block: Block, pictures: str) -> Iterator[str]:
    if isinstance(block, Words):
        yield escaped(block.text)
    elif isinstance(block, Facts):
        yield "\n".join(f"- {escaped(title)}: {escaped(text)}" for title, text in block.pairs)
    elif isinstance(block, Figures):
        yield f"{escaped(block.folded)}:" if block.folded else ""
        yield _table(block)
        yield escaped(block.caption)
    elif isinstance(block, Pictures | Forest):
        head = f"**Figure {document.number(block)}. {escaped(block.title)}.**"
        yield f"{head} {escaped(block.caption)}".strip()
        yield from (f"![{escaped(one.alt)}]({pictures}/{one.name}.png)" for one in block.pictures)
    else:
        # Longer than any run of backticks in the text, which would end the block.
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
        yield f"{escaped(block.title)}:"
        yield f"{fence}text\n{block.text.rstrip()}\n{fence}"


def _table(block: Figures) -> str:
    lines = [block.header, [":--", *("--:" for _ in block.header[1:])], *block.rows]
    return "\n".join(
        # Line 1 is the rule between head and body, whose colons and dashes must stay.
        f"| {' | '.join(cell if i == 1 else escaped(cell) for cell in line)} |"
        for i, line in enumerate(lines)
    )


def escaped(text: str) -> str:
    """Escape a text for Markdown, on one line."""
    return SIGNS.sub(r"\\\1", " ".join(text.split()))
