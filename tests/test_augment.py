"""The random numbers are random and depend on what they should; crops and flips agree with a loop over images."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdkit.data import augment

NUMBERS = st.integers(0, 2**63 - 1)


def splitmix(seed, view, index, draw):
    """The same hash again, in plain integers."""
    state = 0
    for value in (seed, view, index, draw):
        x = (state + (value + 1) * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        state = x ^ (x >> 31)
    return state


@given(NUMBERS, NUMBERS, st.lists(NUMBERS, min_size=1, max_size=4), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_tensor_arithmetic_agrees_with_unsigned_integers(seed, view, index, draws):
    found = augment.uniform(seed, view, torch.tensor(index), draws)
    expected = [[(splitmix(seed, view, i, d) >> 40) / 2**24 for d in range(draws)] for i in index]
    assert found.tolist() == expected


def test_finaliser_is_splitmix64():
    first = 0xE220A8397B1DCDAF  # the generator's published first output for seed 0
    assert augment._hash_number(0, 0) == first


def test_uniform_fills_the_unit_interval_evenly():
    u = augment.uniform(3, 1, torch.arange(100_000), 4)
    assert u.dtype == torch.float32 and float(u.min()) >= 0 and float(u.max()) < 1
    for draw in u.T:
        counts = torch.histc(draw, 50, 0, 1)
        chi2 = float(((counts - 2000) ** 2 / 2000).sum())
        assert 20 < chi2 < 95  # 49 degrees of freedom: outside with probability 1e-4


@pytest.mark.parametrize("what", ["seed", "view", "index", "draw"])
def test_neighbouring_numbers_are_independent(what):
    index = torch.arange(50_000)
    u = augment.uniform(7, 5, index, 2)
    other = {
        "seed": augment.uniform(8, 5, index, 2)[:, 0],
        "view": augment.uniform(7, 6, index, 2)[:, 0],
        "index": augment.uniform(7, 5, index + 1, 2)[:, 0],
        "draw": u[:, 1],
    }[what]
    grid = torch.histogramdd(torch.stack([u[:, 0], other], 1), bins=[10, 10], range=[0.0, 1.0, 0.0, 1.0]).hist
    chi2 = float(((grid - 500) ** 2 / 500).sum())
    assert chi2 < 160  # 99 degrees of freedom: above with probability 1e-4


def test_seed_and_view_are_not_interchangeable():
    index = torch.arange(100)
    assert not torch.equal(augment.uniform(1, 2, index, 1), augment.uniform(2, 1, index, 1))
    assert augment.subseed(0, "train") != augment.subseed(0, "order") != augment.subseed(1, "order")


def test_a_sample_does_not_depend_on_its_batch():
    whole = augment.uniform(0, 3, torch.arange(1000), 3)
    some = torch.tensor([17, 999, 0])
    assert torch.equal(augment.uniform(0, 3, some, 3), whole[some])


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    augment.uniform(0, 0, torch.arange(10), 2)
    augment.permutation(0, 0, 10)
    assert torch.equal(before, torch.get_rng_state())


@given(st.integers(0, 2**31), st.integers(0, 500), st.integers(0, 300))
@settings(max_examples=30, deadline=None)
def test_permutation_has_every_number_once(seed, number, length):
    assert augment.permutation(seed, number, length).sort().values.tolist() == list(range(length))


def test_permutations_of_epochs_differ_and_come_again():
    first, second = augment.permutation(0, 0, 1000), augment.permutation(0, 1, 1000)
    assert not torch.equal(first, second) and torch.equal(first, augment.permutation(0, 0, 1000))
    assert abs(float(torch.corrcoef(torch.stack([first, second]).float())[0, 1])) < 0.13


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 4), st.booleans(), st.data())
@settings(max_examples=60, deadline=None)
def test_crop_flip_agrees_with_a_loop(batch, channels, height, width, padding, floats, data):
    images = torch.arange(1, 1 + batch * channels * height * width).remainder(251).reshape(batch, channels, height, width)
    images = images.float() / 251 if floats else images.to(torch.uint8)
    count = augment.crop_flip_count(padding)
    outcome = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), min_size=batch, max_size=batch)))
    original = images.clone()
    found = augment.crop_flip(images, outcome, padding)
    for b, number in enumerate(outcome.tolist()):
        place, mirrored = divmod(number, 2)
        top, left = divmod(place, 2 * padding + 1)
        for c, y, x in itertools.product(range(channels), range(height), range(width)):
            from_y, from_x = y + top - padding, (width - 1 - x if mirrored else x) + left - padding
            inside = 0 <= from_y < height and 0 <= from_x < width
            assert found[b, c, y, x] == (images[b, c, from_y, from_x] if inside else 0)
    assert found.dtype == images.dtype and torch.equal(images, original)


def test_every_outcome_comes_about_equally_often_and_images_differ_in_theirs():
    padding, n = 2, 50_000
    outcome = augment.draw_crop_flip(1, 9, torch.arange(n), padding, 0.5)
    counts = outcome.bincount(minlength=50)
    expected = n / augment.crop_flip_count(padding)
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert len(counts) == 50 and chi2 < 95
    assert len(outcome[:64].unique()) > 20  # one crop for a whole batch would give 2


@pytest.mark.parametrize(("flip", "low", "high"), [(0.0, 0, 0), (1.0, 1, 1), (0.3, 0.28, 0.32)])
def test_share_of_mirrored_images(flip, low, high):
    outcome = augment.draw_crop_flip(0, 0, torch.arange(10_000), 4, flip)
    assert low <= float((outcome % 2).float().mean()) <= high


def test_middle_place_leaves_an_image_as_it_is():
    images = torch.rand(3, 2, 5, 7)
    assert torch.equal(augment.crop_flip(images, torch.full((3,), (2 * 5 + 2) * 2), 2), images)
