"""Writes the files of the `report` command: one page that describes a study, and its figures for
other programs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from kdkit.errors import RunError
from kdkit.files import write_atomically
from kdkit.finite import to_json, without_nan
from kdkit.runs import pictures
from kdkit.runs.folder import RunFolder
from kdkit.spreadsheets import as_csv
from kdkit.study import intervals
from kdkit.study.findings import Findings, Variant
from kdkit.study.report import drawing, latex, mean_curves, page, predictions, sections
from kdkit.study.report.from_runs import of_runs
from kdkit.study.report.sections import Material
from kdkit.study.search import FOUND, Halved

STUDY = "study.json"
PICTURES, FIGURES = "report", "figures"  # folders: of the Markdown's pictures, of those for papers
Form = Literal["pdf", "svg", "png"]


@dataclass(frozen=True)
class Report:
    """The paths of the page and of all files, and what had to be left out, a phrase each."""

    page: Path
    files: tuple[Path, ...]
    missing: tuple[str, ...]


def write(
    paths: Sequence[Path],
    output: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    plugins: Sequence[Path] = (),
    say: Callable[[str], None] = lambda _: None,
    figures: Form | None = None,
) -> Report:
    """Write a study's report: `report.html`, `report.md` with its pictures, `report.csv` (a row
    a run), `report.tex` (the table of results) and `report.json` (all figures).

    Args:
        paths: a study's folder or its `study.json`; or run folders, or folders that hold some: the
            recipe of the first is the baseline.
        output: folder of the files (default: the study's; of runs, the one that holds the first).
        overrides: `data.` keys for the present location of the data.
        plugins: Python files and folders of the runs that may run; parts that need others are left
            out.
        say: called with messages about the progress.
        figures: format in which all pictures are written for papers, too (None: they are not).

    Raises:
        RunError: neither a study nor runs, or none of the runs is finished.
    """
    findings, home = gather(paths, plugins)
    material = read(findings, overrides or {}, plugins, say)
    if (home / FOUND).is_file():
        material = replace(material, search=Halved.load(home / FOUND))
    folder = output or home
    say("draws")
    document = sections.document(material)
    pictures = list(document.pictures)
    files = {f"{PICTURES}/{one.name}.png": drawing.png(one.figure) for one in pictures}
    if figures is not None:
        for one in pictures:
            files[f"{FIGURES}/{one.name}.{figures}"] = drawing.paper(one.figure, one.name, figures)
    files["report.md"] = page.markdown(document, PICTURES).encode()
    files["report.csv"] = table(findings).encode()
    files["report.tex"] = latex.table(findings).encode()
    files["report.json"] = (to_json(plain(material), indent=1) + "\n").encode()
    # Last in the order of writing: where it is, the pictures and figures are too.
    files["report.html"] = page.html(document).encode()
    # Before anything is written: a report is whole or not there.
    _refuse_foreign(folder, files)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, content)
    return Report(
        folder / "report.html", tuple(folder / name for name in files), tuple(material.missing)
    )


def _refuse_foreign(folder: Path, files: Iterable[str]) -> None:
    """Check that only files of a report are replaced.

    Raises:
        RunError: another file would be replaced, or a link leads the pictures elsewhere.
    """
    for name in (PICTURES, FIGURES):
        if (folder / name).is_symlink():
            raise RunError(
                f"{folder / name}: is a link, and pictures would be written where it leads; choose"
                " another --output"
            )
    there = [folder / name for name in files if (folder / name).exists()]
    try:
        # Only a report's own JSON has this key: its presence tells that the other files are a
        # report's too.
        known = "findings" in json.loads((folder / "report.json").read_text(encoding="utf-8"))
    # missing, or not a report's JSON
    except (OSError, ValueError, TypeError):
        known = False
    if there and not known:
        raise RunError(
            f"{there[0]}: is there already, and is no report of kdkit's; choose another --output,"
            " or move it away"
        )


def gather(paths: Sequence[Path], plugins: Sequence[Path] = ()) -> tuple[Findings, Path]:
    """Load or build the findings, and the folder to which they belong.

    Raises:
        RunError: neither a study nor runs.
    """
    file = paths[0] if paths[0].name == STUDY else paths[0] / STUDY
    # A folder may hold a study and its runs: the study, which knows more, comes first.
    if len(paths) == 1 and file.is_file():
        found = Findings.load(file)
        # which an older kdkit did not do
        found = replace(found, variants=intervals.corrected(found.variants))
        return _moved(found, file.parent), file.parent
    runs = [run for path in paths for run in _runs(path)]
    only = paths[0] if len(paths) == 1 and not (paths[0] / "run.json").is_file() else None
    return of_runs(runs, plugins), only or runs[0].parent


def _moved(findings: Findings, home: Path) -> Findings:
    """Update the run folders of findings that were moved together with their runs."""

    # Where they were is tried first: two copies of a study may exist.
    def place(folder: Path) -> Path:
        return (
            home / folder.name if not folder.is_dir() and (home / folder.name).is_dir() else folder
        )

    return replace(
        findings,
        variants=tuple(replace(v, folders=tuple(map(place, v.folders))) for v in findings.variants),
    )


def _runs(path: Path) -> list[Path]:
    """List the run folder itself, or those in it.

    Raises:
        RunError: there are none.
    """
    found = (
        [path]
        if (path / "run.json").is_file()
        else sorted(marker.parent for marker in path.glob("*/run.json"))
    )
    if not found:
        raise RunError(
            f"{path}: neither a study (it has no {STUDY}) nor a run folder (no run.json), and it"
            " holds no runs"
        )
    return found


def read(
    findings: Findings,
    overrides: Mapping[str, Any],
    plugins: Sequence[Path] = (),
    say: Callable[[str], None] = lambda _: None,
) -> Material:
    """Read all content of the report, from the run folders that exist."""
    # Runs may have been deleted since: what is left is told, and the rest as missing.
    there = {
        v.name: [folder for folder in v.folders if (folder / "run.json").is_file()]
        for v in findings.variants
    }
    followed = {name: mean_curves.read(folders) for name, folders in there.items()}
    recipes = {name: _recipe(folders[0]) for name, folders in there.items() if folders}
    answers = predictions.ask(findings, overrides, plugins, say)
    return Material(
        findings,
        followed,
        recipes,
        answers,
        made={name: _made(folders[0]) for name, folders in there.items() if folders},
    )


def _made(folder: Path) -> dict[str, bytes]:
    """Return the pictures of images that a run has made, by name."""
    found = {name: pictures.read(path) for name, path in pictures.drawn(folder).items()}
    return {name: png for name, png in found.items() if png is not None}


def _recipe(folder: Path) -> dict[str, Any]:
    return cast("dict[str, Any]", _seen_from_here(RunFolder(folder).plain_recipe()))


def _seen_from_here(value: Any) -> Any:
    """Make the paths of a recipe below the working directory relative to it, because a report is
    read on other machines too.
    """
    if isinstance(value, dict):
        return {key: _seen_from_here(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_seen_from_here(one) for one in value]
    return value.removeprefix(f"{Path.cwd()}/") if isinstance(value, str) else value


def table(findings: Findings) -> str:
    """Format a CSV table, one row a run, failed ones included."""
    rows = list(_rows(findings))
    # Variants may have other scores: a column for each that some run has.
    columns = dict.fromkeys(key for row in rows for key in row)
    return as_csv(list(columns), ([row.get(column) for column in columns] for row in rows))


def _rows(findings: Findings) -> Iterator[dict[str, Any]]:
    for variant in findings.variants:
        about = {
            "study": findings.name,
            "variant": variant.name,
            "baseline": variant.name == findings.baseline,
        }
        for i, (seed, folder) in enumerate(zip(variant.seeds, variant.folders, strict=True)):
            scores = {
                f"{part}.{key}": values[i]
                for part in ("last", "validation", "best")
                for key, values in getattr(variant, part).items()
                if i < len(values)
            }
            yield {
                **about,
                "seed": seed,
                "folder": folder,
                "failure": "",
                **scores,
                **_length(variant),
                **_spent(folder),
            }
        yield from (
            {**about, "seed": seed, "folder": "", "failure": reason}
            for seed, reason in variant.failures.items()
        )


def _length(variant: Variant) -> dict[str, int]:
    return (
        {"steps": variant.length.steps, "images": variant.length.images} if variant.length else {}
    )


def _spent(folder: Path) -> dict[str, float]:
    result = RunFolder(folder).result()
    return (
        {"epochs": result.epochs, "seconds": result.seconds, "cpu_seconds": result.cpu_seconds}
        if result
        else {}
    )


def plain(material: Material) -> dict[str, Any]:
    """Return everything that the page draws or states, as plain data."""
    said = material.answers
    found: dict[str, Any] = without_nan(
        {
            "findings": asdict(material.findings),
            "search": asdict(material.search) if material.search else None,
            "courses": {name: asdict(one) for name, one in material.courses.items()},
            "recipes": material.recipes,
            "classes": said.classes,
            "class_accuracy": {name: said.class_accuracy(name).tolist() for name in said.students},
            "confusion": {
                name: {seed: predictions.confusion(found).tolist() for seed, found in seeds.items()}
                for name, seeds in said.students.items()
            },
            "examples": [
                {"index": one.index, "label": one.label, "logits": one.logits.tolist()}
                for one in said.examples
            ],
            "similar_layers": {
                name: {
                    "teacher": one.rows,
                    "student": one.columns,
                    "cka": one.values.tolist(),
                    "images": one.images,
                }
                for name, one in said.alike.items()
            },
            "missing": material.missing,
        }
    )
    return found
