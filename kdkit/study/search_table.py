"""Formats a search for a terminal and for the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from kdkit.study.finder import about
from kdkit.study.findings import rank
from kdkit.study.search import Halved
from kdkit.study.search_plan import Search, steps_until


def planned(wanted: Search) -> Iterator[Table | str]:
    """Yield the candidates of a search, its rungs, and its steps against those of the full grid."""
    lengths = wanted.check()
    candidates = Table("candidate", "what it is", box=None, pad_edge=False)
    for name, recipe in wanted.study.variants.items():
        candidates.add_row(name, about(recipe))
    yield candidates
    rungs = Table("rung", "until epoch", "candidates", "steps", box=None, pad_edge=False)
    longest = max(lengths.values(), key=lambda length: length.steps)
    before, total, seeds = 0, 0, len(wanted.study.seeds)
    for number, rung in enumerate(wanted.plan(lengths), 1):
        done = steps_until(rung.epochs, longest)
        steps = (done - before) * rung.candidates * seeds
        before, total = done, total + steps
        rungs.add_row(str(number), str(rung.epochs), str(rung.candidates), f"{steps:,}")
    yield rungs
    whole = sum(length.steps for length in lengths.values()) * seeds
    yield f"{_seeds(wanted.study.seeds)} search, {_seeds(wanted.confirm)} measure the winner."
    yield f"{_cost(total, whole)}."


def header(found: Halved) -> list[str]:
    """Title the columns of `rows`."""
    return ["candidate", *(f"epoch {rung.epochs}" for rung in found.rungs), ""]


def rows(found: Halved) -> list[list[str]]:
    """List the candidates: those that came furthest first, of a rung the best first."""
    told = []
    for name in sorted(found.candidates, key=lambda name: _order(found, name), reverse=True):
        scores = [
            found.score.number(rung.scores[name])
            if name in rung.scores
            else "failed"
            if name in rung.failures
            else ""
            for rung in found.rungs
        ]
        told.append([name, *scores, "chosen" if name == found.winner else ""])
    return told


def _order(found: Halved, name: str) -> tuple[bool, int, float]:
    reached = [rung.scores[name] for rung in found.rungs if name in rung.scores]
    score = rank(found.score, reached[-1:]) if reached else 0.0
    return name == found.winner, len(reached), score


def table(found: Halved) -> Table:
    """Build the table of a finished search."""
    made = Table(box=None, pad_edge=False)
    first, *others = header(found)
    made.add_column(first)
    for title in others:
        made.add_column(title, justify="right", no_wrap=True)
    for row in rows(found):
        made.add_row(*row)
    return made


def sentences(found: Halved) -> Iterator[str]:
    """Yield what was searched, by which score, and what it cost."""
    yield (
        f"{len(found.candidates):,} candidates, by {found.score.title} on validation data,"
        f" {_seeds(found.seeds)}; those that stay behind are not trained further"
    )
    yield _cost(found.steps, found.whole)
    for rung in found.rungs:
        yield from (f"Failed: {name}: {reason}" for name, reason in rung.failures.items())
    yield f"Chosen: {found.winner}"


def _cost(steps: int, whole: int) -> str:
    return f"{steps:,} steps, {steps / whole:.0%} of the {whole:,} of the full grid"


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
