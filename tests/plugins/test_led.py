import itertools

import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

LED = registry.load().losses["led"]
PAIR = [{"student": "a", "teacher": "b"}]


def loss(**options):
    return LED(LED.Options(layers=PAIR, **options))


def answers(size, labels):
    student, teacher = (
        random_outputs({name: (labels, d)}, size=size, classes=labels, seed=seed) for seed, name, d in [(0, "a", 4), (1, "b", 6)]
    )
    return student, teacher, random_batch(size, labels, rows="labels")


def group(e_s, e_t):
    """Of the embeddings of one group, pair by pair; None without a pair."""
    apart = [{(i, j): (e[i] - e[j]).square().sum().sqrt() for i, j in itertools.permutations(range(len(e)), 2)} for e in (e_s, e_t)]
    if not apart[0]:
        return None
    means = [sum(d.values()) / len(d) for d in apart]
    gaps = [(apart[0][pair] / means[0] - apart[1][pair] / means[1]).abs() for pair in apart[0]]
    return sum(gap**2 / 2 if gap < 1 else gap - 0.5 for gap in gaps) / len(gaps)


def formula(loss, student, teacher, batch):
    """Label by label, then image by image."""
    e_s, e_t, has = student.features["a"], teacher.features["b"], batch.labels >= 0.5
    by_label = [group(e_s[has[:, k], k], e_t[has[:, k], k]) for k in range(has.shape[1])]
    by_image = [group(e_s[i, has[i]], e_t[i, has[i]]) for i in range(len(has))]
    total = 0 * e_s.sum()
    for weight, groups in ((loss.options.class_aware, by_label), (loss.options.instance_aware, by_image)):
        counted = [value for value in groups if value is not None]
        total = total + weight * sum(counted) / max(len(counted), 1)
    return total


@pytest.mark.parametrize(("size", "labels"), [(1, 4), (2, 3), (9, 5)])
def test_is_the_formula(size, labels):
    assert_agrees(loss(class_aware=0.7, instance_aware=2), formula, *answers(size, labels))


def test_without_two_labels_together_it_is_zero():
    student, teacher, batch = answers(3, 3)
    apart = kdkit.Batch(batch.inputs, torch.eye(3), batch.index)
    assert loss()(student, teacher, apart) == 0


def test_refuses_what_is_no_embedding_for_each_label():
    student, teacher = (random_outputs({name: (4, 6)}, classes=3) for name in "ab")
    with pytest.raises(kdkit.ShapeError, match=r"led: 'a' \(6, 4, 6\) is not an embedding for each label, \(B, 3, D\); tap a decoder"):
        loss().setup(student, teacher)
