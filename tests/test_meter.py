"""The meter's means against plain sums."""

import math

import pytest
import torch

from kdkit.engine.meter import Meter
from kdkit.engine.objective import Value
from kdkit.errors import RunError


def value(samples=4, weight=2.0, **terms):
    tensors = {name: torch.tensor(float(number)) for name, number in terms.items()}
    weighted = {name: weight * tensor for name, tensor in tensors.items()}
    return Value(sum(weighted.values(), start=torch.zeros(())), tensors, weighted, samples)


def test_means_over_the_steps_of_an_epoch():
    numbers = torch.rand(7, 2, dtype=torch.float64).float().tolist()
    meter = Meter()
    for step, (a, b) in enumerate(numbers, 1):
        meter.add(step, [value(a=a, b=b)], 1)
        if step % 3 == 0:
            last = meter.read()
            assert last["a"] == pytest.approx(a, abs=0)
    meter.read()
    expected = [sum(column) / 7 for column in zip(*numbers, strict=True)]
    assert meter.means()["a"] == pytest.approx(expected[0], rel=1e-12)
    assert meter.means()["b.weighted"] == pytest.approx(2 * expected[1], rel=1e-6)
    assert meter.means()["loss"] == pytest.approx(2 * sum(expected), rel=1e-6)


def test_several_students_have_numbers_and_the_loss_is_their_sum():
    meter = Meter()
    meter.add(1, [value(a=1), value(a=3)], 2)
    assert meter.read() == {"loss": 8, "a@1": 1, "a@1.weighted": 2, "a@2": 3, "a@2.weighted": 6}


def test_accumulated_batches_count_by_their_size():
    meter = Meter()
    meter.add(1, [value(samples=6, a=1), value(samples=6, a=10), value(samples=2, a=5), value(samples=2, a=50)], 2)
    assert meter.read() == pytest.approx({"loss": 44, "a@1": 2, "a@1.weighted": 4, "a@2": 20, "a@2.weighted": 40})


def test_a_term_that_only_some_steps_have_is_averaged_over_those():
    meter = Meter()
    meter.add(1, [value(a=1)], 1)
    meter.add(2, [value(a=2, b=8)], 1)
    meter.add(3, [value(a=3)], 1)
    assert meter.read().keys() == {"loss", "a", "a.weighted"}
    assert meter.means()["b"] == 8
    assert meter.means()["a"] == 2


def test_a_term_of_zero_is_told_only_if_it_always_was():
    meter = Meter()
    for step, (a, b) in enumerate([(0, 1), (0, -1)], 1):
        meter.add(step, [value(a=a, b=b)], 1)
    meter.read()
    assert meter.means()["b"] == 0
    assert meter.silent() == ["a"]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_term_that_is_not_finite_is_named_with_its_step(number):
    meter = Meter()
    meter.add(6, [value(a=1, b=1)], 1)
    meter.add(7, [value(a=1, b=number)], 1)
    meter.add(8, [value(a=number, b=number)], 1)
    with pytest.raises(RunError, match=f"^step 7: b is {number}$"):
        meter.read()


def test_an_overflowing_sum_of_terms_is_told():
    meter = Meter()
    meter.add(3, [Value(torch.tensor(math.inf), {"a": torch.tensor(1.0)}, {"a": torch.tensor(1.0)}, 1)], 1)
    with pytest.raises(RunError, match="step 3: the sum of the losses is inf"):
        meter.read()


def test_the_meter_resumes_to_the_same_bits():
    numbers = torch.rand(9).tolist()
    meter, early, later = Meter(), Meter(), Meter()
    for step, number in enumerate(numbers):
        meter.add(step, [value(a=number)], 1)
        (early if step < 5 else later).add(step, [value(a=number)], 1)
        if step == 4:
            early.read()
            later.load_state_dict(early.state_dict())
    meter.read(), later.read()
    assert later.means() == meter.means()
    assert Meter().means() == {} and Meter().read() == {}
