"""Sentences that a study's figures support, shared by tables and reports."""

from __future__ import annotations

from collections.abc import Iterator

from kdkit.study.findings import Findings, Teacher, Variant


def verdicts(found: Findings) -> str | None:
    """Summarise as `6 of 15 variants are better than alone, none is worse, 9 are inconclusive`, and
    name the test; None without p-values.
    """
    told = {
        v.name: v.difference.verdict(found.deciding)
        for v in found.variants
        # Variants with one seed have a difference, but nothing to test it by.
        if v.difference and v.difference.p_holm is not None
    }
    # With a single variant, Holm's correction changes nothing, and is not named.
    if len(told) == 1:
        [(name, verdict)] = told.items()
        compared = (
            f"{name} against {found.baseline}: inconclusive"
            if verdict == "inconclusive"
            else f"{name} is {verdict} than {found.baseline}"
        )
        return f"{compared} (paired t, 5 %)"
    if not told:
        return None
    better, worse, rest = (
        list(told.values()).count(word) for word in ("better", "worse", "inconclusive")
    )
    first = (
        f"{_count(better, f' of {len(told)} variants').capitalize()} better than {found.baseline}"
    )
    return (
        f"{first}, {_count(worse)} worse, {_count(rest)} inconclusive (paired t, Holm-corrected,"
        " 5 %)"
    )


def _count(number: int, of: str = "") -> str:
    return f"{number or 'none'}{of} {'are' if number > 1 else 'is'}"


def training_data(found: Findings) -> str | None:
    """Describe on how many examples the teacher and the students were trained; None without a
    teacher.
    """
    if found.teacher is None:
        return None
    variants: dict[int, list[str]] = {}
    for v in found.variants:
        if v.length:
            variants.setdefault(v.length.samples, []).append(v.name)
    # Most variants have the first number of examples; only the others are named.
    first, *others = variants.items() if variants else [(0, [])]
    students = "; ".join(
        [
            f"the students have {first[0]:,}",
            *(f"{', '.join(names)}: {count:,}" for count, names in others),
        ]
    )
    # Teachers of equal lengths are told once.
    lengths = list(dict.fromkeys(found.teacher.lengths))
    if not lengths:
        return f"On what the teacher was trained is not known; {students}"
    one = "The teacher was" if len(found.teacher.lengths) == 1 else "Each teacher was"
    taught = " or ".join(
        f"{n.samples:,} labelled examples ({n.epochs:,} epochs, {n.steps:,} steps)" for n in lengths
    )
    return f"{one} trained on {taught}; {students}"


def search(found: Findings) -> Iterator[str]:
    """Yield sentences about the search: what every variant tried and chose, and where better values
    may lie beyond the range.
    """
    if (whole := found.search) is None:
        return
    tried = "; ".join(f"{key} {', '.join(map(str, values))}" for key, values in whole.keys.items())
    seeds = ", ".join(map(str, whole.seeds))
    yield (
        f"Chosen for each variant from the same values ({tried}) by {found.deciding.title} on"
        f" validation data after the last epoch, mean over seed{'s' * (len(whole.seeds) > 1)}"
        f" {seeds}, which are not used again; the search took {whole.runs:,} runs and"
        f" {whole.cpu_seconds:,.0f} s of the processor"
    )
    edges = [
        f"{v.name} ({', '.join(f'{key} {v.tuned.values[key]}' for key in v.tuned.edges)})"
        for v in found.variants
        if v.tuned and v.tuned.edges
    ]
    if edges:
        yield (
            "The smallest or largest value was chosen, so that the best may lie beyond:"
            f" {', '.join(edges)}"
        )


def trained(variant: Variant, found: Findings, what: str) -> str:
    """Describe the steps or images (`what` of its `Length`), and their ratio to the baseline's if
    it is not 1.
    """
    if variant.length is None:
        return ""
    own: int = getattr(variant.length, what)
    known = next(
        (getattr(v.length, what) for v in found.variants if v.name == found.baseline and v.length),
        own,
    )
    # Marked only where it is not equal, so that a longer training catches the eye.
    return f"{own:,}" if own == known else f"{own:,} (x {own / known:.3g})"


def teacher_trained(teacher: Teacher, what: str) -> str:
    """Describe the steps or images of a teacher, as far as they are known."""
    return " or ".join(
        f"{count:,}" for count in dict.fromkeys(getattr(one, what) for one in teacher.lengths)
    )
