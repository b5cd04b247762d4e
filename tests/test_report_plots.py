"""Pictures of a report: axes that fit, names beside their lines."""

from dataclasses import replace

import pytest

from kdkit.contracts.task import ScoreInfo
from kdkit.study.report import plots
from kdkit.study.report.drawing import png
from kdkit.study.report.mean_curves import Course, Courses

SCORE = ScoreInfo(name="top1", title="top-1", unit="%")


@pytest.mark.parametrize("epochs", [(1,), (1, 2), (30,), tuple(range(1, 31))])
def test_few_points_have_whole_epochs_and_their_deviation(epochs):
    course = Course(epochs, tuple(60.0 + x for x in epochs), (2.0,) * len(epochs))
    courses = {"alone": Courses({"top1": course}, stages=[(0.0, "main")], epochs=epochs[-1], seeds=2)}
    (picture,) = plots.learning_curves(courses, "alone", None, SCORE).pictures
    (axes,) = picture.figure.axes
    low, high = axes.get_xlim()
    inside = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert inside and all(float(tick).is_integer() for tick in inside)
    assert len(axes.collections) == 1  # a band, or the bar of a single point


def study(*lines, epochs=()):
    return {
        f"v{i}": Courses({"top1": line}, stages=[(0.0, "main")], epochs=(epochs or [line.x[-1]] * len(lines))[i])
        for i, line in enumerate(lines)
    }


@pytest.mark.parametrize(("count", "panels"), [(1, 1), (3, 1), (5, 1), (6, 2), (7, 2), (14, 5), (20, 7)])
def test_all_panels_have_the_same_axes_and_the_baseline(count, panels):
    lines = [Course((1, 2, 3), (50.0, 70.0 + i, 80.0 + i), ()) for i in range(count)]
    drawn = plots.learning_curves(study(*lines), "v0", 97.0, SCORE)
    axes = [one.figure.axes[0] for one in drawn.pictures]
    assert len(axes) == panels and len({(one.get_xlim(), one.get_ylim(), tuple(one.get_position().bounds)) for one in axes}) == 1
    for one in axes:
        names = [text.get_text() for text in one.texts]
        assert "v0" in names and 2 <= len(names) + (count == 1) <= 6
    assert sorted({text.get_text() for one in axes for text in one.texts} - {"teacher"}) == sorted(f"v{i}" for i in range(count))


@pytest.mark.parametrize(
    ("values", "higher", "logarithmic", "low", "high"),
    [
        ((0.0,) * 8, True, False, -1.0, 1.0),  # zero everywhere
        ((0.0,) * 8, False, False, -1.0, 1.0),
        ((5.0,) * 8, True, False, 4.75, 5.25),
        ((10.0, 20.0, 80.0, 81.0, 82.0, 83.0, 84.0, 84.0), True, False, 79.8, 84.2),  # the first epochs run out of it
        ((60.0, 70.0, 80.0, 81.0, 82.0, 83.0, 84.0, 94.0), True, False, 58.3, 95.7),  # they do not
        ((100.0, 10.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0), False, True, 0.8, 115.0),
        ((100.0, 10.0, 2.0, 1.0, 0.0, 1.0, 1.0, 1.0), False, False, -0.1, 2.1),  # 0 has no place on a logarithmic axis
        ((-3.0, -1.0), False, False, -3.1, -0.9),
    ],
)  # fmt: skip
def test_an_axis_fits_its_values(values, higher, logarithmic, low, high):
    course = Course(tuple(range(1, len(values) + 1)), values, ())
    axis = plots.Axis.of([(course, len(values))], may_be_logarithmic=not higher)
    assert (axis.logarithmic, axis.low, axis.high) == (logarithmic, pytest.approx(low), pytest.approx(high))
    drawn = plots.learning_curves(study(course), "v0", None, replace(SCORE, higher_is_better=higher))
    png(drawn.pictures[0].figure)
    assert ("outside of the axis" in drawn.caption) == (min(values) < low or max(values) > high)
    assert ("(log)" in drawn.pictures[0].figure.axes[0].get_ylabel()) == logarithmic


def test_trainings_of_different_lengths_end_at_the_same_place():
    lines = [Course(tuple(range(1, n + 1)), tuple(70.0 + x for x in range(n)), ()) for n in (10, 30)]
    drawn = plots.learning_curves(study(*lines, epochs=(10, 30)), "v0", None, SCORE)
    assert "different numbers of epochs" in drawn.caption
    ends = [line.get_xdata()[-1] for line in drawn.pictures[0].figure.axes[0].lines]
    assert ends == pytest.approx([100.0, 100.0])


def test_a_teacher_far_away_is_told_and_one_within_is_drawn():
    course = Course((1, 2), (80.0, 90.0), ())
    near, far = (plots.learning_curves(study(course), "v0", level, SCORE) for level in (90.2, 99.0))
    assert "teacher" in [text.get_text() for text in near.pictures[0].figure.axes[0].texts]
    assert "The teacher has 99.00 %" in far.caption
    points = [plots.Priced("v0", (80.0, 81.0), 1.0), plots.Priced("v1", (82.0, 83.0), 20.0)]
    cost = plots.against_cost(points, "v0", "seconds", 99.0, SCORE)
    assert "99.00 %, is outside" in cost.caption and cost.pictures[0].figure.axes[0].get_xscale() == "log"
    equal = [plots.Priced("v0", (0.0,), 0.0), plots.Priced("v1", (0.0,), 0.0)]
    png(plots.against_cost(equal, "v0", "seconds", None, SCORE).pictures[0].figure)
