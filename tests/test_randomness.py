"""Random numbers that depend on named parts alone."""

import random

import numpy as np
import pytest
import torch

from kdkit.randomness import derived, reseed, seeded


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_the_parts_of_a_seed_give_the_numbers():
    reseed(1, "stage", 2)
    first = draw()
    draw()
    reseed(1, "stage", 2)
    assert draw() == first
    for other in ((2, "stage", 2), (1, "stages", 2), (1, "stage", 3), ("stage", 1, 2)):
        reseed(*other)
        assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_reseed_is_the_same_as_torchs_own_seeding():
    reseed(5)
    ours = torch.rand(3)
    torch.manual_seed(derived(5))
    assert torch.equal(ours, torch.rand(3))


def test_steps_do_not_share_seeds():
    seeds = {derived(seed, stage, step) for seed in range(3) for stage in ("a", "b") for step in range(200)}
    assert len(seeds) == 1200
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_seeded_leaves_the_stream_outside_untouched():
    reseed(7)
    expected = [draw(), draw()]
    reseed(7)
    found = [draw()]
    with pytest.raises(RuntimeError), seeded("inside"):
        inside = draw()
        raise RuntimeError
    found.append(draw())
    assert found == expected
    with seeded("inside"):
        assert draw() == inside
