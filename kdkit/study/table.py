"""Formats the findings of a study for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from kdkit.contracts.task import ScoreInfo
from kdkit.recipe.fairness import short, unequal
from kdkit.study.finder import about, after_search
from kdkit.study.findings import LOSSES, Findings, Length, Teacher, Variant
from kdkit.study.intervals import gained, p_value_shown, shown, spread
from kdkit.study.lockstep import passes
from kdkit.study.plan import StudyRun, check, trainings
from kdkit.study.sentences import (
    search,
    teacher_trained,
    trained,
    training_data,
    verdicts,
)
from kdkit.study.variants import Study
from kdkit.units import hundredths, with_unit

# title, of a variant, of the teacher
Cells = tuple[str, Callable[[Variant], str], Callable[[Teacher], str]]


def tables(found: Findings, width: int = 160, show: Sequence[str] = ()) -> list[Table]:
    """Build tables of results, further scores (`show`: their names) and costs: the fewest tables
    that fit the width of the terminal.
    """
    told = {one.name: one for one in (*found.scores, *found.agreement)} | LOSSES
    results = list(_results(found))
    further = [_last(told[name]) for name in show if name in told]
    costs = [*_lengths(found), *_costs(found.teacher)]
    made: list[Table] = []
    # From one wide table to three narrow ones: the first that fits is taken, else the last.
    for parts in (
        [[*results, *further, *costs]],
        [[*results, *further], costs],
        [results, further, costs],
    ):
        made = [_table(found, columns) for columns in parts if columns]
        # Measured on a console that cuts nothing off.
        if all(Console(width=10_000).measure(one).maximum <= width for one in made):
            break
    return made


def caption(found: Findings) -> Iterator[str]:
    """Yield lines that explain the figures, the failures, and the total cost."""
    # Without 0: a variant that failed altogether is told below.
    counts = sorted({len(variant.seeds) for variant in found.variants} - {0})
    if counts == [1]:
        seeds = "one seed, so no deviation and no interval"
    elif counts:
        seeds = f"{'-'.join(map(str, counts))} seeds, mean +- standard deviation"
    else:
        seeds = "no run is finished"
    parts = [f"Test data, {found.moment}; {seeds}"]
    if any(variant.difference for variant in found.variants):
        # One seed has a difference, but no interval.
        level = (
            " [95 % interval by t]"
            if any(v.difference and v.difference.t for v in found.variants)
            else ""
        )
        parts.append(f"difference to {found.baseline}, seed by seed{level}")
    if any(
        variant.difference and variant.difference.p_holm is not None for variant in found.variants
    ):
        parts.append(
            "p: of that difference by the paired t distribution, corrected for the number of"
            " variants by Holm's method"
        )
    if any(variant.best for variant in found.variants):
        parts.append("best: test data at the epoch that is best on validation")
    for score in _agreement(found):
        whose = "the" if found.teacher else "each variant's own"
        parts.append(f"{score.title}: compared with {whose} teacher")
    yield "; ".join(parts) + "."
    for sentence in (verdicts(found), training_data(found), *search(found)):
        if sentence:
            yield f"{sentence}."
    yield (
        "Costs of one run: optimizer steps of all its stages, the images that they show, each as"
        " often as it comes (x: times the baseline's); training time as it would take alone,"
        " processor time, largest memory of a step, images per second; network as exported:"
        " multiply-accumulates and median latency of one image on one thread."
    )
    for variant in found.variants:
        yield from (
            f"failed: {variant.name}, seed {seed}: {reason}"
            for seed, reason in variant.failures.items()
        )
    spent = found.together
    yield (
        f"Together: {spent['trained']:.0f} runs trained for this study, their teachers included, in"
        f" {spent['wall']:,.0f} s and {spent['cpu']:,.0f} s of the processor; {spent['reused']:.0f}"
        " taken from elsewhere."
    )


def planned(study: Study, max_parallel: int | None = None) -> Iterator[Table | str]:
    """Yield the runs of a study, their lengths, the differences of its variants, and the remaining
    work.
    """
    lengths = check(study)
    if study.tune:
        searching = trainings(study.search)
        yield _planned(study.search, searching, {}, study.tune)
        # Which points are chosen is not known before the search is finished.
        if not all(each.result for each in searching):
            seeds = _seeds(study.seeds)
            yield _left(searching, {}, max_parallel)
            yield (
                f"Each variant then trains with {seeds} at its point that is best on validation;"
                f" the longest takes: {_longest(lengths)}"
            )
            return
        # The search is finished, so that the chosen values are known.
        study, _ = after_search(study, searching)
    runs = trainings(study)
    yield _planned(study, runs, lengths)
    yield _left(runs, lengths, max_parallel)


def _left(runs: Sequence[StudyRun], lengths: Mapping[str, Length], max_parallel: int | None) -> str:
    """Describe the remaining training in runs, passes, and, if the lengths are known, steps and
    images.
    """
    # Equal variants share a folder, and are trained once.
    left = list({each.folder: each for each in runs if each.result is None}.values())
    every = len({each.folder for each in runs})
    told = f"{every} runs: {every - len(left)} trained already, {len(left)} to train"
    if not left:
        return f"{told}."
    count = len(passes([each.recipe for each in left], max_parallel))
    told += f" in {_count_of(count, 'pass', 'passes')} (runs of a pass are side by side)"
    if not lengths:
        return f"{told}."
    steps, images = (
        sum(getattr(lengths[each.variant], key) for each in left) for key in ("steps", "images")
    )
    # Runs with a teacher are told apart, as most of their time is shared in a pass.
    taught = sum(lengths[each.variant].images for each in left if each.recipe.spec.all_teachers())
    shared = (
        f", {taught:,} of them with a teacher, which answers once for all runs of a pass"
        if taught
        else ""
    )
    return f"{told}: {steps:,} steps, {images:,} images{shared}."


def _count_of(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _longest(lengths: Mapping[str, Length]) -> str:
    return ", ".join(f"{name} {one.steps:,} steps" for name, one in lengths.items())


def _planned(
    study: Study, runs: Sequence[StudyRun], lengths: Mapping[str, Length], named: Iterable[str] = ()
) -> Table:
    """Build a table with a row for each variant; differences in keys that are part of its name are
    left out.
    """
    columns = (
        "variant",
        "trained",
        "to train",
        *(["steps", "images"] if lengths else []),
        "what it is",
    )
    table = Table(*columns, box=None, pad_edge=False)
    told = {name: about(recipe) for name, recipe in study.variants.items()}
    for other in unequal(study.variants, study.baseline, tuple(named)):
        value, known = short(other.value), short(other.baseline)
        told[other.variant] += f"; {other.key} {value} ({study.baseline}: {known})"
    for name in study.variants:
        done, left = (
            [each.seed for each in runs if each.variant == name and bool(each.result) is state]
            for state in (True, False)
        )
        length = [f"{lengths[name].steps:,}", f"{lengths[name].images:,}"] if lengths else []
        table.add_row(name, _seeds(done), _seeds(left), *length, told[name])
    return table


def _seeds(numbers: Sequence[int]) -> str:
    return (
        f"seeds {', '.join(map(str, numbers))}"
        if len(numbers) > 1
        else f"seed {numbers[0]}"
        if numbers
        else ""
    )


def _table(found: Findings, columns: Sequence[Cells]) -> Table:
    table = Table("", box=None, pad_edge=False)
    for title, *_ in columns:
        # A number that is broken over two lines cannot be compared with its column.
        table.add_column(title, justify="right", no_wrap=True)
    if teacher := found.teacher:
        table.add_row(
            f"teacher {teacher.name}", *(of_teacher(teacher) for _, _, of_teacher in columns)
        )
    for variant in found.variants:
        table.add_row(variant.name, *(of(variant) for _, of, _ in columns))
    return table


def _results(found: Findings) -> Iterator[Cells]:
    score = found.deciding
    yield _last(score)
    if any(variant.difference for variant in found.variants):
        yield (
            "difference",
            lambda v: shown(v.difference, score.digits) if v.difference else "",
            lambda _: "",
        )
    if any(
        variant.difference and variant.difference.p_holm is not None for variant in found.variants
    ):
        yield "p", lambda v: p_value_shown(v.difference), lambda _: ""
    if any(variant.tuned for variant in found.variants):
        yield "chosen", lambda v: v.tuned.point if v.tuned else "", lambda _: ""
    if any(variant.best for variant in found.variants):
        yield (
            replace(score, title="best").heading,
            lambda v: spread(v.best.get(score.name, ()), score.digits),
            lambda _: "",
        )
        yield (
            "best difference",
            lambda v: shown(there, score.digits) if (there := gained(found, v, best=True)) else "",
            lambda _: "",
        )
    # Last, as it says how, not how well, a variant answers.
    yield from map(_last, _agreement(found))


def _lengths(found: Findings) -> Iterator[Cells]:
    yield "steps", lambda v: trained(v, found, "steps"), lambda t: teacher_trained(t, "steps")
    yield (
        "images seen",
        lambda v: trained(v, found, "images"),
        lambda t: teacher_trained(t, "images"),
    )


def _agreement(found: Findings) -> Sequence[ScoreInfo]:
    """Return the first of the scores that compare with a teacher, if any variant has it."""
    return [s for s in found.agreement[:1] if any(s.name in v.last for v in found.variants)]


def _last(score: ScoreInfo) -> Cells:
    return (
        score.heading,
        lambda v: spread(v.last.get(score.name, ()), score.digits),
        lambda t: score.number(t.last[score.name]) if score.name in t.last else "",
    )


def _costs(teacher: Teacher | None) -> Iterable[Cells]:
    def latency(seconds: float) -> str:
        times = f" (x {hundredths(seconds / teacher.latency)})" if teacher else ""
        return f"{hundredths(1000 * seconds)} ms{times}"

    return [
        ("seconds", lambda v: f"{v.cost.seconds:,.1f}" if v.cost else "", lambda _: ""),
        ("CPU s", lambda v: f"{v.cost.cpu_seconds:,.1f}" if v.cost else "", lambda _: ""),
        ("MiB", lambda v: f"{v.cost.memory / 2**20:,.2f}" if v.cost else "", lambda _: ""),
        ("images/s", lambda v: f"{v.cost.images_per_second:,.0f}" if v.cost else "", lambda _: ""),
        (
            "parameters",
            lambda v: f"{v.cost.parameters:,}" if v.cost else "",
            lambda t: f"{t.parameters:,}",
        ),
        ("MACs", lambda v: with_unit(v.cost.macs) if v.cost else "", lambda t: with_unit(t.macs)),
        (
            "latency",
            lambda v: latency(v.cost.latency) if v.cost else "",
            lambda t: f"{hundredths(1000 * t.latency)} ms",
        ),
    ]
