import pytest
import timm
import torch
from naive_maps import convolved, normalised, resized

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

Hint = registry.load().losses["hint"]
PAIR = [{"student": "a", "teacher": "b"}]


def hint(student, teacher, size=4, layers=PAIR, **options):
    """The loss, set up, and what it compares; shapes are without the batch."""
    loss = Hint(Hint.Options(layers=layers, **options))
    f_s, f_t = random_outputs({"a": student}, size=size), random_outputs({"b": teacher}, size=size, seed=1)
    torch.manual_seed(0)
    loss.setup(f_s, f_t)
    return loss, f_s, f_t, random_batch(size)


def formula(loss, student, teacher, batch):
    adapter, f_s, f_t = loss.adapters[0], student.features["a"], teacher.features["b"]
    if isinstance(adapter, torch.nn.Linear):
        guess = f_s @ adapter.weight.T + adapter.bias
    elif isinstance(adapter, torch.nn.Conv2d):
        guess = convolved(f_s, adapter)
    else:
        conv, norm, _ = adapter
        guess = convolved(f_s, conv)
        guess = normalised(guess, norm).clamp_min(0)
    if guess.shape != f_t.shape:
        guess = resized(guess, f_t.shape[2:])
    return ((guess - f_t) ** 2).sum() / f_t.numel()


SHAPES = {
    "same": ((3, 4, 4), (3, 4, 4)),
    "channels": ((3, 4, 4), (5, 4, 4)),
    "half": ((3, 8, 8), (5, 4, 4)),
    "half, odd": ((3, 7, 7), (5, 4, 4)),
    "half, not square": ((3, 8, 6), (5, 4, 3)),
    "double": ((3, 4, 4), (5, 8, 8)),
    "third": ((3, 9, 9), (5, 3, 3)),
    "larger": ((3, 3, 3), (5, 7, 8)),
    "tokens": ((4, 3), (4, 5)),
    "vectors": ((3,), (5,)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("adapter", ["regressor", "linear"])
@pytest.mark.parametrize("size", [1, 2])
def test_is_the_formula(size, adapter, shapes):
    loss, *answers = hint(*shapes, size=size, adapter=adapter)
    assert_agrees(loss, formula, *answers)


def test_is_the_formula_on_a_usual_batch():
    loss, *answers = hint((3, 4, 4), (5, 4, 4), size=64)
    assert_agrees(loss, formula, *answers)


def test_the_regressor_follows_the_shapes():
    kinds = {name: hint(*shapes)[0].adapters[0] for name, shapes in SHAPES.items()}
    found = {name: (type(a[0]).__name__, *a[0].kernel_size) for name, a in kinds.items() if isinstance(a, torch.nn.Sequential)}
    assert found == {
        "same": ("Conv2d", 1, 1),
        "channels": ("Conv2d", 1, 1),
        "half": ("Conv2d", 3, 3),
        "half, odd": ("Conv2d", 3, 3),
        "half, not square": ("Conv2d", 3, 3),
        "double": ("ConvTranspose2d", 4, 4),
        "third": ("Conv2d", 1, 1),
        "larger": ("Conv2d", 1, 1),
    }


@pytest.mark.parametrize("name", ["same", "half", "half, odd", "half, not square", "double"])
def test_the_regressor_gives_the_size_itself(name):
    loss, student, teacher, _ = hint(*SHAPES[name])
    assert loss.adapters[0](student.features["a"]).shape == teacher.features["b"].shape


def test_several_pairs_are_averaged():
    layers = [{"student": "a", "teacher": "b"}, {"student": "c", "teacher": "d"}]
    student = random_outputs({"a": (3, 4, 4), "c": (6,)})
    teacher = random_outputs({"b": (5, 4, 4), "d": (2,)}, seed=1)
    both = Hint(Hint.Options(layers=layers))
    both.setup(student, teacher)
    alone = []
    for i, layer in enumerate(layers):
        one = Hint(Hint.Options(layers=[layer]))
        one.setup(student, teacher)
        one.adapters[0].load_state_dict(both.adapters[i].state_dict())
        alone.append(one(student, teacher, random_batch()))
    torch.testing.assert_close(both(student, teacher, random_batch()), sum(alone) / 2)


@pytest.mark.parametrize("name", ["channels", "half", "double", "tokens", "vectors"])
def test_gradient(name):
    loss, student, teacher, batch = hint(*SHAPES[name], size=2)
    loss, teacher = loss.double(), teacher.map(torch.Tensor.double)
    f = student.features["a"].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: loss(kdkit.Outputs(student.logits, {"a": f}), teacher, batch), f)


def test_a_single_pixel_of_a_single_image():
    loss, student, teacher, batch = hint((3, 1, 1), (5, 1, 1), size=1)
    norm = loss.adapters[0][1]
    before = norm.running_mean.clone()
    value = loss(student, teacher, batch)
    expected = (loss.adapters[0][0](student.features["a"]) / (1 + norm.eps) ** 0.5).clamp_min(0)
    torch.testing.assert_close(value, ((expected - teacher.features["b"]) ** 2).mean())
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("adapter", ["regressor", "linear"])
def test_a_vision_transformer_and_a_convolutional_network(adapter):
    """Sixteen patches and a class token against a map of 2 x 2, on real networks, both ways."""
    images = torch.rand(3, 3, 64, 64)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=12, num_heads=2).eval()
    resnet = timm.create_model("resnet18", layers=[1, 1, 1, 1], channels=[4, 4, 8, 8]).eval()
    tokens, maps = (kdkit.taps(net, [layer])(images) for net, layer in ((vit, "blocks.1"), (resnet, "layer4")))
    for student, teacher, kind in ((tokens, maps, torch.nn.Conv2d), (maps, tokens, torch.nn.ConvTranspose2d)):
        layers = [{"student": next(iter(student.features)), "teacher": next(iter(teacher.features))}]
        loss = Hint(Hint.Options(layers=layers, adapter=adapter))
        loss.setup(student, teacher.detach())
        assert adapter == "linear" or type(loss.adapters[0][0]) is kind
        loss(student, teacher.detach(), random_batch(3)).backward()
    assert all(net.get_submodule(name).weight.grad.any() for net, name in ((vit, "patch_embed.proj"), (resnet, "conv1")))


def test_keeps_the_promises_with_a_linear_adapter():
    check_loss(Hint, adapter="linear")


@pytest.mark.parametrize(("student", "teacher"), [((3, 4, 4), (5,)), ((15, 3), (9, 5)), ((15, 3), (5, 2, 2)), ((), ())])
def test_refuses_what_no_layer_maps(student, teacher):
    with pytest.raises(kdkit.ShapeError, match="student 'a' .*teacher 'b' .*must be two maps") as caught:
        hint(student, teacher)
    assert str((4, *student)) in str(caught.value) and str((4, *teacher)) in str(caught.value)
