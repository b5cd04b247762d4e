import pytest
import timm
import torch
from naive_maps import pooled_alike
from promises import check_but

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

AT = registry.load().losses["at"]
PAIR = [{"student": "a", "teacher": "b"}]


def formula(loss, student, teacher, batch):
    total, count = 0, 0
    for maps_s, maps_t in zip(*pooled_alike(student.features["a"], teacher.features["b"]), strict=True):
        a_s, a_t = ((maps.abs() ** loss.options.p).sum(0).flatten() for maps in (maps_s, maps_t))
        difference = a_s / (a_s**2).sum().sqrt() - a_t / (a_t**2).sum().sqrt()
        total, count = total + (difference**2).sum(), count + len(difference)
    return total / count


SHAPES = [
    ((3, 4, 4), (3, 4, 4)),
    ((3, 4, 4), (5, 4, 4)),
    ((3, 8, 8), (5, 4, 4)),
    ((3, 4, 4), (5, 8, 8)),
    ((3, 7, 5), (2, 4, 3)),
    ((3, 4, 6), (2, 8, 3)),
]


def answers(student, teacher, size):
    return random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1), random_batch(size)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("p", [1, 2, 3.5])
@pytest.mark.parametrize("size", [1, 2])
def test_is_the_formula(size, p, shapes):
    assert_agrees(AT(AT.Options(layers=PAIR, p=p)), formula, *answers(*shapes, size))


def test_is_the_formula_on_a_usual_batch():
    assert_agrees(AT(AT.Options(layers=PAIR)), formula, *answers((3, 4, 4), (5, 4, 4), 64))


def test_neither_scale_nor_sign_nor_channels_matter():
    student, teacher, batch = answers((3, 4, 4), (3, 4, 4), 4)
    alike = kdkit.Outputs(teacher.logits, {"b": -7 * student.features["a"].repeat(1, 2, 1, 1)})
    loss = AT(AT.Options(layers=PAIR))
    assert loss(student, alike, batch).item() == pytest.approx(0, abs=1e-12)
    assert loss(student, teacher, batch).item() > 1e-3


def test_a_vision_transformer_and_a_convolutional_network():
    """Sixteen patches and a class token against a map of 2 x 2, on real networks, both ways."""
    torch.manual_seed(0)  # a small network with random weights may be dead
    images = torch.rand(3, 3, 64, 64)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=12, num_heads=2).eval()
    resnet = timm.create_model("resnet18", layers=[1, 1, 1, 1], channels=[4, 4, 8, 8]).eval()
    tokens, maps = (kdkit.taps(net, [layer])(images) for net, layer in ((vit, "blocks.1"), (resnet, "layer4")))
    f, g = tokens.features["blocks.1"], maps.features["layer4"]
    assert f.shape == (3, 17, 12) and g.shape == (3, 8, 2, 2)
    as_map = kdkit.Outputs(tokens.logits, {"blocks.1": f[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)})
    for student, teacher, unfolded in ((tokens, maps.detach(), as_map), (maps, tokens.detach(), as_map)):
        layers = [{"student": next(iter(student.features)), "teacher": next(iter(teacher.features))}]
        loss = AT(AT.Options(layers=layers))
        loss.setup(student, teacher)
        value = loss(student, teacher, random_batch(3))
        pair = (unfolded, teacher) if student is tokens else (student, unfolded)
        torch.testing.assert_close(value, loss(*pair, random_batch(3)))
        value.backward()
    assert all(net.get_submodule(name).weight.grad.any() for net, name in ((vit, "patch_embed.proj"), (resnet, "conv1")))


def test_several_pairs_are_averaged():
    student = random_outputs({"a": (3, 4, 4), "c": (3, 2, 2)})
    teacher = random_outputs({"b": (5, 4, 4), "d": (2, 2, 2)}, seed=1)
    layers = [*PAIR, {"student": "c", "teacher": "d"}]
    both, *alone = (AT(AT.Options(layers=chosen))(student, teacher, random_batch()) for chosen in (layers, layers[:1], layers[1:]))
    torch.testing.assert_close(both, sum(alone) / 2)


@pytest.mark.parametrize("shapes", SHAPES[:4])
@pytest.mark.parametrize("p", [2, 3])
def test_gradient(shapes, p):
    student, teacher, batch = answers(*shapes, 2)
    f, loss = student.features["a"].double().requires_grad_(), AT(AT.Options(layers=PAIR, p=p))
    assert torch.autograd.gradcheck(lambda f: loss(kdkit.Outputs(student.logits, {"a": f}), teacher.map(torch.Tensor.double), batch), f)


@pytest.mark.parametrize("p", [1, 4, 8])
def test_keeps_the_promises_with_other_powers(p):
    check_but(AT, *(["check_survives_degenerate_inputs"] if p == 8 else []), p=p)  # 6e4 to the power of 8, summed, is no fp32 number


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("scale", [1e-12, 1e-7, 1e-4])
def test_faint_activations_have_bounded_gradients(p, scale):
    student, teacher, batch = answers((3, 4, 4), (5, 4, 4), 4)
    f = (scale * student.features["a"]).requires_grad_()
    AT(AT.Options(layers=PAIR, p=p))(kdkit.Outputs(student.logits, {"a": f}), teacher, batch).backward()
    assert f.grad.isfinite().all() and f.grad.abs().max() < 1e6


@pytest.mark.parametrize(("student", "teacher"), [((3, 4, 4), (5,)), ((15, 3), (16, 5)), ((3,), (5,))])
def test_refuses_what_has_no_positions(student, teacher):
    with pytest.raises(kdkit.ShapeError, match="student 'a' .*teacher 'b' .*must be maps"):
        AT(AT.Options(layers=PAIR)).setup(*answers(student, teacher, 4)[:2])
