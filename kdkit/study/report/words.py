"""The texts and tables of a report: the answer, the method, the figures, the way to repeat them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdkit.contracts.task import ScoreInfo
from kdkit.students.show import brief
from kdkit.study import intervals, sentences
from kdkit.study.findings import (
    LOSSES,
    SIGNIFICANT,
    Cost,
    Difference,
    Findings,
    Teacher,
    Variant,
    rank,
)
from kdkit.study.report.document import Figures
from kdkit.units import hundredths, with_unit

NONE = "–"
# title, cell of a variant, score of the teacher
Column = tuple[str, Callable[[Variant], str], ScoreInfo | None]
# reported attributes of a `Length`, and their titles
LENGTHS = {"steps": "steps", "images": "images seen"}
SHARED = ("data", "student", "train")  # sections that are equal under one protocol


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Format mean ± standard deviation over the seeds; a single value has no deviation."""
    return intervals.spread(values, digits).replace("+-", "±") or NONE


def gain(difference: Difference | None, score: ScoreInfo) -> str:
    """Format the mean difference in a score, with its 95 % interval if there are enough seeds."""
    # A minus sign, as wide as a plus: numbers of a column stay under each other.
    return intervals.shown(difference, score.digits).replace("-", "−") if difference else NONE


def _joined(*parts: str, by: str = " ") -> str:
    return by.join(filter(None, parts))


def best(findings: Findings) -> Variant | None:
    """Return the variant with the best mean score on validation data, or on test data if some
    variant has no validation data.
    """
    score, by_validation = findings.deciding, chosen_by_validation(findings)
    return max(
        findings.ran,
        # Validation data where there are any: chosen by the test data, the best is flattered by its
        # luck.
        key=lambda v: rank(score, (v.validation if by_validation else v.last)[score.name]),
        default=None,
    )


def chosen_by_validation(findings: Findings) -> bool:
    """Check whether all variants were measured on validation data, so that the best one can be
    chosen without the test data.
    """
    return all(v.validation.get(findings.deciding.name) for v in findings.ran)


def answer(findings: Findings) -> Iterator[str]:
    """State the finding in a few sentences, which claim no more than the seeds support."""
    leader = best(findings)
    if leader is None:
        yield "No run of this study is finished, so there is nothing to tell yet."
        return
    deciding = findings.deciding
    values, known = leader.last[deciding.name], findings.teacher.last if findings.teacher else {}
    score = _joined(spread(values, deciding.digits), deciding.unit, deciding.title)
    taught = (
        f"; the teacher has {deciding.text(known[deciding.name])}" if deciding.name in known else ""
    )
    baseline = next((v for v in findings.variants if v.name == findings.baseline), leader)
    if len(findings.variants) == 1:
        yield (
            f"{leader.name} reaches {score} on the test data {findings.moment}"
            f" ({_seeds(leader)}){taught}."
        )
    elif leader is baseline:
        chosen = " on validation data" if chosen_by_validation(findings) else ""
        reaches = f"which reaches {score} on test data {findings.moment} ({_seeds(leader)}){taught}"
        yield f"No variant is better{chosen} than the baseline, {leader.name}, {reaches}."
    else:
        chosen = " on validation data" if chosen_by_validation(findings) else ""
        yield (
            f"Best{chosen} {findings.moment}: {leader.name}, {score} on test"
            f" data{_over(leader, baseline, deciding)}{taught}."
        )
        yield _carried(leader, findings)
        yield from _next_best(leader, findings)
    if (tally := sentences.verdicts(findings)) is not None:
        yield f"{tally}."
    if (data := sentences.training_data(findings)) is not None:
        yield f"{data}."


def _over(leader: Variant, baseline: Variant, score: ScoreInfo) -> str:
    if leader.difference is None or not leader.difference.values:
        return (
            f", {baseline.name} being the baseline"
            if baseline.last.get(score.name)
            else f" (no run of the baseline, {baseline.name}, is finished)"
        )
    # A gain of a loss is negative, and is none "over" the baseline.
    word = "over" if score.higher_is_better else "against"
    return (
        f", {_joined(gain(leader.difference, score), score.difference_unit, word)} {baseline.name}"
    )


def _carried(leader: Variant, findings: Findings) -> str:
    """Explain the interval of the best variant."""
    found = leader.difference
    if found is None or not found.values:
        return "They share no seed, so their difference has no interval."
    if found.t is None:
        return "They share one seed only: how much of the difference is chance cannot be told."
    says = f"In brackets: 95 % confidence interval, paired t over {len(found.values)} seeds."
    # The interval above is not corrected, and may leave out 0 all the same.
    if found.p_holm is not None and found.p_holm >= SIGNIFICANT:
        says += " The difference may be chance."
    several = sum(v.difference is not None for v in findings.variants) > 1
    if several and not chosen_by_validation(findings):
        says += " The best was chosen by these same test figures, which flatters it."
    return says


def _next_best(leader: Variant, findings: Findings) -> Iterator[str]:
    """Yield sentences on the distance from the best variant to the next best one, the baseline
    aside: the best may not be worth its cost.
    """
    others = tuple(v for v in findings.variants if v.name not in (leader.name, findings.baseline))
    second = best(replace(findings, variants=others))
    if second is None:
        return
    # As if the next best were the baseline: paired by seed, like all differences here.
    apart = intervals.gained(replace(findings, baseline=second.name), leader)
    if apart is not None and apart.t is not None:
        told = _joined(gain(apart, findings.deciding), findings.deciding.difference_unit)
        yield f"Against the next best, {second.name}: {told} (not corrected)."


def _seeds(variant: Variant) -> str:
    return f"{len(variant.seeds)} seeds" if len(variant.seeds) != 1 else "one seed, so no deviation"


def protocol(
    findings: Findings, recipes: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, str]]:
    """List (title, text): what all runs share, what was compared, how it was measured."""
    # Folders differ between machines and say nothing about the protocol.
    told = {name: dict(brief(shortened(recipe))) for name, recipe in recipes.items()}
    for key in SHARED if told else ():
        names: dict[str, list[str]] = {}
        for name, parts in told.items():
            # Variants with equal descriptions share one text: the first, usually the baseline's, is
            # told whole.
            names.setdefault(parts[key], []).append(name)
        first, *rest = names
        others = [f"{', '.join(names[text])}: {text}" for text in rest]
        title = {"data": "Data", "student": "Student", "train": "Training"}[key]
        yield title, first if not others else f"{first}; but {'; '.join(others)}"
    taught = list(dict.fromkeys(parts["teacher"] for parts in told.values() if "teacher" in parts))
    if taught:
        yield "Teacher", "; ".join(taught)
    count = sum(len(v.seeds) for v in findings.variants)
    seeds = sorted({seed for v in findings.variants for seed in v.seeds})
    if len(findings.variants) > 1:
        yield (
            "Compared",
            (
                f"{len(findings.variants)} variants, the baseline is {findings.baseline}; {count}"
                " finished runs"
            ),
        )
    yield "Seeds", ", ".join(map(str, seeds)) or NONE
    if searched := list(sentences.search(findings)):
        yield "Search", f"{'. '.join(searched)}."
    chosen = (
        "the epoch that is best on validation is told beside it; "
        if any(v.best for v in findings.variants)
        else ""
    )
    yield "Measured", f"on the test data {findings.moment}; {chosen}no epoch is chosen by test data"


def shortened(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe with only the names of its teachers' recipe files, not their folders."""

    def short(teacher: Mapping[str, Any]) -> dict[str, Any]:
        return (
            {**teacher, "recipe": Path(teacher["recipe"]).name}
            if teacher.get("recipe")
            else dict(teacher)
        )

    one, several = recipe.get("teacher"), recipe.get("teachers") or ()
    return {
        **recipe,
        "teacher": short(one) if one else None,
        "teachers": [short(each) for each in several],
    }


def score_table(findings: Findings) -> Figures:
    """Build the table of the deciding score; one row a variant, the teacher last."""
    numbers = sorted({len(v.seeds) for v in findings.variants})
    several = (
        "mean ± standard deviation over"
        f" {f'{numbers[0]} seeds' if len(numbers) == 1 else 'the seeds'}"
    )
    deviation = several if numbers[-1] > 1 else "one seed, so there is no deviation and no interval"
    interval = (
        "; difference: mean over the seeds, 95 % interval by the paired t distribution; p: of that"
        " difference, corrected for the number of variants (Holm)"
        if numbers[-1] > 1
        else ""
    )
    leader = best(findings)
    caption = (
        f"Test data, {findings.moment} unless the column says otherwise; {deviation}{interval}."
    )
    score, unit = findings.deciding, findings.deciding.difference_unit
    columns: list[Column] = [
        _last(score),
        (_joined("difference", unit, by=", "), lambda v: gain(v.difference, score), None),
        ("p", lambda v: intervals.p_value_shown(v.difference) or NONE, None),
        ("chosen", lambda v: v.tuned.point if v.tuned else NONE, None),
        (
            f"{score.heading} at the best epoch on validation",
            lambda v: spread(v.best.get(score.name, ()), score.digits),
            None,
        ),
        (
            _joined("difference there", unit, by=", "),
            lambda v: gain(intervals.gained(findings, v, best=True), score),
            None,
        ),
        *map(_last, findings.agreement[:1]),
    ]
    # Some runs have failed: each mean is over its own number of seeds.
    if len(numbers) > 1:
        columns.append(("seeds", lambda v: str(len(v.seeds)), None))
    table = _table(findings, columns, caption)
    return replace(table, marked=findings.variants.index(leader) if leader else None)


def further_table(findings: Findings) -> Figures:
    """Build the table of training loss, agreement with the teacher, and further scores."""
    scores = [
        one
        for one in (LOSSES["late_loss"], *findings.agreement[1:], *findings.scores[1:])
        if not one.part_of and any(one.name in v.last for v in findings.variants)
    ]
    told = "; ".join(f"{one.title}: {one.meaning}" for one in scores if one.meaning)
    table = _table(findings, list(map(_last, scores)), f"{told}." if told else "")
    return replace(table, folded="Further scores")


def parts_tables(findings: Findings) -> Iterator[Figures]:
    """Build a table for each score that has parts, such as classes: a row a part, a column a
    variant.
    """
    for title in dict.fromkeys(one.part_of for one in findings.scores if one.part_of):
        parts = [one for one in findings.scores if one.part_of == title]
        teacher = findings.teacher
        rows = [
            [
                part.title,
                *(spread(v.last.get(part.name, ()), part.digits) for v in findings.ran),
                *([_of_teacher(teacher, part)] if teacher else []),
            ]
            for part in parts
        ]
        header = [replace(parts[0], title=title).heading]
        header += [_called(v, findings) for v in findings.ran]
        header += [_named(teacher)] if teacher else []
        yield Figures(
            header, rows, f"{title}: {parts[0].meaning}.", folded=f"{title}, part by part"
        )


def _table(findings: Findings, columns: Sequence[Column], caption: str) -> Figures:
    # A column that no variant fills is left out.
    shown = [column for column in columns if any(column[1](v) != NONE for v in findings.variants)]
    rows = [[_called(v, findings), *(text(v) for _, text, _ in shown)] for v in findings.variants]
    if findings.teacher:
        rows.append(
            [_named(findings.teacher), *(_of_teacher(findings.teacher, one) for _, _, one in shown)]
        )
    return Figures(["variant", *(title for title, _, _ in shown)], rows, caption)


def _last(score: ScoreInfo) -> Column:
    return score.heading, lambda v: spread(v.last.get(score.name, ()), score.digits), score


def _of_teacher(teacher: Teacher, score: ScoreInfo | None) -> str:
    return score.number(teacher.last[score.name]) if score and score.name in teacher.last else NONE


def _called(variant: Variant, findings: Findings) -> str:
    return (
        f"{variant.name} (baseline)"
        if variant.name == findings.baseline and len(findings.variants) > 1
        else variant.name
    )


def _named(teacher: Teacher) -> str:
    return "teacher" if teacher.name == "teacher" else f"teacher: {teacher.name}"


def intervals_table(findings: Findings) -> Figures | None:
    """Build the table of both intervals of each difference, if there is any."""
    score, digits = findings.deciding, findings.deciding.digits
    rows = []
    for v in findings.variants:
        if v.difference and v.difference.t and v.difference.bootstrap:
            each = ", ".join(f"{value:+.{digits}f}" for value in v.difference.values)
            t, resampled = (
                f"[{one.low:+.{digits}f}, {one.high:+.{digits}f}]"
                for one in (v.difference.t, v.difference.bootstrap)
            )
            rows.append(
                [
                    cell.replace("-", "−") if i else cell
                    for i, cell in enumerate((v.name, each, t, resampled))
                ]
            )
    less = f"{score.title} minus that of {findings.baseline} with the same seed"
    caption = (
        f"Difference: {_joined(less, score.difference_unit, by=', ')}; 95 % intervals of the mean."
    )
    return (
        Figures(
            ["variant", "seed by seed", "paired t", "bootstrap"],
            rows,
            caption,
            folded="Differences seed by seed, and intervals by bootstrap",
        )
        if rows
        else None
    )


def cost_table(findings: Findings) -> Figures | None:
    """Build the table of the costs of training and of the resulting networks."""
    shown = [(v, v.cost) for v in findings.variants if v.cost]
    if not shown:
        return None
    # its network may no longer exist
    whole = findings.teacher if findings.teacher and findings.teacher.parameters else None
    # A column without a figure is left out: reports of runs have no memory, older studies no
    # processor time.
    columns = [c for c in _cost_columns(whole) if any(c[1](cost) != NONE for _, cost in shown)]
    # An older kdkit has not recorded lengths.
    told = [what for what in LENGTHS if any(v.length for v, _ in shown)]
    rows = []
    for v, cost in shown:
        length = [sentences.trained(v, findings, what).replace("x", "×") or NONE for what in told]
        rows.append([_called(v, findings), *length, *(text(cost) for _, text, _ in columns)])
    if whole:
        length = [sentences.teacher_trained(whole, what) or NONE for what in told]
        rows.append([_named(whole), *length, *(text for _, _, text in columns)])
    caption = (
        "Training: steps of the optimizer in all stages, the images that they show, each as often"
        " as it comes (×: times the baseline's); means over the seeds, measurements included, as a"
        " run alone would need them. Network: as it is exported; latency: median of one image on"
        " one thread."
    )
    return Figures(
        ["variant", *(LENGTHS[what] for what in told), *(title for title, _, _ in columns)],
        rows,
        caption,
    )


def _cost_columns(teacher: Teacher | None) -> list[tuple[str, Callable[[Cost], str], str]]:
    """List (title, cell of a variant, cell of the teacher)."""

    def latency(seconds: float) -> str:
        known = teacher.latency if teacher else 0.0
        times = f" (× {hundredths(seconds / known)})" if known else ""
        return f"{hundredths(1000 * seconds)} ms{times}"

    def positive(value: float, text: str) -> str:
        return text if value > 0 else NONE

    return [
        ("CPU seconds", lambda c: positive(c.cpu_seconds, f"{c.cpu_seconds:,.1f}"), NONE),
        ("seconds", lambda c: positive(c.seconds, f"{c.seconds:,.1f}"), NONE),
        (
            "peak memory of a step",
            lambda c: positive(c.memory, f"{c.memory / 2**20:,.1f} MiB"),
            NONE,
        ),
        ("images/s", lambda c: positive(c.images_per_second, f"{c.images_per_second:,.0f}"), NONE),
        (
            "parameters",
            lambda c: f"{c.parameters:,}",
            f"{teacher.parameters:,}" if teacher else NONE,
        ),
        (
            "MACs per image",
            lambda c: with_unit(c.macs),
            with_unit(teacher.macs) if teacher else NONE,
        ),
        (
            "size",
            lambda c: f"{c.bytes / 1024:,.0f} KiB",
            f"{teacher.bytes / 1024:,.0f} KiB" if teacher else NONE,
        ),
        (
            "latency (× the teacher's)" if teacher else "latency",
            lambda c: latency(c.latency),
            f"{hundredths(1000 * teacher.latency)} ms" if teacher else NONE,
        ),
    ]
