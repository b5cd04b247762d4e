"""The sentences and tables of a report claim what the figures carry, and no more."""

from pathlib import Path

import pytest

from kdkit.report import words as report_words
from kdkit.report.drawing import LETTERS, groups, labels, looks
from kdkit.report.lines import spaced
from kdkit.study.findings import Cost, Difference, Findings, Interval, Teacher, Variant

COST = Cost(seconds=3, cpu_seconds=4, memory=2**20, images_per_second=1000, parameters=1234, macs=5_000_000, bytes=2048, latency=0.001)
TEACHER = Teacher("big", {"top1": 99.25, "nll": 0.1}, 99, 10_000_000, 4096, 0.004)


def variant(name, values, base=None, interval=None, **more):
    difference = None
    if base is not None:
        both = Interval(*interval) if interval else None
        difference = Difference(tuple(a - b for a, b in zip(values, base, strict=True)), both, both)
    seeds = tuple(range(len(values)))
    folders = tuple(Path(f"{name}-{seed}") for seed in seeds)
    return Variant(name, "", seeds, folders, {"top1": tuple(values)} if values else {}, {}, difference, COST if values else None, **more)


def findings(*variants, teacher=TEACHER):
    return Findings("study", "", variants[0].name, "", variants, teacher, {}, {}, {})


def said(*variants, **more):
    return " ".join(report_words.answer(findings(*variants, **more)))


BASE = variant("alone", (90.0, 92.0))


def test_an_interval_above_0_is_told_with_its_seeds():
    text = said(BASE, variant("taught", (92.0, 94.5), (90.0, 92.0), (0.9, 3.6)))
    assert "Best after the last epoch: taught, 93.25 ± 1.77 % top-1, +2.25 [0.90, 3.60] points over alone; the teacher has 99.25 %." in text
    assert "paired t over 2 seeds) does not hold 0." in text and "flattering" not in text


def test_an_interval_that_holds_0_may_be_chance():
    better = variant("taught", (92.0, 94.5), (90.0, 92.0), (-0.9, 5.4))
    assert "holds 0: the difference may be chance" in said(BASE, better)
    text = said(BASE, better, variant("hint", (89.0, 90.0), (90.0, 92.0), (-2.5, -0.5)))
    assert "best of several" in text and "+2.25 [−0.90, 5.40]" in text
    assert (
        "2 variants were set against alone: 0 better with an interval above 0, 1 worse with one below 0, 1 not to be told from it." in text
    )


def test_other_cases():
    one = said(variant("alone", (90.0,)), variant("taught", (92.0,), (90.0,)), teacher=None)
    assert "taught, 92.00 % top-1, +2.00 points over alone." in one and "share one seed only" in one and "±" not in one
    assert "No variant is better than the baseline, alone" in said(BASE, variant("worse", (80.0, 81.0), (90.0, 92.0), (-12, -9)))
    assert said(BASE, teacher=None).startswith("alone reaches 91.00 ± 1.41 % top-1 on the test data after the last epoch (2 seeds).")
    assert "nothing to tell" in said(variant("alone", (), failures={0: "NaN"}))
    lost = variant("alone", (), failures={0: "NaN"})
    assert "no run of the baseline, alone, is finished" in said(lost, variant("taught", (90.0, 91.0)))


def test_averaged_weights_are_told():
    mean = "with the mean of the weights of the 3 epochs that are best on validation"
    averaged = variant("alone", (90.0, 92.0), averaged=3)
    assert f"on the test data {mean} (2 seeds)" in said(averaged, teacher=None)
    both = findings(averaged, variant("taught", (92.0, 94.5), (90.0, 92.0), (0.9, 3.6)))
    assert both.moment == f"after the last epoch, but for alone: {mean}"
    assert report_words.accuracy_table(both).caption.startswith(f"Test data, {both.moment} unless")


def test_the_tables_have_a_row_each_and_no_empty_column():
    found = findings(BASE, variant("taught", (92.0, 94.5), (90.0, 92.0), (0.9, 3.6)))
    table = report_words.accuracy_table(found)
    assert list(table.header) == ["variant", "top-1 %", "difference, points"]
    assert [list(row) for row in table.rows] == [
        ["alone (baseline)", "91.00 ± 1.41", "–"], ["taught", "93.25 ± 1.77", "+2.25 [0.90, 3.60]"], ["teacher: big", "99.25", "–"],
    ]  # fmt: skip
    assert table.marked == 1 and "2 seeds" in table.caption
    cost = report_words.cost_table(found)
    assert cost.rows[1] == ["taught", "4.0", "3.0", "1.0 MiB", "1,000", "1,234", "5.00 M", "2 KiB", "1.00 ms (× 0.25)"]
    assert all(len(row) == len(cost.header) for row in cost.rows)
    unknown = report_words.cost_table(findings(BASE, teacher=Teacher("gone", {"top1": 99.0}, 0, 0, 0, 0.0)))
    assert [row[0] for row in unknown.rows] == ["alone"] and unknown.rows[0][-1] == "1.00 ms"
    assert "no deviation" in report_words.accuracy_table(findings(variant("alone", (90.0,)))).caption


def test_names_in_pictures_are_short_and_stay_different():
    long = [f"a-variant-{'x' * 60}-{'y' * 40}{i}{'z' * 20}" for i in range(12)]
    found = labels([*long, "short"])
    assert len(set(found.values())) == 13 and max(map(len, found.values())) <= LETTERS and found["short"] == "short"
    assert all(name.startswith("a-variant-") for name in list(found.values())[:12])


def test_every_variant_is_in_one_panel_and_the_baseline_in_all():
    names = [f"v{i}" for i in range(13)]
    panels = groups(names, "v4")
    assert all(panel[0] == "v4" and len(panel) <= 6 for panel in panels)
    assert sorted(name for panel in panels for name in panel[1:]) == sorted(set(names) - {"v4"})
    assert groups(["v4"], "v4") == [["v4"]]
    for panel in panels:  # told apart in grey: no two have the same dashes and marker
        found = [looks(names, "v4")[name] for name in panel]
        assert len({(str(one.dashes), one.marker) for one in found}) == len(panel)


@pytest.mark.parametrize("wanted", [[5, 5, 5, 5], [0, 0.2, 5, 9.9, 10], [1, 2, 3], [3], [0.1, 0.2, 0.3, 9, 9, 9]])
def test_names_beside_a_picture_keep_apart_and_inside(wanted):
    places = spaced(wanted, 1.0, 0, 10)
    assert all(b - a >= 1 - 1e-9 for a, b in zip(places, places[1:], strict=False))
    assert min(places) >= 0 and max(places) <= 10
    assert places == wanted or any(b - a < 1 for a, b in zip(wanted, wanted[1:], strict=False))
