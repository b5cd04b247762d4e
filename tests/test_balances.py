"""Balances: gradients of each loss by itself, combined for the optimizer; weights that nobody has to tune."""

import math

import pytest
import torch
from test_lockstep import alone, jobs
from training import EVERYTHING, PLAIN, assert_same_run, merged, metrics, needs_a_device_each, start, stop_and_go_on, train, weights, write

import kdkit
from kdkit import recipe
from kdkit.recipe import registry
from kdkit.study.lockstep import train_together

HINT = {"use": "hint", "layers": [{"student": "stage3", "teacher": "stage3"}]}
LOSSES = [{"use": "cross_entropy"}, {"use": "logit_kl", "weight": 2}, HINT]
PLUGIN = """
import kdkit

class Sum(kdkit.Balance):
    \\"\\"\\"Adds the gradients up, as without a balance.\\"\\"\\"
    name = "sum"
    def forward(self, gradients):
        assert not gradients.rows[~gradients.reached].any()
        return gradients.rows.sum(0)

@kdkit.hookimpl
def kdkit_balances():
    return [Sum]
""".replace('\\\\"', '"').replace('\\"', '"')
DOT = {"balance": {"use": "dot", "weight_decay": 5e-4}, "train": {"optimizer": {"name": "momentum", "momentum": 0.0, "weight_decay": 0.0}}}
BALANCES = {
    "gradient_share": {"balance": {"use": "gradient_share", "shares": {"logit_kl": 0.7}}},
    "gradnorm": {"balance": {"use": "gradnorm"}},
    "pcgrad": {"balance": {"use": "pcgrad"}},
    "uncertainty": {"balance": {"use": "uncertainty"}},
    "dot": DOT,
    "drop": {"balance": {"use": "drop"}},
}


def built(name, terms=3, own=5, every=7, labels=(True, False, False), **options):
    kind = registry.load().balances[name]
    return kind(kind.Options(**options), kdkit.Sizes(["a", "b", "c"][:terms], labels[:terms], own, every))


def step(rows, values=None, reached=None, parameters=None):
    rows = torch.as_tensor(rows, dtype=torch.float32)
    values = torch.ones(len(rows)) if values is None else torch.as_tensor(values, dtype=torch.float32)
    parameters = torch.zeros(rows.shape[1]) if parameters is None else parameters
    return kdkit.Gradients(rows, torch.ones_like(rows, dtype=torch.bool) if reached is None else reached, values, parameters)


def drawn(seed, terms=3, every=7):
    return torch.randn(terms, every, generator=torch.Generator().manual_seed(seed))


@pytest.mark.first(1)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": {"accumulate": 2, "ema": {"decay": 0.8}, "clip_grad": 0.1}, "data": {"batch_size": 5}},
        {"schedule": {"use": "mutual"}, "teacher": None, "losses": LOSSES[:2]},
        {"schedule": {"use": "supervised"}, "teacher": None, "losses": LOSSES[:1]},
    ],
    ids=["offline", "accumulated", "mutual", "one_loss"],
)
def test_a_balance_that_adds_up_changes_nothing(tmp_path, changes):
    (tmp_path / "sum.py").write_text(PLUGIN)
    base = merged({**PLAIN, "losses": LOSSES}, changes)
    train(tmp_path, base, into="plain")
    train(tmp_path, base, into="balanced", plugins=["sum.py"], balance={"use": "sum"})
    for key, value in weights(tmp_path / "plain").items():
        torch.testing.assert_close(weights(tmp_path / "balanced")[key], value, rtol=1e-4, atol=1e-5)
    logged = [[line for line in metrics(tmp_path / run) if line["kind"] == "step"] for run in ("plain", "balanced")]
    for one, other in zip(*logged, strict=True):
        assert other["terms"] == pytest.approx(one["terms"], rel=1e-3, abs=1e-5)


def test_shares_of_the_norms_are_those_asked_for():
    balance = built("gradient_share", shares={"b": 0.7, "c": 0.1}, smoothing=0.5)
    rows = drawn(0)
    combined, norms = balance(step(rows)), rows[:, :5].norm(dim=1)
    pulls = balance.factors() * norms
    torch.testing.assert_close(pulls / pulls.sum(), torch.tensor([0.2, 0.7, 0.1]))
    torch.testing.assert_close(pulls.sum(), norms.sum())
    torch.testing.assert_close(combined, sum(w * row for w, row in zip(balance.factors(), rows, strict=True)))
    balance(step(3 * rows))
    torch.testing.assert_close(balance.norms, 2 * norms)  # halfway between n and 3 n


def test_losses_without_a_share_keep_their_proportion_and_one_without_gradient_its_weight():
    balance, rows = built("gradient_share", shares={"a": 0.5}), drawn(1)
    balance(step(rows))
    pulls = balance.factors() * rows[:, :5].norm(dim=1)
    torch.testing.assert_close(pulls[1] / pulls[2], rows[1, :5].norm() / rows[2, :5].norm())
    rows[2] = 0
    balance = built("gradient_share", shares={"a": 0.5, "c": 0.5})
    assert balance(step(rows)).isfinite().all() and balance.factors()[2] == 1


def test_weights_of_gradnorm_by_hand():
    """Two losses of norms 1 and 3; the second has fallen to a half, so that it is slower than none."""
    balance = built("gradnorm", terms=2, own=1, every=1, alpha=1.0, lr=0.1)
    assert balance(step([[1.0], [3.0]], [2.0, 4.0])) == 4.0  # the first step is the plain sum
    w = [math.exp(-0.1 * s * n / 2) for s, n in ((-1, 1), (1, 3))]  # r = 1: pulls 1 and 3 move to their mean, 2
    w = [2 * x / sum(w) for x in w]
    torch.testing.assert_close(balance.factors(), torch.tensor(w))
    combined = balance(step([[1.0], [3.0]], [2.0, 2.0]))
    torch.testing.assert_close(combined, torch.tensor([w[0] + 3 * w[1]]))
    pulls, rates = (w[0], 3 * w[1]), (4 / 3, 2 / 3)
    mean = sum(pulls) / 2
    moved = [x * math.exp(-0.1 * math.copysign(1, p - mean * r) * p / mean) for x, p, r in zip(w, pulls, rates, strict=True)]
    torch.testing.assert_close(balance.factors(), torch.tensor([2 * x / sum(moved) for x in moved]))


def test_gradients_in_conflict_are_projected():
    torch.manual_seed(0)
    torch.testing.assert_close(built("pcgrad", terms=2, every=2)(step([[1.0, 0.0], [-1.0, 1.0]])), torch.tensor([0.5, 1.5]))
    rows = drawn(2).abs()
    torch.testing.assert_close(built("pcgrad")(step(rows)), rows.sum(0))


def test_projections_in_some_order_of_the_others():
    rows = drawn(4, every=3).double()
    orders = [(1, 2), (2, 1)], [(0, 2), (2, 0)], [(0, 1), (1, 0)]

    def projected(i, order):
        own = rows[i].clone()
        for j in order:
            if (dot := own @ rows[j]) < 0:
                own -= dot / rows[j].square().sum() * rows[j]
        return own

    sums = [projected(0, a) + projected(1, b) + projected(2, c) for a in orders[0] for b in orders[1] for c in orders[2]]
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        found = built("pcgrad", every=3)(step(rows)).double()
        place = min(range(len(sums)), key=lambda i: float((sums[i] - found).norm()))
        torch.testing.assert_close(found, sums[place], rtol=1e-5, atol=1e-6)
        seen.add(round(float(found.sum()), 4))
    assert len(seen) > 1 or len({round(float(s.sum()), 4) for s in sums}) == 1


def test_uncertainty_goes_to_the_inverse_of_a_loss():
    balance = built("uncertainty", terms=2, lr=0.5)
    rows = drawn(3, 2)
    torch.testing.assert_close(balance(step(rows, [4.0, 0.5])), rows.sum(0))  # exp(0) = 1
    torch.testing.assert_close(balance.logarithms, torch.tensor([0.5 * 3, -0.5 * 0.5]))
    for _ in range(200):
        balance(step(rows, [4.0, 0.5]))
    torch.testing.assert_close(balance.factors(), torch.tensor([0.25, 2.0]), rtol=1e-3, atol=0)


def test_dot_keeps_two_momenta():
    """Parameters: reached by both kinds, by labels alone, by the others alone."""
    reached = torch.tensor([[True, True, False], [True, False, True]])
    balance = built("dot", terms=2, own=2, every=3, weight_decay=0.1)
    p = torch.tensor([1.0, 2.0, 3.0])
    rows = torch.tensor([[1.0, 1.0, 0.0], [2.0, 0.0, 2.0]])
    v, u = torch.zeros(3), torch.zeros(3)
    for _ in range(3):
        found = balance(step(rows, reached=reached, parameters=p))
        v = torch.tensor([0.825, 0.9, 0.9]) * v + rows[0] + torch.tensor([0.1, 0.2, 0.0])
        u = torch.tensor([0.975, 0.9, 0.9]) * u + rows[1] + torch.tensor([0.0, 0.0, 0.3])
        torch.testing.assert_close(found, v + u)


def test_dropping_keeps_the_labels_and_the_largest():
    balance, rows, seen = built("drop", labels=(True, False, False)), drawn(5), set()
    torch.manual_seed(0)
    for _ in range(30):
        found = balance(step(rows, [9.0, 1.0, 2.0]))
        assert balance.factors()[0] == 1 and balance.factors()[2] == 1
        torch.testing.assert_close(found, balance.factors() @ rows)
        seen.add(float(balance.factors()[1]))
    assert seen == {0.0, 1.0}
    balance(step(rows, [9.0, 3.0, 2.0]))
    assert balance.factors()[1] == 1


def test_dot_without_a_difference_is_sgd_with_momentum(tmp_path):
    plain = {"optimizer": {"name": "momentum", "weight_decay": 5e-4, "decay_norm_and_bias": True}}
    train(tmp_path, {**PLAIN, "losses": LOSSES}, into="plain", train=plain)
    changes = merged(DOT, {"balance": {"delta": 0.0}})
    train(tmp_path, {**PLAIN, "losses": LOSSES}, into="dot", **changes)
    for key, value in weights(tmp_path / "plain").items():
        torch.testing.assert_close(weights(tmp_path / "dot")[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BALANCES)
def test_zeros_and_missing_losses_give_finite_gradients(name):
    balance = built(name, **({"shares": {"a": 0.5}} if name == "gradient_share" else {}))
    reached = torch.tensor([[True] * 7, [False] * 7, [False] * 7])
    for rows, values in ((torch.zeros(3, 7), [0.0, 0.0, 0.0]), (torch.eye(3, 7) * 1e6 * reached, [1e6, 0.0, 0.0])):
        found = balance(step(rows, values, reached))
        assert found.shape == (7,) and found.isfinite().all()
        assert all(buffer.isfinite().all() for buffer in balance.buffers())


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    found = jobs(folder, {**PLAIN, "losses": LOSSES}, {"unbalanced": {}, **BALANCES})
    return folder, found, train_together(found)


@pytest.mark.first(2)
@pytest.mark.parametrize("name", BALANCES)
def test_side_by_side_a_balanced_run_is_what_it_is_alone(together, name):
    folder, found, outcomes = together
    place = 1 + list(BALANCES).index(name)
    assert outcomes[place].reason is None
    assert_same_run(alone(folder, found[place]), found[place].folder)
    assert any((weights(found[0].folder)[k] != v).any() for k, v in weights(found[place].folder).items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dot", "gradient_share"])
def test_a_stopped_balanced_run_goes_on_with_the_same_bits(tmp_path, monkeypatch, name):
    changes = merged(BALANCES[name], {"train": {"mixup": None}, "data": {"workers": 0}})
    path = write(tmp_path, EVERYTHING, **changes)
    kdkit.train(path, folder=tmp_path / "whole", quiet=True)
    stop_and_go_on(path, tmp_path / "stopped", monkeypatch)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dot", "gradient_share"])
def test_two_processes_balance_as_one(tmp_path, name):
    needs_a_device_each(2)
    # nothing is normalised over a batch
    plain = {"model": "mlp/8", "args": None}
    losses = [{"use": "cross_entropy"}, {"use": "logit_kl"}]
    base = {**PLAIN, "student": {"model": "mlp/8"}, "teacher": plain, "losses": losses}
    base["teacher"] = {"model": "mlp/16"}
    path = write(tmp_path, base, **merged(BALANCES[name], {"train": {"device": "cpu"}}))
    kdkit.train(path, folder=tmp_path / "one", quiet=True)
    for command in start(tmp_path, [("train", path, "--run", "two")] * 2):
        code, log = command.finish()
        assert code == 0, log
    for key, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[key], value, rtol=1e-4, atol=1e-6)


def test_the_log_has_the_weights_of_the_balance(tmp_path):
    train(tmp_path, {**PLAIN, "losses": LOSSES}, **BALANCES["gradient_share"])
    last = [line for line in metrics(tmp_path / "run") if line["kind"] == "step"][-1]["terms"]
    assert last["logit_kl.weighted"] != pytest.approx(2 * last["logit_kl"], rel=0.01)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"balance": {"use": "gradient_share", "shares": {"kl": 0.5}}}, "balance.shares: there is no loss 'kl'; the losses are cross_entropy"),
        ({"balance": {"use": "gradient_share", "shares": {"hint": 0.5, "logit_kl": 0.7}}}, "balance.shares: are parts of 1, and come to 1.2"),
        ({"balance": {"use": "gradient_share", "shares": {"hint": 0.5, "logit_kl": 0.1, "cross_entropy": 0.1}}}, "come to 0.7; make them 1"),
        ({"balance": {"use": "dot"}}, "balance: is defined for optimizer 'momentum', not for 'sgd'"),
        ({"balance": {"use": "dot"}, "train": {"optimizer": {"name": "momentum"}}}, "write `train.optimizer.momentum: 0`, and `balance.momentum`"),
        (merged(DOT, {"balance": {"delta": 0.2}}), "balance.delta: momentum + delta must be below 1"),
        ({"balance": {"use": "gradnrom"}}, "gradnorm"),
        ({"balance": {"use": "pcgrad"}, "train": {"precision": "fp16"}}, "balance: gradients of fp16 are scaled"),
    ],
)  # fmt: skip
def test_what_cannot_be_balanced_is_one_line(tmp_path, changes, says):
    with pytest.raises(kdkit.RecipeError) as error:
        recipe.load(write(tmp_path, {**PLAIN, "losses": LOSSES}, **changes))
    assert says in str(error.value)
