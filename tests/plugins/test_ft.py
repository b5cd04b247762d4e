import pytest
import torch
from naive_maps import convolved, pooled_alike
from training import PLAIN, metrics, train

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

FT = registry.load().losses["ft"]
PAIR = [{"student": "a", "teacher": "b"}]


def ft(student, teacher, size=4, frozen=False, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    loss = FT(FT.Options(layers=PAIR, **options))
    f_s, f_t = random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1)
    torch.manual_seed(0)
    loss.setup(f_s, f_t)
    loss.paraphrasers.requires_grad_(not frozen)
    return loss, f_s, f_t, random_batch(size)


def run(layers, x):
    for conv in layers[::2]:
        x = convolved(x, conv)
        x = torch.where(x > 0, x, 0.1 * x)
    return x


def formula(loss, student, teacher, batch):
    f_t, paraphraser, total = teacher.features["b"], loss.paraphrasers[0], 0
    factors = run(paraphraser.condense, f_t)
    f_s, constants = pooled_alike(run(loss.translators[0], student.features["a"]), factors.detach())
    for s, t in zip(f_s, constants, strict=True):
        total = total + ((s / (s**2).sum() ** 0.5 - t / (t**2).sum() ** 0.5).abs() ** loss.options.p).sum()
    value = total / f_s.numel()
    if next(paraphraser.parameters()).requires_grad:
        value = value + ((run(paraphraser.expand, factors) - f_t) ** 2).sum() / f_t.numel()
    else:
        value = value + sum(0 * weight.sum() for weight in paraphraser.parameters())
    return value


SHAPES = [((3, 4, 4), (3, 4, 4)), ((3, 4, 4), (5, 4, 4)), ((3, 8, 8), (5, 4, 4)), ((3, 2, 4), (2, 7, 6))]


@pytest.mark.parametrize("options", [{}, {"p": 2, "rate": 2.0}])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("size", [1, 2])
def test_is_the_formula(size, shapes, options):
    loss, *answers = ft(*shapes, size=size, **options)
    assert_agrees(loss, formula, *answers)


@pytest.mark.parametrize("shapes", SHAPES[:2])
def test_is_the_formula_on_a_usual_batch(shapes):
    loss, *answers = ft(*shapes, size=64)
    assert_agrees(loss, formula, *answers)


@pytest.mark.parametrize("shapes", SHAPES[1:])
def test_with_a_paraphraser_at_rest_it_is_the_papers_loss(shapes):
    loss, student, teacher, batch = ft(*shapes, frozen=True)
    torch.testing.assert_close(loss(student, teacher, batch), formula(loss, student, teacher, batch), rtol=1e-4, atol=1e-7)
    student.features["a"].requires_grad_()
    loss(student, teacher, batch).backward()
    assert student.features["a"].grad.any() and all(weight.grad.any() for weight in loss.translators.parameters())
    assert all(weight.grad is None for weight in loss.paraphrasers.parameters())


def test_the_paraphraser_learns_from_reconstruction_alone():
    loss, student, teacher, batch = ft((3, 4, 4), (5, 4, 4))
    weights = list(loss.paraphrasers.parameters())
    found = torch.autograd.grad(loss(student, teacher, batch), weights)
    error = torch.nn.functional.mse_loss(
        run(loss.paraphrasers[0].expand, run(loss.paraphrasers[0].condense, teacher.features["b"])), teacher.features["b"]
    )
    for ours, alone in zip(found, torch.autograd.grad(error, weights), strict=True):
        torch.testing.assert_close(ours, alone)


@pytest.mark.parametrize(("rate", "width"), [(0.5, 2), (1.0, 5), (2.0, 10), (0.01, 1)])
def test_rate_is_the_share_of_the_teachers_channels(rate, width):
    loss, student, teacher, _ = ft((3, 4, 4), (5, 4, 4), rate=rate)
    assert loss.translators[0](student.features["a"]).shape == (4, width, 4, 4)
    assert loss.paraphrasers[0].condense(teacher.features["b"]).shape == (4, width, 4, 4)


def test_several_pairs_are_averaged():
    layers = [*PAIR, {"student": "c", "teacher": "d"}]
    student = random_outputs({"a": (3, 4, 4), "c": (2, 2, 2)})
    teacher = random_outputs({"b": (5, 4, 4), "d": (2, 2, 2)}, seed=1)
    both, alone = FT(FT.Options(layers=layers)), []
    both.setup(student, teacher)
    for i, layer in enumerate(layers):
        one = FT(FT.Options(layers=[layer]))
        one.setup(student, teacher)
        one.paraphrasers[0].load_state_dict(both.paraphrasers[i].state_dict())
        one.translators[0].load_state_dict(both.translators[i].state_dict())
        alone.append(one(student, teacher, random_batch()))
    torch.testing.assert_close(both(student, teacher, random_batch()), sum(alone) / 2)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("p", [1, 2])
def test_gradient(p, shapes):
    loss, student, teacher, batch = ft(*shapes, size=2, p=p)
    loss, teacher = loss.double(), teacher.map(torch.Tensor.double)
    f = student.features["a"].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch), f)


def test_keeps_the_promises_with_squares():
    check_loss(FT, p=2, rate=1.0)


def test_in_stages_the_paraphraser_learns_first_and_then_rests(tmp_path):
    layers = [{"student": "stage2", "teacher": "stage2"}]
    stages = [
        {"name": "paraphraser", "losses": ["ft"], "train": ["ft.paraphrasers"], "epochs": 3},
        {"name": "student", "train": ["student", "ft.translators"], "epochs": 1},
    ]
    losses = [{"use": "cross_entropy"}, {"use": "ft", "layers": layers}]
    train(tmp_path, {**PLAIN, "losses": losses, "schedule": {"use": "staged", "stages": stages}})
    *first, last = [line["train"]["ft"] for line in metrics(tmp_path / "run") if line["kind"] == "epoch"]
    assert len(first) == 3 and first[0] > first[1] > first[2]
    assert last < first[2]  # without the reconstruction error


@pytest.mark.parametrize(("student", "teacher"), [((3, 4, 4), (5,)), ((15, 3), (16, 5)), ((3,), (5,))])
def test_refuses_what_has_no_positions(student, teacher):
    with pytest.raises(kdkit.ShapeError, match="student 'a' .*teacher 'b' .*must be maps"):
        ft(student, teacher)
