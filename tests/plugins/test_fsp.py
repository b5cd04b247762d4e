import pytest
import torch
from naive_maps import pooled_alike

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

FSP = registry.load().losses["fsp"]
NAMES = "abc"
LAYERS = [{"student": name, "teacher": name} for name in NAMES]


def fsp(student, teacher, size=4):
    """The loss, set up, and what it compares; shapes of each layer, without the batch."""
    loss = FSP(FSP.Options(layers=LAYERS[: len(student)]))
    maps_s = random_outputs(dict(zip(NAMES, student, strict=False)), size=size)
    maps_t = random_outputs(dict(zip(NAMES, teacher, strict=False)), size=size, seed=1)
    loss.setup(maps_s, maps_t)
    return loss, maps_s, maps_t, random_batch(size)


def flow(f, g):
    """One product of two channels at a time, (B, C1, C2)."""
    f, g = pooled_alike(f, g)
    return torch.stack(
        [
            torch.stack([torch.stack([(x * y).sum() / x.numel() for y in image_g]) for x in image_f])
            for image_f, image_g in zip(f, g, strict=True)
        ]
    )


def formula(loss, student, teacher, batch):
    names = [pair.student for pair in loss.options.layers]
    total = 0
    for one, other in zip(names, names[1:], strict=False):
        difference = flow(student.features[one], student.features[other]) - flow(teacher.features[one], teacher.features[other])
        total = total + (difference**2).sum() / difference.numel()
    return total / (len(names) - 1)


SHAPES = {
    "two layers": ([(3, 4, 4), (3, 4, 4)], [(3, 4, 4), (3, 4, 4)]),
    "other channels at the next layer": ([(3, 4, 4), (5, 4, 4)], [(3, 4, 4), (5, 4, 4)]),
    "smaller at the next layer": ([(3, 8, 6), (5, 4, 3)], [(3, 8, 6), (5, 4, 3)]),
    "larger at the next layer": ([(5, 2, 3), (3, 7, 7)], [(5, 2, 3), (3, 7, 7)]),
    "a larger teacher": ([(3, 4, 4), (5, 2, 2)], [(3, 8, 8), (5, 4, 4)]),
    "three layers": ([(3, 8, 8), (5, 4, 4), (2, 2, 2)], [(3, 8, 8), (5, 8, 8), (2, 4, 4)]),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("size", [1, 2])
def test_is_the_formula(size, shapes):
    loss, *answers = fsp(*shapes, size=size)
    assert_agrees(loss, formula, *answers)


def test_is_the_formula_on_a_usual_batch():
    loss, *answers = fsp(*SHAPES["other channels at the next layer"], size=64)
    assert_agrees(loss, formula, *answers)


def test_tokens_are_maps():
    loss, student, teacher, batch = fsp([(17, 3), (16, 5)], [(3, 4, 4), (5, 4, 4)])
    maps = {name: f[:, -16:].unflatten(1, (4, 4)).permute(0, 3, 1, 2) for name, f in student.features.items()}
    torch.testing.assert_close(loss(kdkit.Outputs(student.logits, maps), teacher, batch), loss(student, teacher, batch))


@pytest.mark.parametrize("name", SHAPES)
def test_gradient(name):
    loss, student, teacher, batch = fsp(*SHAPES[name], size=2)
    teacher = teacher.map(torch.Tensor.double)
    maps = {layer: f.double().requires_grad_() for layer, f in student.features.items()}

    def value(*given):
        return loss(kdkit.Outputs(student.logits, dict(zip(maps, given, strict=True))), teacher, batch)

    assert torch.autograd.gradcheck(value, tuple(maps.values()))


@pytest.mark.parametrize(
    ("student", "teacher", "layer"),
    [([(3, 4, 4), (5, 4, 4)], [(3, 4, 4), (6, 4, 4)], "b"), ([(3, 4, 4), (5, 4, 4)], [(4, 4, 4), (5, 4, 4)], "a")],
)
def test_refuses_other_channels(student, teacher, layer):
    with pytest.raises(kdkit.ShapeError, match=f"student '{layer}' .*teacher '{layer}' .*FSP matrices have one shape") as caught:
        fsp(student, teacher)
    at = "ab".index(layer)
    assert str((4, *student[at])) in str(caught.value) and str((4, *teacher[at])) in str(caught.value)


def test_refuses_a_single_layer():
    with pytest.raises(
        kdkit.ShapeError, match=r"student 'a' \(4, 3, 4, 4\) and teacher 'a' \(4, 3, 4, 4\) are one layer.*name two or more"
    ):
        fsp([(3, 4, 4)], [(3, 4, 4)])


def test_refuses_what_has_no_positions():
    with pytest.raises(kdkit.ShapeError, match="student 'b' .*teacher 'b' .*must be maps"):
        fsp([(3, 4, 4), (5,)], [(3, 4, 4), (5,)])
