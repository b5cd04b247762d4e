import copy

import pytest
import torch
import torch.nn.functional as F
from test_distributed import NET, assert_alike
from test_distributed import RECIPE as SHARED
from test_engine import trainer_of
from test_stage_resume import interrupt_at
from training import PLAIN, Command, assert_same_run, together, train, write

import kdkit
from kdkit.engine.loop import train_epoch
from kdkit.engine.trainer import batches

AUGMENT = {"augment": {"crop_padding": 2, "flip": 0.5}}
RECIPE = {**PLAIN, "teacher": None, "schedule": {"use": "ddgsd"}, "data": {**PLAIN["data"], **AUGMENT}}
PLAINLY = {"epochs": 1, "optimizer": {"lr": 0.02, "name": "momentum", "momentum": 0.9}, "lr_schedule": {"name": "constant"}}
ONE_WAY = {"use": "ddgsd", "mutual": False}


def divergence(z, taught):
    q, p = (taught.detach() / 4).softmax(1), (z / 4).softmax(1)
    return 16 * (q * (q / p).log()).sum() / len(z)


def value_both(network, one, other, labels):
    """The mean over the views of the paper's terms, which it adds."""
    a, b = network(torch.cat([one, other])).chunk(2)
    views = [F.cross_entropy(a, labels) + divergence(a, b), F.cross_entropy(b, labels) + divergence(b, a)]
    return sum(views) / 2


def value_first(network, one, other, labels):
    with torch.no_grad():
        b = network(other)
    a = network(one)
    return F.cross_entropy(a, labels) + divergence(a, b)


@pytest.mark.parametrize(("schedule", "value_of"), [(RECIPE["schedule"], value_both), (ONE_WAY, value_first)])
def test_steps_equal_a_plain_loop(tmp_path, schedule, value_of):
    trainer, _ = trainer_of(tmp_path, RECIPE, schedule=schedule, train=PLAINLY)
    (tapped,) = trainer.stage.students
    naive = copy.deepcopy(tapped.module).train()
    optimizer = torch.optim.SGD(naive.parameters(), lr=0.02, momentum=0.9)
    seen = list(batches(trainer.loader, trainer.stage, 0))
    found = [float(values[0].total.detach()) for values in train_epoch(trainer)]
    for batch, total in zip(seen, found, strict=True):
        assert not torch.equal(batch.inputs, batch.views[0])
        value = value_of(naive, tapped.adapt(batch.inputs), tapped.adapt(batch.views[0]), batch.labels)
        assert total == pytest.approx(float(value.detach()), rel=1e-4)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    for name, value in naive.state_dict().items():
        torch.testing.assert_close(tapped.module.state_dict()[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_mutual_with_a_squared_loss_is_the_pi_model(tmp_path):
    """Whose gradient goes through both views; half of it, as values are means over the views."""
    trainer, _ = trainer_of(tmp_path, RECIPE, losses=[{"use": "logit_mse"}])
    (tapped,) = trainer.stage.students
    batch = next(batches(trainer.loader, trainer.stage, 0))
    total, _ = trainer.learner.train()(batch, trainer.moment, trainer.numbers.ramps)
    a, b = tapped.module(tapped.adapt(torch.cat([batch.inputs, batch.views[0]]))).chunk(2)
    weights = list(tapped.module.parameters())
    ours, theirs = (torch.autograd.grad(value, weights) for value in (total, F.mse_loss(a, b) / 2))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("schedule", [RECIPE["schedule"], ONE_WAY])
def test_the_other_views_answer_is_a_constant(tmp_path, schedule):
    trainer, _ = trainer_of(tmp_path, RECIPE, schedule=schedule)
    batch = next(batches(trainer.loader, trainer.stage, 0))
    (lesson,) = trainer.stage.step(batch)
    (teacher,) = lesson.teachers
    assert lesson.student.logits.requires_grad and not teacher.logits.requires_grad
    if schedule is not ONE_WAY:
        assert lesson.batch.labels.tolist() == batch.labels.tolist() * 2 and lesson.batch.index.tolist() == batch.index.tolist() * 2
        assert torch.equal(lesson.batch.inputs, torch.cat([batch.inputs, batch.views[0]]))


def test_a_stop_changes_nothing_under_losses_of_every_kind(tmp_path):
    layers = [{"student": "stage2", "teacher": "stage3"}]
    losses = [*RECIPE["losses"], {"use": "hint", "adapter": "linear", "layers": layers}, {"use": "rkd_distance", "layers": layers}]
    train(tmp_path, RECIPE, into="whole", losses=losses)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 8)
        with pytest.raises(kdkit.Interrupted):
            train(tmp_path, RECIPE, losses=losses)
    train(tmp_path, RECIPE, losses=losses)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    path = write(tmp_path, {**SHARED, "teacher": None}, schedule={"use": "ddgsd"}, train={"epochs": 1}, data=AUGMENT)
    commands = [Command(tmp_path, "train", path, "--run", "one"), *together(tmp_path, "train", path, "--run", "two")]
    for command in commands:
        code, log = command.finish()
        assert code == 0, log
    assert_alike(tmp_path / "two", tmp_path / "one")
