import pytest
import torch
import torch.nn.functional as F
from training import PLAIN, train, weights

import kdkit
from kdkit.recipe import registry
from kdkit.testing import assert_agrees, check_loss, random_batch, random_outputs

FRSKD = registry.load().losses["frskd"]
SHAPES = {"one": (3, 8, 8), "two": (4, 4, 4), "three": (5, 2, 2)}


def own(*layers):
    return [{"student": layer, "teacher": layer} for layer in layers]


def frskd(shapes=SHAPES, size=4, **options):
    """The loss, set up, and what it reads."""
    torch.manual_seed(0)
    loss, student = FRSKD(FRSKD.Options(layers=own(*shapes), **options)), random_outputs(shapes, size=size)
    loss.setup(student, None)
    with torch.no_grad():
        for shares in (*loss.pyramid.up_shares, *loss.pyramid.down_shares):
            shares.uniform_(0.2, 2)
    return loss, student, random_outputs(), random_batch(size)


def normalised(x, norm):
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def point(block, x):
    return normalised(torch.einsum("oc,bchw->bohw", block[0].weight[:, :, 0, 0], x), block[1]).clamp_min(0)


def separable(block, x):
    for depthwise, pointwise, norm in ((block[0], block[1], block[2]), (block[4], block[5], block[6])):
        x = torch.cat([F.conv2d(x[:, c : c + 1], depthwise.weight[c : c + 1], padding=1) for c in range(x.shape[1])], 1)
        x = normalised(torch.einsum("oc,bchw->bohw", pointwise.weight[:, :, 0, 0], x), norm).clamp_min(0)
    return x


def twice(x):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def half(x):
    return x.unflatten(3, (-1, 2)).amax(4).unflatten(2, (-1, 2)).amax(3)


def shared(shares, *maps):
    return sum(w * x for w, x in zip(shares, maps, strict=True)) / (shares.sum() + 1e-6)


def refined_maps(p, f1, f2, f3):
    """Three maps, each half the size of the one before: up to the first, then down again."""
    f1, f2, f3 = (f.clamp_min(0) for f in (f1, f2, f3))
    a1, a2, a3 = (point(block, f) for block, f in zip(p.lateral, (f1, f2, f3), strict=True))
    m2 = separable(p.up[1], shared(p.up_shares[1], a2, point(p.widen[1], twice(a3))))
    r1 = separable(p.up[0], shared(p.up_shares[0], a1, point(p.widen[0], twice(m2))))
    r2 = separable(p.down[0], shared(p.down_shares[0], point(p.skip[0], f2), m2, point(p.narrow[0], half(r1))))
    r3 = separable(p.down[1], shared(p.down_shares[1], point(p.skip[1], f3), point(p.narrow[1], half(r2))))
    return r1, r2, r3


def attention(f):
    rows = (f**2).sum(1).flatten(1) / f.shape[1]
    return rows / (rows**2).sum(1, keepdim=True).sqrt()


def formula(loss, student, teacher, batch):
    o, maps = loss.options, [student.features[pair.student] for pair in loss.options.layers]
    refined = refined_maps(loss.pyramid, *maps)
    z_r = refined[-1].flatten(2).mean(2) @ loss.pyramid.classifier.weight.T + loss.pyramid.classifier.bias
    labels = sum(-(z[k].exp() / z.exp().sum()).log() for z, k in zip(z_r, batch.labels, strict=True)) / len(z_r)
    p, q = ((z / o.temperature).exp() / (z / o.temperature).exp().sum(1, keepdim=True) for z in (student.logits, z_r.detach()))
    soft = o.temperature**2 * (q * (q / p).log()).sum() / len(p)
    hint = sum(((attention(f) - attention(r.detach())) ** 2).mean() for f, r in zip(maps, refined, strict=True))
    return o.labels * labels + o.soft * soft + o.hint * hint


@pytest.mark.parametrize("options", [{}, {"labels": 0.0}, {"soft": 0.0, "width": 1}, {"hint": 0.0, "temperature": 1.0}])
@pytest.mark.parametrize("size", [2, 5])
def test_is_the_formula(size, options):
    loss, *given = frskd(size=size, **options)
    assert_agrees(loss, formula, *given)


def test_the_self_teacher_learns_by_the_labels_alone():
    loss, student, _, batch = frskd(labels=0.0)
    student = student.map(lambda x: x.requires_grad_())
    loss(student, None, batch).backward()
    assert not any(p.grad is not None and p.grad.any() for p in loss.pyramid.parameters())
    assert all(x.grad.any() for x in (student.logits, *student.features.values()))


def test_its_labels_reach_the_students_stages_but_not_its_logits():
    loss, student, _, batch = frskd(soft=0.0, hint=0.0)
    student = student.map(lambda x: x.requires_grad_())
    loss(student, None, batch).backward()
    assert all(x.grad.any() for x in student.features.values()) and not student.logits.grad.any()
    assert all(p.grad.any() for p in loss.pyramid.parameters())


@pytest.mark.parametrize(
    "shapes",
    [
        {"a": (3, 9, 7), "b": (4, 4, 3)},
        {"a": (3, 4, 4), "b": (3, 4, 4), "c": (6, 1, 1)},
        {"a": (17, 6), "b": (9, 8)},
        {"a": (2, 4, 4), "b": (3, 8, 8)},
    ],
)
def test_maps_of_any_sizes_will_do(shapes):
    loss, student, _, batch = frskd(shapes)
    refined, z = loss.pyramid(loss.maps(student))
    assert [r.shape[2:] for r in refined] == [f.shape[2:] for f in loss.maps(student)] and z.shape == student.logits.shape
    assert loss(student, None, batch).isfinite()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"labels": 0.5, "hint": 0.0}, {"width": 1, "temperature": 1.0}])
def test_keeps_the_promises_with_options(options):
    check_loss(FRSKD, layers=own("a", "b"), **options)


def test_refuses():
    for layers in (own("one"), [*own("one"), {"student": "two", "teacher": "three"}]):
        with pytest.raises(kdkit.ShapeError, match="two or more of the student's own maps"):
            FRSKD(FRSKD.Options(layers=layers)).setup(random_outputs(SHAPES), None)
    with pytest.raises(kdkit.ShapeError, match="must be maps"):
        frskd({"a": (3,), "b": (4,)})
    with pytest.raises(kdkit.ShapeError, match=r"'a' \(4, 3, 1, 1\) has one position"):
        frskd({"a": (3, 1, 1), "b": (4, 1, 1)})


def test_trains_without_a_teacher_and_leaves_nothing_behind(tmp_path):
    refinement = {"use": "frskd", "layers": own("stage1", "stage2", "stage3")}
    recipe = {**PLAIN, "teacher": None, "schedule": {"use": "supervised"}, "train": {**PLAIN["train"], "epochs": 1}}
    train(tmp_path, {**recipe, "losses": [{"use": "cross_entropy"}, refinement]})
    train(tmp_path, {**recipe, "losses": [{"use": "cross_entropy"}]}, into="alone")
    ours, alone = weights(tmp_path / "run"), weights(tmp_path / "alone")
    assert ours.keys() == alone.keys() and not torch.equal(ours["conv1.weight"], alone["conv1.weight"])
