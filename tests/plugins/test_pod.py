import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

POD = registry.load().losses["pod"]
PAIR = [{"student": "a", "teacher": "b"}]


def formula(loss, student, teacher, batch):
    distances = []
    for map_s, map_t in zip(student.features["a"], teacher.features["b"], strict=True):
        vectors = []
        for f in (map_s, map_t):
            sums = [(row**2).sum() for channel in f for row in channel] + [(column**2).sum() for channel in f for column in channel.T]
            vectors.append(torch.stack(sums) / torch.stack(sums).square().sum().sqrt())
        # rows come before columns in one channel here, after those of all channels there
        distances.append((vectors[0] - vectors[1]).square().sum().sqrt())
    return torch.stack(distances).mean()


def answers(student, teacher, size):
    return random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1), random_batch(size)


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 5, 3), (4, 2, 1)])
@pytest.mark.parametrize("size", [1, 4])
def test_is_the_formula(size, shape):
    assert_agrees(POD(POD.Options(layers=PAIR)), formula, *answers(shape, shape, size))


def test_a_student_that_begins_as_its_teacher_has_no_gradient_but_a_finite_one():
    student, _, batch = answers((3, 4, 4), (3, 4, 4), 4)
    f = student.features["a"].clone().requires_grad_()
    value = POD(POD.Options(layers=PAIR))(kdkit.Outputs(student.logits, {"a": f}), kdkit.Outputs(student.logits, {"b": f.detach()}), batch)
    value.backward()
    assert value == 0 and torch.equal(f.grad, torch.zeros_like(f))


def test_what_moves_along_a_row_costs_half():
    """A strong position that moves within its row leaves the sums over the columns as they were."""
    f_t = torch.zeros(1, 1, 4, 4)
    along, away = f_t.clone(), f_t.clone()
    f_t[0, 0, 0, 0] = along[0, 0, 0, 1] = away[0, 0, 1, 1] = 1.0
    loss, logits = POD(POD.Options(layers=PAIR)), torch.zeros(1, 2)
    near, far = (
        loss(kdkit.Outputs(logits, {"a": f}), kdkit.Outputs(logits, {"b": f_t}), random_batch(1)).item() ** 2 for f in (along, away)
    )
    assert near == pytest.approx(1.0) and far == pytest.approx(2.0)


def test_refuses_other_widths():
    student, teacher, _ = answers((3, 4, 4), (5, 4, 4), 2)
    with pytest.raises(kdkit.ShapeError, match="'a' has 3 channels and teacher 'b' 5; `pod` compares channel by channel"):
        POD.Options(layers=PAIR).check(student, teacher)
