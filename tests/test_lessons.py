"""Lessons that have images of their own, students that are read by their schedule, and arrangements."""

import pytest
import torch
import torch.nn.functional as F
from training import PLAIN, write

import kdkit
from kdkit import recipe
from kdkit.engine import objective
from kdkit.runs.networks import ModelFactory
from kdkit.testing import random_batch, random_outputs


def test_a_lesson_may_have_its_own_images_and_another_for_the_labels(tmp_path):
    found = objective.build(recipe.load(write(tmp_path, losses=[{"use": "cross_entropy"}, {"use": "logit_kl", "only_correct": True}])))
    batch, answer, teacher = random_batch(6), random_outputs(size=6), random_outputs(size=3, seed=1)
    half = batch.map(lambda x: x[::2])
    seen = answer.map(lambda x: x[::2])
    alone = found(kdkit.Lesson(seen, [teacher], batch=half), batch)
    assert alone.terms["cross_entropy"] == F.cross_entropy(seen.logits, half.labels)
    assert alone.terms["logit_kl"] == found(kdkit.Lesson(seen, [teacher]), half).terms["logit_kl"]
    whole = found(kdkit.Lesson(seen, [teacher], batch=half, supervised=kdkit.Lesson(answer)), batch)
    assert whole.terms["cross_entropy"] == F.cross_entropy(answer.logits, batch.labels)
    assert whole.terms["logit_kl"] == alone.terms["logit_kl"]


def test_map_changes_every_tensor_of_a_batch():
    batch = kdkit.Batch({"ids": torch.arange(4)}, torch.arange(4), torch.arange(4), (torch.arange(4.0),))
    half = batch.map(lambda x: x[::2])
    assert half.inputs["ids"].tolist() == half.labels.tolist() == half.index.tolist() == half.views[0].tolist() == [0, 2]


def test_a_schedule_taps_layers_of_its_own(tmp_path):
    loaded = recipe.load(write(tmp_path))
    info = kdkit.DataInfo((3, 8, 8), 6, 48, 20)
    student = ModelFactory(loaded, info, {}, device=torch.device("cpu")).student(taps=["penultimate"])
    assert list(student(torch.rand(2, 3, 8, 8)).features) == ["penultimate"]


def epoch_of(classes, seed=0):
    """Images in random order, and their classes."""
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed)) + 100
    return order, torch.tensor(classes)[order - 100]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("counts", [(12, 12, 24), (11, 7, 30), (47, 1), (1, 2, 3, 4, 38)])
def test_by_class_arranges_images_of_a_class_in_groups(size, counts):
    order, classes = epoch_of([k for k, count in enumerate(counts) for _ in range(count)])
    found = kdkit.by_class(size)(order, classes, 12)
    assert len(found) == len(order)
    label = dict(zip(order.tolist(), classes.tolist(), strict=True))
    groups = found.view(-1, size).tolist()
    assert all(len({label[image] for image in group}) == 1 for group in groups)
    for group in groups:
        assert len(set(group)) == min(size, counts[label[group[0]]])  # as many different ones as there are
    if all(count % size == 0 for count in counts):
        assert sorted(found.tolist()) == sorted(order.tolist())
    else:
        fills = sum(-count % size for count in counts)  # images that are there again, and so many at most that are not
        assert len(set(order.tolist()) - set(found.tolist())) <= fills


def test_by_class_draws_groups_by_chance():
    classes = [k for k in range(4) for _ in range(12)]
    one, again, other = (kdkit.by_class(2)(*epoch_of(classes, seed), 8) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    first = one[::2] - 100
    assert len({int(image) // 12 for image in first[:8]}) > 1  # not sorted by class


@pytest.mark.parametrize(("batch_size", "images"), [(7, 14), (8, 45)])
def test_by_class_refuses_a_batch_that_does_not_divide(batch_size, images):
    with pytest.raises(kdkit.RunError, match=rf"groups of 2.*\({batch_size}\).*{images} images"):
        kdkit.by_class(2)(*epoch_of([0] * images), batch_size)


def test_by_class_is_checked_before_training(tmp_path):
    alone = {**PLAIN, "teacher": None, "schedule": {"use": "cs_kd"}}
    with pytest.raises(kdkit.RecipeError, match=r"recipe.yaml:\d+: schedule: images come in groups of 2"):
        kdkit.check(write(tmp_path, alone, data={"batch_size": 9}))
    with pytest.raises(kdkit.RecipeError, match=r"train.mixup: stage 'class_wise' chooses which images come together"):
        kdkit.check(write(tmp_path, alone, train={"mixup": {"mixup_alpha": 0.2}}))
