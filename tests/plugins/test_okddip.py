"""Peers with targets of their own, and a leader."""

import pytest
import torch
import torch.nn.functional as F
from test_distributed import assert_alike
from test_distributed import recipe as shared
from test_engine import trainer_of
from training import PLAIN, Command, merged, together, train

RECIPE = merged(PLAIN, {"teacher": None, "schedule": {"use": "okddip", "size": 4, "width": 3}})


def derived(attention, embeddings, logits):
    """Targets by the formula, image by image."""
    asks, shows = attention.asks, attention.shows
    count, found = len(embeddings), []
    for a in range(count):
        rows = []
        for n in range(len(logits[0])):
            ask = asks[a % len(asks)].weight @ embeddings[a][n]
            energy = torch.stack([ask @ (shows[b % len(shows)].weight @ embeddings[b][n]) for b in range(count)])
            shares = energy.exp() / energy.exp().sum()
            rows.append(sum(shares[b] * logits[b][n] for b in range(count)))
        found.append(torch.stack(rows))
    return found


@pytest.mark.parametrize("peers", [(), ({"model": "mlp/16"}, {"model": "mlp/12"})], ids=["alike", "of other networks"])
def test_targets_are_the_formulas(tmp_path, peers):
    schedule = {"use": "okddip", "width": 3, **({"peers": list(peers)} if peers else {"size": 4})}
    trainer, _ = trainer_of(tmp_path, {**RECIPE, "schedule": schedule})
    batch = next(trainer.loader.epoch(0))
    trainer.learner.eval()
    leader, *others = trainer.stage.step(batch)
    answers = [lesson.student for lesson in others]
    assert len(answers) == (2 if peers else 3)
    expected = derived(trainer.stage.parts, [a.features["penultimate"].flatten(1) for a in answers], [a.logits for a in answers])
    for lesson, target in zip(others, expected, strict=True):
        for teacher in lesson.teachers:
            torch.testing.assert_close(teacher.logits, target, rtol=1e-4, atol=1e-5)
    for teacher in leader.teachers:
        torch.testing.assert_close(teacher.logits, sum(a.logits for a in answers) / len(answers))
        assert not teacher.logits.requires_grad


def test_only_the_projections_learn_from_a_target(tmp_path):
    trainer, _ = trainer_of(tmp_path, RECIPE)
    trainer.learner.train()
    _, lesson, *_ = trainer.stage.step(next(trainer.loader.epoch(0)))
    loss = F.kl_div(lesson.student.logits.detach().log_softmax(1), lesson.teachers[0].logits.softmax(1), reduction="batchmean")
    found = torch.autograd.grad(loss, list(trainer.learner.parameters()), allow_unused=True)
    own = {id(p) for p in trainer.stage.parts.parameters()}
    for parameter, slope in zip(trainer.learner.parameters(), found, strict=True):
        assert (slope is not None and bool(slope.any())) == (id(parameter) in own)


def test_the_leader_is_exported(tmp_path):
    result = train(tmp_path, RECIPE)
    assert len(result.peers) == 3 and result.network is None


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    schedule = {"use": "okddip", "size": 3, "layer": "fc@input"}
    path = shared(tmp_path, teacher=None, schedule=schedule, losses=[{"use": "cross_entropy"}, {"use": "logit_kl"}])
    commands = [Command(tmp_path, "train", path, "--run", "one"), *together(tmp_path, "train", path, "--run", "two")]
    assert [command.finish()[0] for command in commands] == [0, 0, 0], commands[0].log.read_text()
    assert_alike(tmp_path / "two", tmp_path / "one")
