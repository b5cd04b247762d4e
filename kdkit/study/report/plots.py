"""Pictures of a report with points and lines: the score against cost, and curves over the
epochs.
"""

from __future__ import annotations

import math
import re
import statistics
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdkit.contracts.task import ScoreInfo
from kdkit.students.curves import DASHES, INK, MARKERS, broken, furnish
from kdkit.study.findings import LOSSES
from kdkit.study.report.document import Picture, Pictures
from kdkit.study.report.drawing import (
    FURTHER,
    GREY,
    HEIGHT,
    Look,
    groups,
    labels,
    looks,
    name_beside,
    plain,
    with_margin,
)
from kdkit.study.report.mean_curves import Course, Courses

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEACHER: dict[str, Any] = {"color": GREY, "linestyle": (0, (6, 3)), "linewidth": 1.3, "zorder": 1}
# ratio of largest to smallest value from which an axis is logarithmic
STEEP = 10.0
EARLY = 0.25  # share of the epochs, the first ones, for which an axis makes no room if they need
ROOM = 2.5  # times the length of the axis of the others


@dataclass(frozen=True)
class Priced:
    """A variant's scores, one a seed, and what training it cost."""

    name: str
    scores: Sequence[float]
    cost: float


def against_cost(
    points: Sequence[Priced], baseline: str, unit: str, teacher: float | None, score: ScoreInfo
) -> Pictures:
    """Draw the score against the cost of training, each point with its name."""
    height = max(HEIGHT, 0.8 + 0.17 * len(points))
    look, short = looks([p.name for p in points], baseline), labels([p.name for p in points])
    figure, axes = with_margin([*short.values(), "teacher"], height)
    means = {p.name: statistics.fmean(p.scores) for p in points}
    for point in points:
        style = look[point.name]
        deviation = statistics.stdev(point.scores) if len(point.scores) > 1 else 0.0
        axes.errorbar(
            point.cost,
            means[point.name],
            deviation,
            linestyle="",
            color=style.color,
            marker=style.marker,
            markersize=6.5,
            capsize=2.5,
            linewidth=1.1,
        )
    costs = [p.cost for p in points]
    if min(costs) > 0 and max(costs) / min(costs) > STEEP:
        _logarithmic(axes.set_xscale, axes.xaxis, costs)
    furnish(axes, f"test {score.heading}")
    axes.set_xlabel(f"{unit} of training one run", color=INK)
    axes.margins(x=0.08, y=0.08)
    low, high = axes.get_ylim()
    caption = "Bars: one standard deviation to each side." if _several(points) else ""
    named = [(short[p.name], p.cost, means[p.name], look[p.name].color) for p in points]
    if teacher is not None and _near(teacher, low, high):
        axes.axhline(teacher, **TEACHER)
        low, high = axes.get_ylim()
        named.append(("teacher", axes.get_xlim()[1], teacher, GREY))
    elif teacher is not None:
        caption += f" The teacher, {score.text(teacher)}, is outside of the picture."
    axes.set_ylim(low, high)
    axes.set_xlim(*axes.get_xlim())
    name_beside(axes, named, height)
    title = f"Test {score.title} against cost"
    told = ", ".join(
        f"{p.name}: {score.text(means[p.name])} for {p.cost:.3g} {unit}" for p in points
    )
    alt = f"Test {score.title} against {unit} of training. {told}."
    return Pictures(title, [Picture("score-against-cost", figure, alt)], caption.strip())


def _several(points: Sequence[Priced]) -> bool:
    return any(len(point.scores) > 1 for point in points)


def _near(level: float, low: float, high: float) -> bool:
    """Check whether a line at that level leaves the rest of an axis enough room."""
    return max(level - high, low - level) < 0.25 * (high - low)


def learning_curves(
    courses: Mapping[str, Courses], baseline: str, teacher: float | None, score: ScoreInfo
) -> Pictures | None:
    """Draw the test score over the epochs; None without curves."""
    return _curves(
        "learning-curves",
        f"Test {score.title} over the epochs",
        score,
        _of(score, courses),
        courses,
        baseline,
        teacher,
    )


def to_teacher(
    courses: Mapping[str, Courses], baseline: str, agreement: Sequence[ScoreInfo]
) -> Iterator[Pictures]:
    """Draw how close each variant's answers are to the teacher's, over the epochs."""
    for score in agreement:
        # A name may hold a slash, as that of a class does.
        file = re.sub(r"[^A-Za-z0-9]+", "-", score.name).strip("-")
        title = score.meaning or score.title
        drawn = _curves(
            file,
            title[:1].upper() + title[1:],
            score,
            _of(score, courses),
            courses,
            baseline,
            None,
        )
        if drawn:
            yield drawn


def training_loss(courses: Mapping[str, Courses], baseline: str) -> Pictures | None:
    """Draw the training loss of every variant over the epochs, folded."""
    shown = {name: one.losses["loss"] for name, one in courses.items() if "loss" in one.losses}
    caption = "The whole objective. Objectives differ between variants, so compare shapes only."
    title = "Training loss of each variant"
    return _curves(
        "training-loss", title, LOSSES["loss"], shown, courses, baseline, None, caption, folded=True
    )


def _of(score: ScoreInfo, courses: Mapping[str, Courses]) -> dict[str, Course]:
    found = {name: one.scores.get(score.name) for name, one in courses.items()}
    return {name: course for name, course in found.items() if course is not None}


@dataclass(frozen=True)
class Axis:
    """The y axis that all panels of a figure share."""

    low: float
    high: float
    logarithmic: bool

    @classmethod
    def of(cls, lines: Iterable[tuple[Course, float]], *, may_be_logarithmic: bool) -> Axis:
        """Choose it for the lines, each with the number of its epochs.

        The first epochs run out of the axis if all others would have to share a small part of it.
        """
        whole: list[float] = []
        late: list[float] = []
        for course, epochs in lines:
            deviation = course.deviation or (0.0,) * len(course.x)
            for x, mean, around in zip(course.x, course.mean, deviation, strict=True):
                ends = (mean - around, mean + around)
                whole += ends
                # A course of few points may have none but early ones.
                late += ends if x > EARLY * epochs or x == course.x[-1] else ()
        means = [y for course, _ in lines for y in course.mean]
        low, high = min(means), max(means)
        if may_be_logarithmic and low > 0 and high / low > STEEP:
            return cls(0.8 * low, 1.15 * high, True)
        low, high = min(whole), max(whole)
        if high - low > ROOM * (max(late) - min(late)) > 0:
            low, high = min(late), max(late)
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low - margin, high + margin, False)

    def cuts(self, lines: Iterable[Course]) -> bool:
        """Check whether it leaves out a mean."""
        return any(not self.low <= y <= self.high for course in lines for y in course.mean)


def _logarithmic(set_scale: Any, axis: Any, values: Sequence[float]) -> None:
    """Make an axis logarithmic, with plain numbers at its ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    set_scale("log")
    decades = math.log10(max(values) / min(values))
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _curves(
    file: str,
    title: str,
    score: ScoreInfo,
    shown: Mapping[str, Course],
    courses: Mapping[str, Courses],
    baseline: str,
    teacher: float | None,
    caption: str = "",
    *,
    folded: bool = False,
) -> Pictures | None:
    """Draw a quantity over the epochs, a few variants a panel, all panels on the same axes."""
    if not shown:
        return None
    lines = [(course, float(courses[name].epochs)) for name, course in shown.items()]
    axis = Axis.of(lines, may_be_logarithmic=not score.higher_is_better)
    # Of trainings of different lengths, each takes the whole width.
    relative = len({courses[name].epochs for name in shown}) > 1
    look, drawn = looks(list(courses), baseline), []
    for number, names in enumerate(groups(list(shown), baseline), 1):
        figure, axes = with_margin([*labels(list(shown)).values(), "teacher"])
        level = teacher if teacher is not None and axis.low <= teacher <= axis.high else None
        _panel(axes, {n: (shown[n], courses[n], look[n]) for n in names}, axis, relative, level)
        _name_axis(axes, score.heading, axis)
        ends = ", ".join(f"{name} {shown[name].mean[-1]:.4g}" for name in names)
        alt = f"{title}: {score.heading} by epoch. At the end: {ends}."
        drawn.append(Picture(f"{file}-{number}", figure, alt))
    told = [caption] if caption else []
    if len(drawn) > 1:
        told.append(f"All panels have the same axes, and {baseline} (black) is in each.")
    if relative:
        told.append("The variants train for different numbers of epochs: 100 % is the end of each.")
    if axis.cuts(shown.values()):
        told.append("The first epochs of some lines are outside of the axis.")
    if teacher is not None and not axis.low <= teacher <= axis.high:
        told.append(f"The teacher has {score.text(teacher)}, outside of the axis.")
    return Pictures(title, drawn, " ".join(told), folded)


def _panel(
    axes: Axes,
    lines: Mapping[str, tuple[Course, Courses, Look]],
    axis: Axis,
    relative: bool,
    teacher: float | None,
) -> None:
    from matplotlib.ticker import MaxNLocator

    if axis.logarithmic:
        _logarithmic(axes.set_yscale, axes.yaxis, (axis.low, axis.high))
    axes.set_ylim(axis.low, axis.high)
    furnish(axes, "")
    short, named = labels(list(lines)), []
    for name, (course, one, look) in lines.items():
        factor = 100 / one.epochs if relative else 1.0
        _line(axes, course, look, one.stages, factor, axis)
        named.append((short[name], factor * course.x[-1], course.mean[-1], look.color))
    every = [one for _, one, _ in lines.values()]
    last = 100.0 if relative else float(every[0].epochs)
    first = min(course.x[0] for course, _, _ in lines.values())
    # The first point is at the end of epoch 1; an axis from 0 would begin with a gap.
    axes.set_xlim(0 if relative else first - 0.02 * last - 0.1, 1.02 * last + 0.1)
    if not relative:
        # by itself, it divides an axis of one epoch into fractions
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        for start, _ in _shared_stages(every)[1:]:
            axes.axvline(start + 0.5, color="#999999", linewidth=1)
    stages = "" if len(_shared_stages(every)) < 2 else ", over all stages"
    axes.set_xlabel("% of the training" if relative else f"epoch{stages}", color=INK)
    if teacher is not None:
        axes.axhline(teacher, **TEACHER)
        named.append(("teacher", axes.get_xlim()[1], teacher, GREY))
    name_beside(axes, named)


def _name_axis(axes: Axes, heading: str, axis: Axis) -> None:
    text = f"{heading} (log)" if axis.logarithmic else heading
    axes.set_ylabel(plain(textwrap.fill(text, 32)), color=INK)


def _line(
    axes: Axes,
    course: Course,
    look: Look,
    stages: Sequence[tuple[float, str]],
    factor: float,
    axis: Axis,
) -> None:
    """Draw the mean, and its deviation as a band."""
    xs, means = broken(course.x, course.mean, stages)
    x = [factor * value for value in xs]
    axes.plot(x, means, **look.line(), markevery=max(1, len(course.x) // 9))
    if not course.deviation:
        return
    if len(course.x) == 1:  # a point has no band
        axes.errorbar(x, means, course.deviation, color=look.color, capsize=3)
        return
    low, high = (
        [m + sign * d for m, d in zip(course.mean, course.deviation, strict=True)]
        for sign in (-1, 1)
    )
    # a band that reaches 0 has no end on a logarithmic axis
    low = [max(value, axis.low) if axis.logarithmic else value for value in low]
    axes.fill_between(
        x,
        broken(course.x, low, stages)[1],
        broken(course.x, high, stages)[1],
        color=look.color,
        alpha=0.1,
        linewidth=0,
    )


def _shared_stages(found: Sequence[Courses]) -> Sequence[tuple[float, str]]:
    """List the stages that all variants have at the same epochs; lines for others would be
    misleading.
    """
    starts = [[start for start, _ in one.stages] for one in found]
    return found[0].stages if all(one == starts[0] for one in starts) else ()


def loss_terms(courses: Mapping[str, Courses]) -> Pictures | None:
    """Draw the training loss of each variant and its weighted terms, a variant a panel, folded."""
    drawn = [
        Picture(
            f"losses-{number}",
            _terms(name, one, lines),
            f"Training loss of {name} by epoch, terms as they count. At the end: "
            + ", ".join(f"{term} {line.mean[-1]:.4g}" for term, line in lines.items())
            + ".",
        )
        for number, (name, one) in enumerate(courses.items(), 1)
        if (lines := _named_terms(one.losses))
    ]
    caption = (
        "Terms weighted as they count in the total. Each panel has its own axis, logarithmic where"
        " it says (log): objectives differ between variants, so compare shapes only."
    )
    title = "Training loss of each variant and its terms"
    return Pictures(title, drawn, caption, folded=True) if drawn else None


def _named_terms(losses: Mapping[str, Course]) -> Mapping[str, Course]:
    # With a single term, the total is that term again.
    alone = len(losses) == 2
    return {
        "total" if term == "loss" else term: course
        for term, course in losses.items()
        if term != "loss" or not alone
    }


def _terms(name: str, one: Courses, lines: Mapping[str, Course]) -> Figure:
    figure, axes = with_margin(labels(list(lines)).values())
    axis = Axis.of([(line, one.epochs) for line in lines.values()], may_be_logarithmic=True)
    styled = {
        term: (
            line,
            one,
            Look(
                FURTHER[i % len(FURTHER)], DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)], 1.5
            ),
        )
        for i, (term, line) in enumerate(lines.items())
    }
    _panel(axes, styled, axis, False, None)
    _name_axis(axes, "loss", axis)
    short = plain(labels([name])[name])
    axes.set_title(short, loc="left", fontsize=9.5, fontweight="bold", color=INK)
    return figure
