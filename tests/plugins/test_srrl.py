import dataclasses

import pytest
import torch
import torch.nn.functional as F

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs
from kdkit.testing.forms import CLASSES, Network

SRRL = registry.load().losses["srrl"]
PAIR = [{"student": "a", "teacher": "b"}]


def srrl(student, teacher, size=4, layers=PAIR):
    """The loss, set up with networks whose logits are their classifiers' of the layers, and what it compares."""
    torch.manual_seed(0)
    networks = Network({"a": student}), Network({"b": teacher})
    s, t = random_outputs({"a": student}, size=size), networks[1].answer(random_outputs({"b": teacher}, size=size, seed=1))
    loss = SRRL(SRRL.Options(layers=layers))
    loss.setup(s, t, kdkit.Context(*networks, CLASSES, 64, torch.arange(64) % CLASSES))
    return loss, s, t, random_batch(size)


def positions(f):
    """(B, C, P): the channels at each position."""
    if f.ndim == 3:
        return f.transpose(1, 2)
    return f[:, :, None] if f.ndim == 2 else f.flatten(2)


def formula(loss, student, teacher, batch):
    conv, norm, _ = loss.connector
    x = torch.einsum("bcp,dc->bdp", positions(student.features["a"]), conv.weight[:, :, 0, 0])
    if len(x) * x.shape[2] > 1:  # a single value per channel has no statistics; the running ones are 0 and 1
        mean, variance = x.mean((0, 2), keepdim=True), x.var((0, 2), correction=0, keepdim=True)
    else:
        mean, variance = 0, torch.ones_like(x)
    x = ((x - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None] + norm.bias[:, None]).clamp_min(0)
    v_s, v_t = x.mean(2), positions(teacher.features["b"]).mean(2)
    z = v_s @ loss.classifier.weight.T + loss.classifier.bias
    return ((v_s - v_t) ** 2).sum() / v_t.numel() + ((z - teacher.logits) ** 2).sum() / z.numel()


SHAPES = {
    "same": ((3, 4, 4), (3, 4, 4)),
    "channels": ((3, 4, 4), (5, 4, 4)),
    "larger": ((3, 8, 8), (5, 4, 4)),
    "not square": ((3, 4, 6), (5, 2, 3)),
    "tokens": ((7, 3), (9, 5)),
    "vectors": ((3,), (5,)),
    "map and vector": ((3, 4, 4), (5,)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("size", [1, 2, 64])
def test_is_the_formula(size, shapes):
    loss, student, teacher, batch = srrl(*shapes, size=size)
    if size == 2:  # of two vectors normalisation makes +-1, but for its eps: faint ones have a gradient that fp32 can hold
        student = student.map(lambda x: 0.02 * x)
    assert_agrees(loss, formula, student, teacher, batch)


def test_the_logits_are_those_that_the_teacher_s_classifier_gives():
    loss, _, teacher, batch = srrl((3, 4, 4), (3, 4, 4))
    loss.connector = torch.nn.Identity()
    alike = kdkit.Outputs(teacher.logits, {"a": teacher.features["b"]})
    assert loss(alike, teacher, batch).item() == pytest.approx(0, abs=1e-10)
    assert not any(p.requires_grad for p in loss.classifier.parameters())


@pytest.mark.parametrize("name", ["channels", "tokens", "vectors"])
def test_gradient(name):
    loss, student, teacher, batch = srrl(*SHAPES[name])
    loss, teacher = loss.double(), teacher.map(torch.Tensor.double)
    f = student.features["a"].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch), f)


def test_refuses_a_teacher_whose_head_is_more_than_pooling_and_a_linear_layer():
    s, t, networks = (
        random_outputs({"a": (3, 4, 4)}),
        random_outputs({"b": (5, 4, 4)}, seed=1),
        (Network({"a": (3,)}), Network({"b": (5,)})),
    )
    context = kdkit.Context(*networks, CLASSES, 64, torch.arange(64) % CLASSES)
    with pytest.raises(kdkit.ShapeError, match=r"teacher 'b' \(6, 5, 4, 4\) does not give the logits \(6, 5\) .*head is more than"):
        SRRL(SRRL.Options(layers=PAIR)).setup(s, t, context)
    rectified = networks[1].answer(dataclasses.replace(t, features={"b": F.relu(t.features["b"])}))
    with pytest.raises(kdkit.ShapeError, match="more than that behind the tapped layer; tap the last layer before the pooling"):
        SRRL(SRRL.Options(layers=PAIR)).setup(s, dataclasses.replace(t, logits=rectified.logits), context)


def test_refuses_to_be_set_up_without_networks_or_with_several_pairs():
    s, t = random_outputs({"a": (3, 4, 4)}), random_outputs({"b": (5, 4, 4)}, seed=1)
    with pytest.raises(kdkit.ShapeError, match="needs the teacher's classifier"):
        SRRL(SRRL.Options(layers=PAIR)).setup(s, t)
    with pytest.raises(kdkit.ShapeError, match="one pair, not 2"):
        srrl((3, 4, 4), (5, 4, 4), layers=PAIR * 2)
