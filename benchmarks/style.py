"""How code is written, in figures: kdkit's core and plugins beside packages that are installed.

Prints a table in Markdown: files, lines, statements and how dense they are, sizes of functions,
long lines, comments. Nothing is imported: the files of the packages are parsed.

    pip install pluggy llm lightning-fabric
    python benchmarks/style.py --beside pluggy llm lightning_fabric
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import io
import statistics
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONG = 100
COLUMNS = (
    "package",
    "files",
    "lines",
    "statements a module: median, max",
    "statements a function: p90, max",
    "AST nodes a statement",
    f"lines > {LONG} %",
    "parallel assignments of 3 and more",
    "comments %",
    "docstrings %",
)


@dataclass(frozen=True)
class Module:
    """What one file comes to; `functions` has the statements of each."""

    lines: int
    long_lines: int
    statements: int
    nodes: int
    parallel: int
    comments: int
    docstrings: int
    functions: tuple[int, ...]


def read(file: Path) -> Module:
    """Count one file."""
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    lines = text.splitlines()
    statements = [node for node in ast.walk(tree) if is_counted(node)]
    return Module(
        lines=len(lines),
        long_lines=sum(len(line) > LONG for line in lines),
        statements=len(statements),
        nodes=sum(1 for _ in ast.walk(tree)) - sum(1 for _ in parts_of_docstrings(tree)),
        parallel=sum(assigned_together(node) >= 3 for node in statements),
        comments=len(lines_of_comments(text)),
        docstrings=sum(end - start + 1 for start, end in docstrings(tree)),
        functions=tuple(
            sum(is_counted(node) for node in ast.walk(function)) - 1
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        ),
    )


def is_counted(node: ast.AST) -> bool:
    """Whether it is a statement; docstrings are none."""
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return isinstance(node, ast.stmt) and not is_text


def assigned_together(node: ast.AST) -> int:
    """How many names one assignment of a tuple display gives values."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return 0
    target = node.targets[0]
    return len(target.elts) if isinstance(target, ast.Tuple) else 0


def docstrings(tree: ast.Module) -> Iterator[tuple[int, int]]:
    """First and last line of each string that stands as a statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.lineno, node.end_lineno or node.lineno


def parts_of_docstrings(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield from ast.walk(node)


def lines_of_comments(text: str) -> set[int]:
    """The lines that have a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {token.start[0] for token in tokens if token.type == tokenize.COMMENT}


def row(name: str, files: Sequence[Path]) -> list[str]:
    """The line of one package."""
    modules = [read(file) for file in files]
    lines = sum(module.lines for module in modules)
    statements = sum(module.statements for module in modules)
    sizes = [module.statements for module in modules]
    functions = sorted(size for module in modules for size in module.functions)
    p90 = functions[int(0.9 * (len(functions) - 1))] if functions else 0
    return [
        name,
        f"{len(modules)}",
        f"{lines:,}",
        f"{statistics.median(sizes):.0f}, {max(sizes)}",
        f"{p90}, {functions[-1] if functions else 0}",
        f"{sum(module.nodes for module in modules) / statements:.1f}",
        f"{100 * sum(module.long_lines for module in modules) / lines:.1f}",
        f"{sum(module.parallel for module in modules)}",
        f"{100 * sum(module.comments for module in modules) / lines:.1f}",
        f"{100 * sum(module.docstrings for module in modules) / lines:.1f}",
    ]


def files_of(package: str) -> list[Path]:
    """The Python files of an installed package; tests and vendored code are left out."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package}: no package of that name is installed")
    root = Path(next(iter(spec.submodule_search_locations)))
    left_out = {"tests", "test", "_vendor", "vendor"}
    return [p for p in sorted(root.rglob("*.py")) if not left_out & set(p.relative_to(root).parts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--beside", nargs="*", default=["pluggy"], help="installed packages")
    parser.add_argument("--largest", type=int, default=0, help="also list so many largest modules")
    options = parser.parse_args()
    own = {name: sorted((ROOT / name).rglob("*.py")) for name in ("kdkit", "plugins")}
    rows = [row(name, files) for name, files in own.items()]
    rows += [row(name, files_of(name)) for name in options.beside]
    for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows):
        print(f"| {' | '.join(cells)} |")
    largest = sorted(
        ((read(p).statements, p) for files in own.values() for p in files), reverse=True
    )
    for statements, path in largest[: options.largest]:
        print(f"{statements:5}  {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
