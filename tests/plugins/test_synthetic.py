"""Synthetic images are what the options say, come again for a seed, and can be learned."""

import pytest
import torch
from kdkit_plugins.datasets.synthetic import Synthetic, SyntheticOptions


def source(**options):
    return Synthetic(SyntheticOptions(**options))


@pytest.mark.parametrize("options", [{}, {"num_classes": 3, "image_size": 8, "channels": 1, "train": 31, "test": 7}])
def test_images_are_as_announced(options):
    info = source(**options).info()
    for part, count in (("train", info.num_train), ("test", info.num_test)):
        found = source(**options).split(part)
        assert found.images.shape == (count, *info.image_shape)
        sizes = found.labels.bincount(minlength=info.num_classes)
        assert len(sizes) == info.num_classes and int(sizes.max() - sizes.min()) <= 1


def test_the_seed_gives_the_images():
    small = {"train": 50, "test": 50}
    first, again, other = (source(seed=seed, **small).split("train").images for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, source(seed=1, **small).split("test").images)


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    source(train=20, test=10).split("train")
    assert torch.equal(before, torch.get_rng_state())


def test_the_nearest_class_mean_knows_most_test_images():
    made = source(image_size=16, train=1000, test=300)
    train, test = made.split("train"), made.split("test")
    means = torch.stack([train.images[train.labels == k].float().mean(0) for k in range(10)]).flatten(1)
    found = torch.cdist(test.images.float().flatten(1), means).argmin(1)
    assert float((found == test.labels).float().mean()) > 0.8


def test_noise_makes_it_harder():
    images = [source(noise=noise, train=20).split("train").images.float() for noise in (0.0, 0.5)]
    rough = [float((i[..., 1:] - i[..., :-1]).abs().mean()) for i in images]
    assert rough[1] > 3 * rough[0]
