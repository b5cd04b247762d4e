import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from promises import check_but

import kdkit
from kdkit.models.rest import Rest
from kdkit.models.tapped import TappedModel
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, random_batch, random_outputs

PROTEUS = registry.load().losses["proteus"]
LAST = {"student": "norm", "teacher": "norm"}
PATCHES = {"student": "patch_embed", "teacher": "norm"}


def behind(network, layer, taps):
    return Rest(TappedModel(network, input_shape=(3, 32, 32)), layer, taps)


def vit(width, patch, seed):
    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=patch, embed_dim=width, depth=2, num_heads=2, num_classes=5
    ).double()


def proteus(size=3, layers=(LAST, PATCHES), **options):
    """The loss, set up with two vision transformers, their answers, a batch; last the student."""
    student, teacher = vit(6, 8, 0), vit(10, 8, 1)
    images = torch.rand(size, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        s = kdkit.taps(student, [pair["student"] for pair in layers])(images)
        t = kdkit.taps(teacher, [pair["teacher"] for pair in layers])(images)
    torch.manual_seed(2)
    loss = PROTEUS(PROTEUS.Options(layers=list(layers), **options))
    loss.setup(s, t, kdkit.Context(student, teacher, 5, 0, torch.empty(0), behind))
    return loss, s.map(torch.Tensor.float), t.map(torch.Tensor.float), random_batch(size), student


def normalised(x, norm):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def guessed(head, x):
    return normalised(x, head[0]) @ head[1].weight.T + head[1].bias


def mse(a, b):
    return ((a - b) ** 2).sum() / b.numel()


def drawn(loss, size, count):
    """The loss's draws, one image at a time."""
    o = loss.options
    shares, chances, order = torch.rand(size, 1), torch.rand(size, 1), torch.rand(size, count)
    mask = torch.zeros(size, count, dtype=torch.bool)
    for i in range(size):
        share = o.ratio[0] + (o.ratio[1] - o.ratio[0]) * shares[i, 0]
        if chances[i, 0] < o.masked:
            mask[i, order[i].argsort()[: max(1, int((share * count).round()))]] = True
    return mask


def naive(network):
    def formula(loss, student, teacher, batch):
        o, s, t = loss.options, student.features["norm"], teacher.features["norm"]
        value = o.token * mse(guessed(loss.heads[0], s[:, 0]), t[:, 0]) + o.feature * mse(guessed(loss.heads[1], s), t)
        if len(o.layers) == 1:
            return value
        x, ours = student.features["patch_embed"], copy.deepcopy(network)
        mask = drawn(loss, len(x), x.shape[1])
        x = torch.stack(
            [torch.stack([loss.hidden if hides else token for hides, token in zip(*row, strict=True)]) for row in zip(mask, x, strict=True)]
        )
        tokens = ours.norm(ours.blocks(torch.cat([ours.cls_token.expand(len(x), -1, -1), x], 1) + ours.pos_embed))
        errors = [
            mse(guessed(loss.heads[2], a), b)
            for a, b, hides in zip(tokens[:, 1:].flatten(0, 1), t[:, 1:].flatten(0, 1), mask.flatten(), strict=True)
            if hides
        ]
        return value + o.patch * sum(errors) / max(len(errors), 1)

    return formula


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        ((LAST,), {"token": 2.0, "feature": 0.5}),
        ((LAST, PATCHES), {}),
        ((LAST, PATCHES), {"masked": 1.0, "ratio": (0.5, 0.9), "patch": 3.0}),
    ],
)
@pytest.mark.parametrize("size", [1, 8])
def test_is_the_formula(size, layers, options):
    loss, student, teacher, batch, network = proteus(size, layers, **options)
    assert_agrees(loss, naive(network), student, teacher, batch)


def test_a_map_has_its_mean_for_a_class_token_and_the_students_grid_is_resized():
    loss = PROTEUS(PROTEUS.Options(layers=[LAST], token=2.0))
    student, teacher = random_outputs({"norm": (3, 4, 4)}), random_outputs({"norm": (5, 5)}, seed=1)
    loss.setup(student, teacher)
    f_s, f_t = student.features["norm"], teacher.features["norm"]
    small = F.interpolate(f_s, size=(2, 2), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    mean = f_s.mean((2, 3))
    expected = 2 * mse(guessed(loss.heads[0], mean), f_t[:, 0]) + mse(guessed(loss.heads[1], torch.cat([mean[:, None], small], 1)), f_t)
    torch.testing.assert_close(loss(student, teacher, random_batch()), expected)


def test_how_many_patches_are_hidden():
    loss, *_ = proteus(masked=0.5, ratio=(0.1, 0.5))
    torch.manual_seed(0)
    counts = loss._drawn(4000, 100, torch.device("cpu")).sum(1)
    some = counts[counts > 0].float()
    assert len(some) / len(counts) == pytest.approx(0.5, abs=0.03)
    assert some.min() >= 10 and some.max() <= 50 and some.mean().item() == pytest.approx(30, abs=1)


def test_nothing_is_hidden_in_evaluation_and_nothing_drawn():
    loss, student, teacher, batch, _ = proteus(masked=1.0)
    before = torch.get_rng_state()
    value = loss.eval()(student, teacher, batch)
    assert torch.equal(torch.get_rng_state(), before)
    bare = proteus(layers=(LAST,))[0]
    bare.load_state_dict({name: x for name, x in loss.state_dict().items() if name in bare.state_dict()})
    torch.testing.assert_close(bare(student, teacher, batch), value)


def test_hidden_patches_teach_the_student_through_its_blocks():
    loss, student, teacher, batch, network = proteus(masked=1.0, token=0.0, feature=0.0, ratio=(0.25, 0.25))
    student = student.map(lambda x: x.requires_grad_())
    torch.manual_seed(0)
    loss(student, teacher, batch).backward()
    taught = student.features["patch_embed"].grad.abs().sum(2) > 0
    assert taught.sum(1).tolist() == [12, 12, 12]  # of 16, those that were shown
    assert network.blocks[0].mlp.fc1.weight.grad.any() and network.patch_embed.proj.weight.grad is None and loss.hidden.grad.any()


def test_keeps_the_promises_without_hidden_patches():
    check_but(PROTEUS, "check_every_option_has_an_effect")  # `patch`, `masked` and `ratio` are about hidden ones


def test_refuses():
    loss, student, teacher, *_ = proteus()
    with pytest.raises(kdkit.ShapeError, match="not 3 pairs"):
        proteus(layers=(LAST, PATCHES, PATCHES))
    with pytest.raises(kdkit.ShapeError, match="`setup` needs a context"):
        loss.setup(student, teacher)
    other = kdkit.Outputs(student.logits, {"norm": student.features["norm"], "patch_embed": torch.zeros(3, 4, 6)})
    with pytest.raises(kdkit.ShapeError, match=r"student 'patch_embed' \(3, 6, 2, 2\) must have the positions of 'norm'"):
        loss.setup(other, teacher, kdkit.Context(vit(6, 8, 0), None, 5, 0, torch.empty(0), behind))
