"""What the data-free schedules share: each formula against a second derivation, by loops in double precision."""

import math

import pytest
import torch
from kdkit_plugins.schedules import _image_bank, _synthesis, cmi, dafl, deep_inversion, fast
from torch import nn

import kdkit


def softmax(row):
    top = [math.exp(x) for x in row]
    return [x / sum(top) for x in top]


def logits(seed, count=5, classes=4):
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_the_balance_is_the_negative_entropy_of_the_mean_prediction():
    z = logits(0)
    rows = [softmax(row) for row in z.tolist()]
    mean = [sum(row[k] for row in rows) / len(rows) for k in range(4)]
    assert float(_synthesis.balance(z)) == pytest.approx(sum(p * math.log(p) for p in mean))
    assert float(_synthesis.balance(torch.eye(4) * 100)) == pytest.approx(-math.log(4), abs=1e-6)


def test_disagreement_counts_images_on_whose_class_both_agree():
    t, s = logits(0, 12), logits(1, 12)
    rows = [kl(softmax(a), softmax(b)) if a.index(max(a)) == b.index(max(b)) else 0.0 for a, b in zip(t.tolist(), s.tolist(), strict=True)]
    assert 0 < sum(row > 0 for row in rows) < 12
    assert float(_synthesis.disagreement(t, s)) == pytest.approx(-sum(rows) / 12)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_competition_is_one_less_the_jensen_shannon_divergence(temperature):
    t, s = logits(2), logits(3)
    found = []
    for a, b in zip((t / temperature).tolist(), (s / temperature).tolist(), strict=True):
        p, q = softmax(a), softmax(b)
        middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
        found.append((kl(p, middle) + kl(q, middle)) / 2)
    assert float(_synthesis.competition(t, s, temperature)) == pytest.approx(1 - sum(found) / len(found))


def test_total_variation_is_the_mean_squared_difference_of_neighbours():
    images = torch.tensor([[[[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]]]])
    assert float(_synthesis.total_variation(images)) == pytest.approx((4 + 1 + 1) / 3 + (1 + 4 + 0 + 0) / 4)


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 2), nn.BatchNorm1d(2))
    for layer in (net[1], net[5]):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return net.eval()


def by_hand(net, batches, keep):
    """The distance of the last batch's statistics, mixed into those of the batches before."""
    mixed, total = {}, 0.0
    for images in batches:
        total, maps = 0.0, {1: net[0](images), 5: net[:5](images)}
        for place, x in maps.items():
            values = x.transpose(0, 1).flatten(1)
            own = [values.mean(1), ((values - values.mean(1, keepdim=True)) ** 2).mean(1)]
            if place in mixed:
                own = [keep * old + (1 - keep) * new for old, new in zip(mixed[place], own, strict=True)]
            mixed[place] = own
            known = (net[place].running_mean, net[place].running_var)
            total += sum(float(((a - b) ** 2).sum()) ** 0.5 for a, b in zip(own, known, strict=True))
    return total


@pytest.mark.parametrize("keep", [0.0, 0.9])
def test_the_distance_of_batch_norms_is_by_norms_of_means_and_biased_variances(keep):
    net = network()
    batches = [torch.rand(7, 1, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    norms = _synthesis.BatchNorms(net, keep)
    assert list(norms.layers) == ["1@input", "5@input"]
    seen = kdkit.taps(net, norms.layers)
    with torch.no_grad():
        for i, images in enumerate(batches, 1):
            features = seen(images).features
            assert float(norms.distance(features)) == pytest.approx(by_hand(net, batches[:i], keep), rel=1e-5)
            norms.remember(features)
    again = _synthesis.BatchNorms(net, keep)
    again.load_state_dict(norms.state_dict())
    assert torch.equal(again.distance(features), norms.distance(features))


def test_gradients_reach_the_images_through_a_frozen_network():
    net = network().requires_grad_(False)
    norms = _synthesis.BatchNorms(net)
    images = torch.rand(5, 1, 6, 6, requires_grad=True)
    norms.distance(kdkit.taps(net, norms.layers)(images).features).backward()
    assert images.grad.abs().sum() > 0


def test_the_contrast_tells_global_views_and_has_a_mean_of_each_kind():
    torch.manual_seed(0)
    local, wide = (nn.functional.normalize(torch.randn(5, 3, dtype=torch.float64), dim=1) for _ in range(2))
    rows = []
    for i in range(5):
        similar = [math.exp(float(local[i] @ wide[j]) / 0.2) for j in range(5)]
        rows.append(-math.log(similar[i] / sum(similar)))
    expected = sum(rows[:2]) / 2 + sum(rows[2:]) / 3
    assert float(cmi.contrast(local, wide, 2, 0.2)) == pytest.approx(expected)
    assert float(cmi.contrast(local, wide, 5, 0.2)) == pytest.approx(sum(rows) / 5)
    wide.requires_grad_(True)
    assert not cmi.contrast(local, wide, 2, 0.2).requires_grad  # the global side is a constant


def test_views_are_shifts_flips_and_cut_outs():
    images = torch.rand(40, 1, 6, 8)
    assert _synthesis.moved(images) is images
    torch.manual_seed(1)
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    shifts = [padded[:, :, i : i + 6, j : j + 8] for i in range(5) for j in range(5)]
    for shown in (_synthesis.moved(images, shift=2), _synthesis.moved(images, shift=2, flip=1).flip(3)):
        near = torch.stack([(shown - other).abs().amax((1, 2, 3)) for other in shifts]).amin(0)
        assert float(near.max()) < 1e-5
    flipped = (_synthesis.moved(images, flip=0.5) - images).abs().amax((1, 2, 3)) > 1e-4
    assert 8 < int(flipped.sum()) < 32
    cut = _synthesis.moved(images, smallest=0.25)
    assert cut.shape == images.shape and not torch.allclose(cut, images)
    flat = _synthesis.moved(torch.ones(9, 1, 6, 8), smallest=0.25)
    assert torch.allclose(flat[:, :, 1:-1, 1:-1], torch.ones(9, 1, 4, 6))  # a cut-out lies inside


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 8, 8), (2, 9, 14)])
def test_a_generator_makes_images_of_any_size(shape):
    made = _synthesis.Generator(6, 4, shape)(torch.randn(3, 6)).detach()
    assert made.shape == (3, *shape) and float(made.min()) >= 0 and float(made.max()) <= 1


def test_a_ring_keeps_the_last_rows_and_its_place():
    ring = _image_bank.Ring(5)
    for first in (0, 2, 4, 6):
        ring.add(torch.arange(first, first + 2))
    assert sorted(ring.rows.tolist()) == [3, 4, 5, 6, 7] and ring.latest(3).tolist() == [5, 6, 7]
    again = _image_bank.Ring(5)
    again.load_state_dict(ring.state_dict())
    for one in (ring, again):
        one.add(torch.tensor([8]))
    assert torch.equal(ring.rows, again.rows) and again.latest(2).tolist() == [7, 8]
    ring.add(torch.arange(20, 30))
    assert sorted(ring.rows.tolist()) == [25, 26, 27, 28, 29]
    early = _image_bank.Ring(5)
    early.add(torch.arange(3))
    late = _image_bank.Ring(5)
    late.load_state_dict(early.state_dict())
    late.add(torch.tensor([9]))
    assert late.latest(4).tolist() == [0, 1, 2, 9]
    assert {int(x) for x in late.draw(100)} == {0, 1, 2, 9}


def test_an_optimizer_step_leaves_no_gradient_elsewhere():
    learnt, other = nn.Linear(2, 2), nn.Linear(2, 2)
    before = [p.clone() for p in learnt.parameters()]
    _synthesis.descend(other(learnt(torch.ones(1, 2))).sum(), torch.optim.SGD(learnt.parameters(), lr=1))
    assert all(p.grad is None for p in other.parameters())
    assert not any(torch.equal(old, new) for old, new in zip(before, learnt.parameters(), strict=True))


class Models:
    """Hands out a frozen teacher and a student, as the factory does."""

    def __init__(self):
        self.info = kdkit.DataInfo((1, 6, 6), 2, 0, 10, labelled=False)
        self._teacher = kdkit.taps(network().requires_grad_(False), [])

    def student(self):
        torch.manual_seed(1)
        return kdkit.taps(nn.Sequential(nn.Flatten(), nn.Linear(36, 2)), [])

    def teacher(self):
        return self._teacher

    def differentiable(self, model, taps=()):
        return kdkit.taps(model.module, taps)


SMALL = {"round_size": 6, "warmup": 1, "every": 2, "shift": 0, "flip": 0}


def test_the_loss_of_dafl_is_the_papers(monkeypatch):
    losses = []
    monkeypatch.setattr(dafl, "descend", lambda loss, optimizer: losses.append(float(loss.detach())))
    models = Models()
    (stage,) = dafl.Dafl(dafl.Dafl.Options(latent=3, width=2, one_hot=0.7, activation=0.3, balance=2)).stages(models)
    batch = kdkit.Batch(torch.zeros(6, 1, 6, 6), torch.full((6,), -1), torch.arange(6))
    generator = stage.keeps["generator"]
    torch.manual_seed(5)
    stage.prepare(batch)
    torch.manual_seed(5)
    with torch.no_grad():
        images = generator(torch.randn(6, 3))
        net = models.teacher().module
        z, f = net(images), net[:4](images)
    rows = [softmax(row) for row in z.tolist()]
    one_hot = sum(-math.log(max(row)) for row in rows) / 6
    mean = [sum(row[k] for row in rows) / 6 for k in range(2)]
    expected = 0.7 * one_hot - 0.3 * float(f.abs().mean()) + 2 * sum(p * math.log(p) for p in mean)
    assert losses == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.parametrize("competing", [False, True])
@pytest.mark.parametrize("module", [cmi, deep_inversion, fast], ids=["cmi", "deep_inversion", "fast"])
def test_the_loss_of_a_round_is_the_weighted_sum(module, competing):
    models = Models()
    schedule = {cmi: cmi.Cmi, deep_inversion: deep_inversion.DeepInversion, fast: fast.Fast}[module]
    weights = {"one_hot": 0.5, "batch_norm": 0.25, **({"contrast": 0} if module is cmi else {})}
    against = {"competition": 2.0} if module is deep_inversion else {"disagreement": 2.0}
    made = schedule(schedule.Options(**SMALL, **weights, **against))
    networks = _synthesis.Networks(models, made.taps, batch_norm=True)
    images, labels = torch.rand(6, 1, 6, 6), torch.tensor([0, 0, 0, 1, 1, 1])
    found = made.synthesis(networks).loss(images, labels, competing=competing)
    found = float((found[0] if isinstance(found, tuple) else found).detach())
    net, student = models.teacher().module, networks.student.module
    with torch.no_grad():
        z, s = net(images), student(images)
        rows = [softmax(row) for row in z.tolist()]
        expected = 0.5 * sum(-math.log(row[k]) for row, k in zip(rows, labels.tolist(), strict=True)) / 6
        expected += 0.25 * by_hand(net, [images], 0)
        if competing:
            other = _synthesis.competition(z, s, 3.0) if module is deep_inversion else _synthesis.disagreement(z, s)
            expected += 2 * float(other)
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_meta_generator_follows_the_sum_of_the_copys_gradients(monkeypatch):
    made = fast.Fast(fast.Fast.Options(**SMALL, iterations=3, latent=3, width=2))
    meta = made.synthesis(_synthesis.Networks(Models(), batch_norm=True))
    seen, gradients = [], fast.gradients

    def noting(loss, learnt):
        found = list(gradients(loss, learnt))
        seen.append([gradient.clone() for _, gradient in found[:-1]])  # the last one is the noise's
        return found

    monkeypatch.setattr(fast, "gradients", noting)
    before = [p.clone() for p in meta.generator.parameters()]
    meta(competing=False)
    assert len(seen) == 3 and meta.optimizer.param_groups[0]["lr"] == pytest.approx(3 * 5e-3)
    for parameter, *each in zip(meta.generator.parameters(), *seen, strict=True):
        assert torch.allclose(parameter.grad, sum(each))
    assert any(not torch.equal(old, new) for old, new in zip(before, meta.generator.parameters(), strict=True))


def test_a_teacher_without_batch_norms_is_refused_in_a_line():
    models = Models()
    models._teacher = kdkit.taps(nn.Sequential(nn.Flatten(), nn.Linear(36, 2)), [])
    with pytest.raises(kdkit.RunError, match="no batch norms .* set `batch_norm: 0`"):
        _synthesis.Networks(models, batch_norm=True)
