"""Deviations and intervals, against formulas written out."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kdkit.contracts.task import ScoreInfo
from kdkit.study.findings import Findings, Interval, Variant, rank
from kdkit.study.intervals import (
    bootstrap_interval,
    corrected,
    gained,
    holm,
    p_value,
    paired,
    shown,
    spread,
    t_interval,
    with_differences,
)

MORE = ScoreInfo(name="top1", title="top-1", unit="%")
LESS = ScoreInfo(name="nll", title="NLL", unit="nats", digits=4, higher_is_better=False)

T_975 = {1: 12.7062, 2: 4.30265, 4: 2.77645, 9: 2.26216}  # any table of Student's t
VALUES = (1.25, 0.5, 2.75, -0.25, 1.0)


def test_spread_is_mean_and_sample_deviation():
    deviation = math.sqrt(sum((v - 1.05) ** 2 for v in VALUES) / 4)
    assert spread(VALUES) == f"1.05 +- {deviation:.2f}"
    assert spread([93.414]) == "93.41" and spread([]) == "" and spread([1, 2], 0) == "2 +- 1"
    assert spread([math.nan, 1.0]) == "nan" and spread([math.inf, 1.0]) == "inf"


@pytest.mark.parametrize("degrees", T_975)
def test_t_interval(degrees):
    values = np.random.default_rng(degrees).normal(2, 1, degrees + 1).tolist()
    half = T_975[degrees] * np.std(values, ddof=1) / math.sqrt(len(values))
    found = t_interval(values)
    assert found.low == pytest.approx(np.mean(values) - half, rel=1e-4)
    assert found.high == pytest.approx(np.mean(values) + half, rel=1e-4)


@pytest.mark.parametrize("values", [VALUES, (0.3, -0.1), (-2.0, -2.5, -1.0), (0.01, 0.02, 0.015, 0.011)])
def test_the_p_value_is_that_of_a_paired_t_test(values):
    assert p_value(values) == pytest.approx(stats.ttest_rel(values, [0.0] * len(values)).pvalue, rel=1e-9)
    interval = t_interval(values)
    assert (p_value(values) < 0.05) == (not interval.low <= 0 <= interval.high)


def test_equal_differences_have_no_deviation_to_test():
    assert p_value((1.0, 1.0, 1.0)) == 0 and p_value((0.0, 0.0)) == 1


def test_holm_on_a_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # times 3, 1, 2, 4; then none below an earlier one
    assert holm([0.5, 0.6]) == [1.0, 1.0] and holm([0.2]) == [0.2] and holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10), st.floats(0.001, 0.2))
def test_holm_rejects_what_stepping_down_rejects(values, level):
    """The procedure as published: from the smallest on, reject while p <= level / (how many are left)."""
    rejected, left = set(), sorted(range(len(values)), key=lambda i: values[i])
    while left and values[left[0]] * len(left) <= level:
        rejected.add(left.pop(0))
    assert {i for i, p in enumerate(holm(values)) if p <= level} == rejected


def test_the_variants_of_a_study_are_corrected_together():
    def one(name, values):
        difference = paired(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0)) if values else None
        return Variant(name, "", (0, 1, 2), (), {}, {}, difference, None)

    found = corrected([one("base", ()), one("a", (1.0, 1.2, 1.1)), one("b", (1.0, 2.0, -1.0)), one("single", (1.0,))])
    assert found[0].difference is None and found[3].difference.p_holm is None and found[3].difference.verdict(MORE) == "inconclusive"
    a, b = found[1].difference, found[2].difference
    assert a.p_holm == pytest.approx(2 * a.p) and b.p_holm == b.p and b.verdict(MORE) == "inconclusive"
    assert (a.verdict(MORE), a.verdict(LESS)) == ("better", "worse")
    assert corrected(found) == found


def test_bootstrap_is_near_the_percentiles_of_all_resamples():
    means = [sum(drawn) / 5 for drawn in itertools.product(VALUES, repeat=5)]  # all 3125, instead of 9999 at random
    found = bootstrap_interval(VALUES)
    assert found.low == pytest.approx(np.percentile(means, 2.5), abs=0.06)
    assert found.high == pytest.approx(np.percentile(means, 97.5), abs=0.06)
    assert found == bootstrap_interval(VALUES)


def test_equal_differences_have_an_interval_of_no_width():
    found = paired({0: 3.0, 1: 4.0, 2: 5.0}, {0: 2.0, 1: 3.0, 2: 4.0})
    assert found.values == (1.0, 1.0, 1.0) and found.t == found.bootstrap == Interval(1.0, 1.0)


def test_pairs_are_made_by_seed():
    found = paired({3: 5.0, 1: 7.0, 8: 1.0}, {1: 1.0, 3: 2.0, 5: 0.0})
    assert found.values == (3.0, 6.0)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_one_pair_has_no_interval():
    found = paired({0: 1.5}, {0: 1.0})
    assert found.t is None and found.bootstrap is None and shown(found) == "+0.50"


def test_a_value_that_is_not_finite_has_no_interval():
    found = paired({0: 1.5, 1: math.nan}, {0: 1.0, 1: 1.0})
    assert found.t is None and found.bootstrap is None


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12), st.floats(-50, 50))
def test_a_shift_of_both_changes_no_difference(values, shift):
    own = dict(enumerate(values))
    base = {seed: shift for seed in own}
    found = paired(own, base)
    mean = sum(v - shift for v in values) / len(values)
    assert found.t.low - 1e-9 <= mean <= found.t.high + 1e-9
    assert min(found.values) - 1e-9 <= found.bootstrap.low <= found.bootstrap.high <= max(found.values) + 1e-9


def test_a_difference_is_shown_with_its_interval():
    found = paired(dict(enumerate(VALUES)), dict.fromkeys(range(5), 0.0))
    assert shown(found) == f"+1.05 [{found.t.low:.2f}, {found.t.high:.2f}]"
    assert shown(found, 4) == f"+1.0500 [{found.t.low:.4f}, {found.t.high:.4f}]"


def test_the_rank_of_a_mean_follows_the_direction():
    assert rank(MORE, [1.0, 2.0]) == 1.5 and rank(LESS, [1.0, 2.0]) == -1.5
    assert rank(MORE, [math.nan, 1.0]) == rank(LESS, [math.nan, 1.0]) == -math.inf


def test_the_difference_is_paired_by_seed():
    def variant(name, seeds, top1):
        return Variant(name, "", seeds, (), {"top1": [v + 1 for v in top1]}, {"top1": top1} if top1 else {}, None, None)

    variants = (variant("base", (0, 1, 2), (80.0, 81.0, 82.0)), variant("more", (1, 2), (82.5, 82.5)), variant("none", (0,), ()))
    found = Findings("s", "", "base", "", variants, None, {}, {}, {})
    assert gained(found, variants[0], best=True) is None and gained(found, variants[2], best=True) is None
    expected = paired({1: 82.5, 2: 82.5}, {1: 81.0, 2: 82.0})
    assert gained(found, variants[1], best=True) == gained(found, variants[1]) == expected
    assert [one.difference and one.difference.values for one in with_differences(found).variants] == [None, expected.values, None]
