"""Pictures of a report with points and lines: the score against cost, and curves over the
epochs.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdkit.contracts.task import ScoreInfo
from kdkit.students.curves import COLORS, DASHES, INK, MARKERS, TALL, broken, furnish, over_epochs
from kdkit.study.findings import LOSSES
from kdkit.study.report.document import Picture
from kdkit.study.report.drawing import (
    HEIGHT,
    WIDTH,
    Look,
    blank,
    groups,
    keyed,
    labels,
    looks,
    plain,
    png,
    titled,
)
from kdkit.study.report.mean_curves import Course, Courses

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEACHER: dict[str, Any] = {
    "color": "#777777",
    "linestyle": (0, (6, 3)),
    "linewidth": 1.3,
    "zorder": 1,
}
# ratio of largest to smallest distance to the teacher from which they are drawn on a logarithmic
# scale
STEEP = 10.0
ZOOM = 0.4  # share of the epochs, the last ones, that are drawn again on a scale of their own


@dataclass(frozen=True)
class Priced:
    """A variant's scores, one a seed, and what training it cost."""

    name: str
    scores: Sequence[float]
    cost: float


def against_cost(
    points: Sequence[Priced], baseline: str, unit: str, teacher: float | None, score: ScoreInfo
) -> Picture:
    """Draw the score against the cost of training, with names beside the picture that do not
    overlap.
    """
    height = max(HEIGHT, 1.4 + 0.19 * len(points))
    look, short = looks([p.name for p in points], baseline), labels([p.name for p in points])
    beside = 0.35 + 0.078 * max(map(len, short.values()))  # inches
    figure = blank(WIDTH, height)
    axes, margin = figure.subplots(1, 2, width_ratios=(WIDTH - 0.7 - beside, beside), sharey=True)
    margin.set_axis_off()
    for point in points:
        form = {
            "color": look[point.name].color,
            "marker": look[point.name].marker,
            "markersize": 7,
            "capsize": 3,
            "linewidth": 1.3,
        }
        deviation = statistics.stdev(point.scores) if len(point.scores) > 1 else 0.0
        axes.errorbar(point.cost, statistics.fmean(point.scores), deviation, linestyle="", **form)
    if teacher is not None:
        axes.axhline(teacher, **TEACHER)
    furnish(axes, f"test {score.heading}")
    axes.set_xlabel(f"{unit} of training one run", color=INK)
    axes.margins(x=0.12, y=0.1)
    low, high = axes.get_ylim()
    # Fixed from here on: names are placed on this scale.
    axes.set_ylim(low, high)
    # 0.19 inches a name, in the unit of the axis; 0.9 inches of the height are title and labels.
    room = (high - low) * 0.19 / (height - 0.9)
    named: list[tuple[float, str, Look | None]] = [
        (statistics.fmean(p.scores), short[p.name], look[p.name]) for p in points
    ]
    named += [(teacher, "teacher", None)] if teacher is not None else []
    named.sort(key=lambda one: one[0])
    margin.set_xlim(0, beside)
    for (_, name, style), place in zip(
        named, spaced([y for y, _, _ in named], room, low, high), strict=True
    ):
        if style is None:
            margin.plot((0.0, 0.16), (place, place), **TEACHER)
        else:
            margin.plot(0.08, place, marker=style.marker, color=style.color, markersize=6)
        margin.text(0.25, place, plain(name), va="center", fontsize=9, color=INK)
    titled(figure, f"Test {score.title} against cost")
    names = ", ".join(
        f"{p.name}: {score.text(statistics.fmean(p.scores))} for {p.cost:.3g} {unit}"
        for p in points
    )
    alt = f"Test {score.title} against {unit} of training. {names}."
    return Picture("score-against-cost", png(figure), alt, wide=False)


def spaced(wanted: Sequence[float], room: float, low: float, high: float) -> list[float]:
    """Find places as near as possible to the wanted ones (ascending), at least `room` apart,
    between low and high if there is space.
    """
    # of neighbours that touch: the lowest place wanted by each, less its offset in the block
    blocks: list[list[float]] = []
    for value in wanted:
        blocks.append([value])
        while len(blocks) > 1 and _bottom(blocks[-1], room) < _bottom(
            blocks[-2], room
        ) + room * len(blocks[-2]):
            later = blocks.pop()
            blocks[-1] += later
    places = [_bottom(block, room) + room * i for block in blocks for i in range(len(block))]
    # From the top down, then from the bottom up: if there is not enough space, names stick out
    # above.
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], high - room * (len(places) - 1 - i))
    for i in range(len(places)):
        places[i] = max(places[i], low + room * i)
    return places


def _bottom(block: Sequence[float], room: float) -> float:
    return statistics.fmean(value - room * i for i, value in enumerate(block))


def learning_curves(
    courses: Mapping[str, Courses], baseline: str, teacher: float | None, score: ScoreInfo
) -> Iterator[Picture]:
    """Draw the test score over the epochs, all of them and the last ones enlarged, a few variants a
    picture.
    """
    shown = _of(score, courses)
    for number, names, of in _numbered(shown, baseline):
        for late in (False, True):
            lines = {
                name: _late(shown[name], courses[name].epochs) if late else shown[name]
                for name in names
            }
            # a point by itself is no curve to enlarge
            if late and max(len(course.x) for course in lines.values()) < 2:
                continue
            title = f"Test {score.title}{', the last epochs' if late else ''}{of}"
            # A teacher far above would flatten the enlarged curves.
            reference = teacher if not late or teacher is None or _near(teacher, lines) else None
            yield _panel(
                f"learning-curves-{number}{'-late' if late else ''}",
                title,
                score,
                lines,
                courses,
                list(shown),
                baseline,
                reference,
            )


def training_loss(courses: Mapping[str, Courses], baseline: str) -> Iterator[Picture]:
    """Draw the training loss of every variant over the epochs, a few variants a picture."""
    shown = {name: one.losses["loss"] for name, one in courses.items() if "loss" in one.losses}
    yield from _panels("training-loss", LOSSES["loss"], shown, courses, baseline)


def to_teacher(
    courses: Mapping[str, Courses], baseline: str, agreement: Sequence[ScoreInfo]
) -> Iterator[Picture]:
    """Draw how close each variant's answers are to the teacher's, over the epochs."""
    for score in agreement:
        file = score.name.replace("_", "-")
        yield from _panels(file, score, _of(score, courses), courses, baseline)


def _of(score: ScoreInfo, courses: Mapping[str, Courses]) -> dict[str, Course]:
    found = {name: one.scores.get(score.name) for name, one in courses.items()}
    return {name: course for name, course in found.items() if course is not None}


def _numbered(shown: Mapping[str, Course], baseline: str) -> Iterator[tuple[int, list[str], str]]:
    """Split the variants over panels; yield the number of each, its variants, and what its title
    says of the number.
    """
    panels = groups(list(shown), baseline) if shown else []
    for number, names in enumerate(panels, 1):
        yield number, names, f" ({number} of {len(panels)})" if len(panels) > 1 else ""


def _panels(
    file: str,
    score: ScoreInfo,
    shown: Mapping[str, Course],
    courses: Mapping[str, Courses],
    baseline: str,
) -> Iterator[Picture]:
    title = score.meaning or score.title
    title = title[:1].upper() + title[1:]
    for number, names, of in _numbered(shown, baseline):
        lines = {name: shown[name] for name in names}
        yield _panel(
            f"{file}-{number}", title + of, score, lines, courses, list(courses), baseline, None
        )


def _late(course: Course, epochs: int) -> Course:
    # A run measured only every few epochs may have no point there: its last one stands in.
    keep = [i for i, x in enumerate(course.x) if x > epochs * (1 - ZOOM)] or [len(course.x) - 1]
    first = keep[0]
    return Course(course.x[first:], course.mean[first:], course.deviation[first:])


def _near(level: float, lines: Mapping[str, Course]) -> bool:
    """Check whether a line at that level would leave the others enough room."""
    values = [y for course in lines.values() for y in course.mean]
    low, high = min(values), max(values)
    least = 0.005 * max(abs(low), abs(high))
    return max(level - high, low - level) < 1.5 * (high - low + least)


def _panel(
    file: str,
    title: str,
    score: ScoreInfo,
    lines: Mapping[str, Course],
    courses: Mapping[str, Courses],
    everyone: Sequence[str],
    baseline: str,
    teacher: float | None,
) -> Picture:
    # The legend is outside the axes and grows with its rows, so the picture has to.
    rows = -(-(len(lines) + 1) // 2) if max(map(len, lines)) <= 24 else len(lines)
    figure = blank(WIDTH, HEIGHT - 0.4 + 0.18 * rows)
    axes = figure.subplots()
    look, short = looks(everyone, baseline), labels(everyone)
    stages = _shared_stages([courses[name] for name in lines])
    handles = [
        _line(axes, course, look[name], courses[name].stages) for name, course in lines.items()
    ]
    names = [short[name] for name in lines]
    if teacher is not None:
        handles.append(axes.axhline(teacher, **TEACHER))
        names.append(f"teacher ({score.number(teacher)})")
    furnish(axes, score.heading)
    over_epochs(axes, max(courses[name].epochs for name in lines), stages)
    # The first point is at the end of epoch 1; an axis from 0 would begin with a gap.
    axes.set_xlim(left=min(course.x[0] for course in lines.values()) - 0.3)
    if not score.higher_is_better:
        _scale(axes, lines.values(), STEEP)
    axes.set_xlabel("epoch" if len(stages) < 2 else "epoch, over all stages", color=INK)
    titled(figure, title)
    keyed(figure, handles, names)
    ends = ", ".join(f"{name} {course.mean[-1]:.4g}" for name, course in lines.items())
    return Picture(file, png(figure), f"{title}: {score.heading} by epoch. At the end: {ends}.")


def _scale(axes: Axes, lines: Iterable[Course], most: float) -> None:
    """Make the scale logarithmic if the largest value is more than `most` times the smallest."""
    values = [y for course in lines for y in course.mean]
    if min(values) > 0 and max(values) / min(values) > most:
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.6 * min(values))  # a band may reach below 0


def _line(axes: Axes, course: Course, look: Look, stages: Sequence[tuple[float, str]]) -> object:
    """Draw the mean, and its deviation as a band."""
    drawn = axes.plot(
        *broken(course.x, course.mean, stages), **look.line(), markevery=max(1, len(course.x) // 9)
    )[0]
    if course.deviation and len(course.x) == 1:  # a point has no band
        axes.errorbar(course.x, course.mean, course.deviation, color=look.color, capsize=3)
    elif course.deviation:
        # a band that reaches 0 has no end on a logarithmic scale
        lowest = min((m for m in course.mean if m > 0), default=0.0) / 2
        low = [
            m - d if axes.get_yscale() != "log" else max(m - d, lowest)
            for m, d in zip(course.mean, course.deviation, strict=True)
        ]
        high = [m + d for m, d in zip(course.mean, course.deviation, strict=True)]
        x, lower = broken(course.x, low, stages)
        axes.fill_between(
            x, lower, broken(course.x, high, stages)[1], color=look.color, alpha=0.13, linewidth=0
        )
    return drawn


def _shared_stages(found: Sequence[Courses]) -> Sequence[tuple[float, str]]:
    """List the stages that all variants have at the same epochs; lines for others would be
    misleading.
    """
    starts = [[start for start, _ in one.stages] for one in found]
    return found[0].stages if all(one == starts[0] for one in starts) else ()


def loss_terms(courses: Mapping[str, Courses]) -> Iterator[Picture]:
    """Draw the training loss of each variant and its weighted terms, a variant a picture."""
    for number, (name, one) in enumerate(((n, c) for n, c in courses.items() if c.losses), 1):
        lines = (
            one.losses
            # With a single term, the total is that term again.
            if len(one.losses) > 2
            else {k: v for k, v in one.losses.items() if k != "loss"} or one.losses
        )
        styles = itertools.cycle(
            # not strict: the cycles are endless, MARKERS ends the sequence
            zip(itertools.cycle(COLORS), itertools.cycle(DASHES), MARKERS, strict=False)
        )
        figure = blank(WIDTH, 2.7 + 0.18 * (-(-len(lines) // 2)))
        axes = figure.subplots()
        handles = [
            _line(axes, line, Look(*next(styles), 1.7), one.stages) for line in lines.values()
        ]
        _scale(axes, lines.values(), TALL)
        furnish(axes, "training loss, weighted")
        over_epochs(axes, one.epochs, one.stages)
        axes.set_xlabel("epoch" if len(one.stages) < 2 else "epoch, over all stages", color=INK)
        titled(figure, labels([name])[name])
        keyed(
            figure, handles, ["total" if term == "loss" else labels([term])[term] for term in lines]
        )
        ends = ", ".join(
            f"{'total' if term == 'loss' else term} {line.mean[-1]:.4g}"
            for term, line in lines.items()
        )
        yield Picture(
            f"losses-{number}",
            png(figure),
            f"Training loss of {name} by epoch, terms as they count. At the end: {ends}.",
        )
