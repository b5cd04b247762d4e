"""Hooks of mkdocs: they make a site of what is there.

Navigation follows the lists of docs/README.md. A file of the repository that a page links to, such
as a recipe or a plugin, becomes a page too; the links are bent to it.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
REPOSITORY = "repository"  # folder of the pages that are made of files outside of docs
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)(#[^)\s]*)?(?=\))")
HEADED = re.compile(r"^\*\*([^*]+)\*\*", re.MULTILINE)
LISTED = re.compile(r"^- \[([^\]]+)\]\(([^)]+)\)", re.MULTILINE)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".json": "json"}


def on_config(config: MkDocsConfig) -> None:
    """Take the navigation from docs/README.md: each bold heading with its list is a tab."""
    text = (DOCS / "README.md").read_text(encoding="utf-8")
    _, *parts = HEADED.split(text)
    tabs = [
        {name: [{title: page} for title, page in LISTED.findall(part)]}
        for name, part in zip(parts[::2], parts[1::2], strict=True)
    ]
    config.nav = [{"Home": "README.md"}, {"Overview": uri_of(ROOT / "README.md")}, *tabs]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add a page for each file outside of docs that a page links to, and so on from there."""
    pages = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    coming = [ROOT / "README.md", *(linked for page in pages for linked in targets(page))]
    added: set[Path] = set()
    while coming:
        path = coming.pop()
        if path not in added and not path.is_relative_to(DOCS):
            added.add(path)
            file = File.generated(config, uri_of(path), content=content(path))
            file.inclusion = InclusionLevel.NOT_IN_NAV
            files.append(file)
            coming += targets(path)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Bend the links that lead out of docs."""
    uri = page.file.src_uri
    made = uri.startswith(f"{REPOSITORY}/")
    folder = (ROOT / uri.removeprefix(f"{REPOSITORY}/") if made else DOCS / uri).parent

    def bent(link: re.Match[str]) -> str:
        path = resolved(folder, link[1])
        if path is None or (not made and path.is_relative_to(DOCS)):
            return link[0]
        return posixpath.relpath(uri_of(path), posixpath.dirname(uri)) + (link[2] or "")

    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(bent, part) for part in parts[::2]]
    return "".join(parts)


def targets(page: Path) -> Iterator[Path]:
    """Yield what a page of Markdown links to, and for a folder what is in it."""
    if page.is_dir():
        yield from listed(page)
    elif page.suffix == ".md":
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        found = (resolved(page.parent, link[1]) for link in LINK.finditer(text))
        yield from (path for path in found if path is not None)


def resolved(folder: Path, link: str) -> Path | None:
    """Return the file or folder of the repository that a link leads to; None if there is none."""
    path = Path(os.path.normpath(folder / link))
    return path if path.is_relative_to(ROOT) and path.exists() else None


def uri_of(path: Path) -> str:
    """Return the page of a file or folder."""
    if path.is_relative_to(DOCS):
        return "README.md" if path.is_dir() else path.relative_to(DOCS).as_posix()
    place = f"{REPOSITORY}/{path.relative_to(ROOT).as_posix()}"
    return (
        f"{place}/index.md" if path.is_dir() else place if path.suffix == ".md" else f"{place}.md"
    )


def content(path: Path) -> str:
    """Return the page of a file or folder outside of docs, as Markdown."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        lines = [f"- [{inside.name}]({inside.name})" for inside in listed(path)]
        return "\n".join([f"# {name}", "", *lines, ""])
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    unsearched = (
        "---\nsearch: {exclude: true}\n---\n"  # words of code would hide those of the guides
    )
    return (
        f"{unsearched}# {name}\n\n```{LANGUAGES.get(path.suffix, 'text')}\n{text.rstrip()}\n```\n"
    )


def listed(folder: Path) -> list[Path]:
    """Return the files of a folder that have pages, and its folders."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.name[0] not in "._" and (path.is_dir() or path.suffix in {*LANGUAGES, ".md"})
    )
