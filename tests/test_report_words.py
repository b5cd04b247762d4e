"""The sentences and tables of a report claim what the figures carry, and no more."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kdkit.contracts.task import ScoreInfo
from kdkit.study import intervals
from kdkit.study.findings import Cost, Difference, Findings, Interval, Length, Search, Teacher, Tuned, Variant
from kdkit.study.report import words as report_words
from kdkit.study.report.drawing import LETTERS, groups, labels, looks, spaced

COST = Cost(seconds=3, cpu_seconds=4, memory=2**20, images_per_second=1000, parameters=1234, macs=5_000_000, bytes=2048, latency=0.001)
SCORES = (
    ScoreInfo(name="top1", title="top-1", unit="%"),
    ScoreInfo(name="nll", title="NLL", unit="nats", digits=4, higher_is_better=False, meaning="cross-entropy"),
)
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
    return Findings("study", "", variants[0].name, "", intervals.corrected(variants), teacher, {}, {}, {}, scores=SCORES)


def said(*variants, **more):
    return " ".join(report_words.answer(findings(*variants, **more)))


BASE = variant("alone", (90.0, 92.0))
BASE_OF_THREE = variant("alone", (90.0, 92.0, 91.0))


def test_the_answer_follows_the_p_value_and_tells_its_seeds():
    text = said(BASE, variant("taught", (92.0, 94.01), (90.0, 92.0), (1.9, 2.1)))  # 2.00 and 2.01 more: p = 0.0016
    head = "Best after the last epoch: taught, 93.00 ± 1.42 % top-1 on test data, +2.01 [1.90, 2.10] points over alone; the teacher has 99.25 %."
    assert head in text and "paired t over 2 seeds. taught is better than alone (paired t, 5 %)." in text
    assert "chance" not in text and "flatters" not in text


def test_a_large_p_value_may_be_chance():
    better = variant("taught", (92.0, 94.5), (90.0, 92.0), (-0.9, 5.4))  # 2.0 and 2.5 more: p = 0.07
    text = said(BASE, better)
    assert "The difference may be chance." in text and "taught against alone: inconclusive (paired t, 5 %)." in text
    several = said(
        BASE, better, variant("hint", (88.0, 90.01), (90.0, 92.0), (-2.5, -0.5)), variant("other", (92.0, 94.01), (90.0, 92.0), (1, 3))
    )
    assert "1 of 3 variants is better than alone, 1 is worse, 1 is inconclusive (paired t, Holm-corrected, 5 %)." in several
    assert "which flatters it" in several
    assert "Against the next best, other: +0.24 [−2.87, 3.36] points (not corrected)." in several and "next best" not in text


def test_words_follow_the_corrected_values():
    base = (90.0, 92.0, 91.0)
    values = [(91.0, 93.0 + 0.23 * i, 92.1) for i in range(1, 5)]  # each p is below 0.05, not all of them after the correction
    others = [variant(f"v{i}", one, base, (0.1, 2)) for i, one in enumerate(values)]
    found = findings(BASE_OF_THREE, *others)
    ps = [v.difference.p for v in found.variants[1:]]
    assert max(ps) < 0.05 < max(v.difference.p_holm for v in found.variants[1:])
    better = sum(v.difference.p_holm < 0.05 for v in found.variants[1:])
    assert f"of 4 variants {'are' if better > 1 else 'is'} better than alone, none is worse, {4 - better}" in said(BASE_OF_THREE, *others)


def test_the_best_is_chosen_by_validation_where_there_is_any():
    first = variant("first", (93.0, 94.0), (90.0, 92.0), (1, 4), validation={"top1": (80.0, 81.0)})
    second = variant("second", (92.0, 93.0), (90.0, 92.0), (0, 3), validation={"top1": (82.0, 83.0)})
    base = replace(BASE, validation={"top1": (70.0, 70.0)})
    text = said(base, first, second)
    assert (
        text.startswith("Best on validation data after the last epoch: second, 92.50 ± 0.71 % top-1 on test data")
        and "flatters" not in text
    )
    assert said(base, replace(first, validation={}), second).startswith("Best after the last epoch: first")  # not all have validation data
    best_alone = replace(base, validation={"top1": (90.0, 90.0)})
    assert said(best_alone, first).startswith("No variant is better on validation data than the baseline, alone")


def test_lengths_and_the_teachers_data_are_told():
    lengths = {"alone": Length(100, 10, 40, 1000), "longer": Length(100, 20, 80, 2000)}
    base = replace(BASE, length=lengths["alone"])
    longer = variant("longer", (92.0, 94.5), (90.0, 92.0), (0.9, 3.6), length=lengths["longer"])
    teacher = replace(TEACHER, lengths=(Length(800, 5, 160, 4000),))
    table = report_words.cost_table(findings(base, longer, teacher=teacher))
    assert list(table.header)[1:3] == ["steps", "images seen"]
    assert [row[1:3] for row in table.rows] == [["40", "1,000"], ["80 (× 2)", "2,000 (× 2)"], ["160", "4,000"]]
    sentence = "The teacher was trained on 800 labelled examples (5 epochs, 160 steps); the students have 100."
    assert sentence in said(base, longer, teacher=teacher)
    more = replace(longer, name="more", length=Length(800, 5, 40, 2000))
    assert "the students have 100; more: 800." in said(base, longer, more, teacher=teacher)
    assert "On what the teacher was trained is not known; the students have 100." in said(base, longer)


def test_a_search_is_told_with_its_cost_and_edges():
    tuned = Tuned("lr 0.1", {"lr": 0.1}, ("lr",), {"lr 0.05": 80.0, "lr 0.1": 81.0}, 12.0)
    base = replace(BASE, tuned=tuned)
    found = replace(
        findings(base, variant("taught", (92.0, 94.5), (90.0, 92.0), (0.9, 3.6))), search=Search({"lr": (0.05, 0.1)}, (2, 3), 8, 24.0)
    )
    text = dict(report_words.protocol(found, {}))["Search"]
    assert "(lr 0.05, 0.1)" in text and "seeds 2, 3" in text and "8 runs and 24 s" in text and "may lie beyond: alone (lr 0.1)." in text
    assert [row[list(report_words.score_table(found).header).index("chosen")] for row in report_words.score_table(found).rows][
        0
    ] == "lr 0.1"


def test_the_answer_in_other_cases():
    one = said(variant("alone", (90.0,)), variant("taught", (92.0,), (90.0,)), teacher=None)
    assert "taught, 92.00 % top-1 on test data, +2.00 points over alone." in one and "share one seed only" in one and "±" not in one
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
    assert report_words.score_table(both).caption.startswith(f"Test data, {both.moment} unless")


def test_the_tables_have_a_row_each_and_no_empty_column():
    found = findings(BASE, variant("taught", (92.0, 94.5), (90.0, 92.0), (0.9, 3.6)))
    table = report_words.score_table(found)
    assert list(table.header) == ["variant", "top-1 %", "difference, points", "p"]
    assert [list(row) for row in table.rows] == [
        ["alone (baseline)", "91.00 ± 1.41", "–", "–"], ["taught", "93.25 ± 1.77", "+2.25 [0.90, 3.60]", "0.070"],
        ["teacher: big", "99.25", "–", "–"],
    ]  # fmt: skip
    assert table.marked == 1 and "2 seeds" in table.caption
    cost = report_words.cost_table(found)
    assert cost.rows[1] == ["taught", "4.0", "3.0", "1.0 MiB", "1,000", "1,234", "5.00 M", "2 KiB", "1.00 ms (× 0.25)"]
    assert all(len(row) == len(cost.header) for row in cost.rows)
    fast = replace(BASE, cost=replace(COST, latency=0.000_004))
    assert report_words.cost_table(findings(fast)).rows[0][-1] == "0.0040 ms (× 0.0010)"
    unknown = report_words.cost_table(findings(BASE, teacher=Teacher("gone", {"top1": 99.0}, 0, 0, 0, 0.0)))
    assert [row[0] for row in unknown.rows] == ["alone"] and unknown.rows[0][-1] == "1.00 ms"
    assert "no deviation" in report_words.score_table(findings(variant("alone", (90.0,)))).caption


def test_a_score_of_which_less_is_better_is_told_so():
    less = dict(scores=SCORES[::-1], agreement=())
    base, taught, worse = (
        replace(variant(name, (90.0, 91.0, 92.0)), last={"nll": values, "top1": (90.0, 91.0, 92.0)})
        for name, values in (("alone", (0.5, 0.6, 0.7)), ("taught", (0.4, 0.5, 0.6001)), ("worse", (0.7, 0.8, 0.9001)))
    )
    found = intervals.with_differences(replace(findings(base, worse, taught), **less))
    text = " ".join(report_words.answer(found))
    head = "Best after the last epoch: taught, 0.5000 ± 0.1001 nats NLL on test data, −0.1000 [−0.1001, −0.0998] nats against alone; "
    assert text.startswith(f"{head}the teacher has 0.1000 nats.")
    assert "Against the next best, worse: −0.3000 [−0.3000, −0.3000] nats (not corrected)." in text
    assert "1 of 2 variants is better than alone, 1 is worse, none is inconclusive" in text
    table = report_words.score_table(found)
    assert list(table.header) == ["variant", "NLL, nats ↓", "difference, nats", "p"] and table.marked == 2
    further = report_words.further_table(found)
    assert list(further.header) == ["variant", "top-1 %"] and further.caption == ""
    assert report_words.further_table(replace(found, scores=SCORES)).caption == "NLL: cross-entropy."
    plain = replace(SCORES[0], title="kappa", unit="", digits=3)
    assert list(report_words.score_table(replace(found, scores=(plain,))).header) == ["variant", "kappa", "difference", "p"]


def test_findings_of_an_older_kdkit_have_the_names_of_their_scores(tmp_path):
    last = {"top1": (90.0,), "nll": (0.5,), "agreement": (80.0,), "loss": (0.1,), "late_loss": (0.2,)}
    Findings("s", "", "a", "", (replace(variant("a", (90.0,)), last=last),), TEACHER, {}, {}, {}).save(tmp_path / "new.json")
    older = {
        key: value for key, value in json.loads((tmp_path / "new.json").read_text()).items() if key not in ("scores", "agreement", "sha256")
    }
    (tmp_path / "old.json").write_text(json.dumps(older))
    found = Findings.load(tmp_path / "old.json")
    assert [one.title for one in found.scores] == ["top1", "nll"] and found.deciding.higher_is_better
    assert [one.title for one in found.agreement] == ["agreement"] and found == Findings.load(tmp_path / "new.json")
    assert list(report_words.score_table(found).header) == ["variant", "top1", "agreement"]


def test_names_in_pictures_are_short_and_stay_different():
    long = [f"a-variant-{'x' * 60}-{'y' * 40}{i}{'z' * 20}" for i in range(12)]
    found = labels([*long, "short"])
    assert len(set(found.values())) == 13 and max(map(len, found.values())) <= LETTERS and found["short"] == "short"
    assert all(name.startswith("a-variant-") for name in list(found.values())[:12])


def test_every_variant_is_in_one_panel_and_the_baseline_in_all():
    names = [f"v{i}" for i in range(13)]
    panels = groups(names, "v4")
    assert [len(panel) for panel in panels] == [4, 4, 4, 4] and all(panel[0] == "v4" for panel in panels)
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
