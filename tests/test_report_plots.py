"""Pictures of a report: learning curves of few points."""

import pytest
from matplotlib.figure import Figure

from kdkit.contracts.task import ScoreInfo
from kdkit.study.report import plots
from kdkit.study.report.mean_curves import Course, Courses

SCORE = ScoreInfo(name="top1", title="top-1", unit="%")


@pytest.mark.parametrize(
    ("epochs", "names"),
    [
        ((1,), ["learning-curves-1"]),
        ((1, 2), ["learning-curves-1"]),
        ((30,), ["learning-curves-1"]),
        (tuple(range(1, 31)), ["learning-curves-1", "learning-curves-1-late"]),
    ],
)
def test_few_points_have_one_picture_with_whole_epochs_and_their_deviation(epochs, names, monkeypatch):
    drawn = []

    def kept(figure):
        drawn.append(figure)
        return b""

    monkeypatch.setattr(plots, "png", kept)
    course = Course(epochs, tuple(60.0 + x for x in epochs), (2.0,) * len(epochs))
    courses = {"alone": Courses({"top1": course}, stages=[(0.0, "main")], epochs=epochs[-1], seeds=2)}
    assert [one.name for one in plots.learning_curves(courses, "alone", None, SCORE)] == names
    assert isinstance(drawn[0], Figure)
    (axes,) = drawn[0].axes
    low, high = axes.get_xlim()
    inside = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert inside and all(float(tick).is_integer() for tick in inside)
    assert len(axes.collections) == 1  # a band, or the bar of a single point
