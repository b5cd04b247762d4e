import pytest
import torch

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

OFA = registry.load().losses["ofa"]
STAGES = {"map": (3, 4, 4), "tokens": (4, 6), "vector": (7,)}
PAIRS = [{"student": name, "teacher": "logits"} for name in STAGES]


def ofa(layers=(), size=6, classes=5, **options):
    """The loss, set up, and what it compares."""
    loss = OFA(OFA.Options(layers=layers, **options))
    student, teacher = random_outputs(STAGES, size=size, classes=classes), random_outputs(size=size, classes=classes, seed=1)
    if not layers:
        student = kdkit.Outputs(student.logits)
    loss.setup(student, teacher)
    return loss, student, teacher, random_batch(size, classes)


def formula(loss, student, teacher, batch):
    """One answer, one sample and one class at a time."""
    answers = [student.logits]
    for branch, pair in zip(loss.branches, loss.options.layers, strict=True):
        f = student.features[pair.student]
        vectors = f if f.ndim == 2 else sum(f[:, n] for n in range(f.shape[1])) / f.shape[1] if f.ndim == 3 else f.flatten(2).sum(2) / 16
        answers.append(vectors @ branch.weight.T + branch.bias)
    total = 0
    for z in answers:
        for z_s, z_t, label in zip(z, teacher.logits, batch.classes, strict=True):
            for c in range(len(z_s)):
                q, right = z_t[c].exp() / z_t.exp().sum(), float(c == label)
                total = total - ((q + right) ** loss.options.eps - right) * (z_s[c].exp() / z_s.exp().sum()).log()
    return total / len(batch.classes)


@pytest.mark.parametrize("eps", [1.0, 1.5, 0.5])
@pytest.mark.parametrize("layers", [(), PAIRS[:1], PAIRS], ids=["logits", "a map", "all"])
@pytest.mark.parametrize(("size", "classes"), [(1, 5), (2, 2)])
def test_is_the_formula(size, classes, layers, eps):
    loss, *answers = ofa(layers, size, classes, eps=eps)
    assert_agrees(loss, formula, *answers)


def test_is_the_formula_on_a_usual_batch():
    loss, *answers = ofa(PAIRS[1:], 64, 3, eps=1.4)
    assert_agrees(loss, formula, *answers)


def test_at_one_it_is_the_cross_entropy_with_the_teacher():
    loss, student, teacher, batch = ofa()
    expected = torch.nn.functional.cross_entropy(student.logits, teacher.logits.softmax(1))
    torch.testing.assert_close(loss(student, teacher, batch), expected)


def test_mixed_labels_count_as_their_largest_share():
    loss, student, teacher, batch = ofa(eps=2)
    shares = 0.6 * torch.nn.functional.one_hot(batch.labels, 5) + 0.08
    assert loss(student, teacher, batch) == loss(student, teacher, kdkit.Batch(batch.inputs, shares, batch.index))


def test_opposed_logits_of_ten_thousand():
    z = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    loss = ofa(classes=2, eps=2.0)[0]
    value = loss(kdkit.Outputs(z), kdkit.Outputs(torch.tensor([[1e4, -1e4]])), random_batch(1))
    value.backward()
    assert value.item() == 3 * 2e4  # (1 + 1)^2 - 1 on the label
    assert z.grad.tolist() == [[-3.0, 3.0]]


@pytest.mark.parametrize("name", STAGES)
def test_gradient(name):
    loss, student, teacher, batch = ofa([{"student": name, "teacher": "logits"}], size=2, eps=1.5)
    loss, teacher = loss.double(), teacher.map(torch.Tensor.double)
    z, f = (x.double().requires_grad_() for x in (student.logits, student.features[name]))
    assert torch.autograd.gradcheck(lambda z, f: loss(kdkit.Outputs(z, {name: f}), teacher, batch), (z, f))


def test_keeps_the_promises_with_branches():
    check_loss(OFA, layers=[{"student": "a", "teacher": "logits"}], eps=1.5)


def test_refuses_a_layer_without_channels():
    loss = OFA(OFA.Options(layers=PAIRS[:1]))
    with pytest.raises(kdkit.ShapeError, match=r"student 'map' \(6,\) is neither a vector"):
        loss.setup(random_outputs({"map": ()}), random_outputs())


def test_refuses_other_classes():
    with pytest.raises(kdkit.ShapeError, match=r"student logits \(6, 5\) and teacher logits \(6, 7\)"):
        OFA(OFA.Options()).setup(random_outputs(), random_outputs(classes=7))
