"""Deep mutual learning, and what holds for every schedule of peers."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from test_distributed import assert_alike
from test_distributed import recipe as shared
from test_engine import epoch, trainer_of
from test_stage_resume import interrupt_at
from training import PLAIN, Command, assert_same_run, merged, together, train, weights, write

import kdkit

SGD = {"lr": 0.1, "name": "momentum", "momentum": 0.0, "weight_decay": 0.0}
STEADY = {"epochs": 1, "optimizer": SGD, "lr_schedule": {"name": "constant"}}
PLAIN_KL = [{"use": "cross_entropy"}, {"use": "logit_kl", "temperature": 1.0}]
HINT = {"use": "hint", "layers": [{"student": "stage3", "teacher": "stage3"}]}
PEERS = {
    "mutual": {"use": "mutual"},
    "ensemble_peers": {"use": "ensemble_peers"},
    "branches": {"use": "branches", "split": "stage2", "branches": 2},
    "okddip": {"use": "okddip", "size": 3},
    "codistill": {"use": "codistill", "every": 4},
}
WHOLE = {
    "teacher": None,
    "data": {"validation": 8, "dataset": {"train": 56}},
    "train": {"ema": {"decay": 0.5}, "clip_grad": 1.0, "accumulate": 2},
    "run": {"checkpoint_steps": 2},
    "losses": [*PLAIN["losses"], HINT],
}


def recipe(name, **changes):
    return merged(merged(PLAIN, {"teacher": None, "schedule": PEERS[name]}), changes)


@pytest.mark.parametrize("size", [2, 3])
def test_steps_equal_a_plain_loop(tmp_path, size):
    trainer, _ = trainer_of(tmp_path, recipe("mutual", schedule={"size": size}, losses=PLAIN_KL), train=STEADY)
    nets = [copy.deepcopy(student.module).train() for student in trainer.stage.students]
    adapt = trainer.stage.students[0].adapt
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    epoch(trainer)
    for batch in trainer.loader.epoch(0):
        answers = [net(adapt(batch.inputs)) for net in nets]
        for k, (z, optimizer) in enumerate(zip(answers, optimizers, strict=True)):
            loss = F.cross_entropy(z, batch.labels)
            for j, other in enumerate(answers):
                if j != k:
                    p = other.detach().softmax(1)
                    loss = loss + (p * (p.log() - z.log_softmax(1))).sum(1).mean() / (size - 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for net, student in zip(nets, trainer.stage.students, strict=True):
        for name, value in net.state_dict().items():
            torch.testing.assert_close(student.module.state_dict()[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", PEERS)
def test_a_lesson_gives_no_gradient_to_what_teaches_it(tmp_path, name):
    trainer, _ = trainer_of(tmp_path, recipe(name, losses=[{"use": "logit_kl"}, HINT]))
    students = [student.module for student in trainer.stage.students]
    trainer.learner.train()
    batch = next(trainer.loader.epoch(0))
    lessons = trainer.stage.step(batch)
    for k, (lesson, objective) in enumerate(zip(lessons[: len(students)], trainer.learner.objectives, strict=False)):
        trainer.learner.zero_grad(set_to_none=True)
        objective(lesson, batch).total.backward(retain_graph=True)
        own = {id(p) for p in students[k].parameters()}
        for other in students:
            foreign = [p for p in other.parameters() if id(p) not in own]
            assert all(p.grad is None for p in foreign)
        assert any(p.grad is not None for p in students[k].parameters())


@pytest.mark.parametrize("name", PEERS)
def test_every_parameter_moves(tmp_path, name):
    trainer, _ = trainer_of(tmp_path, recipe(name, losses=[*PLAIN["losses"], HINT]))
    before = {key: value.clone() for key, value in trainer.learner.named_parameters()}
    epoch(trainer)
    assert [key for key, value in trainer.learner.named_parameters() if torch.equal(value, before[key])] == []
    known = [id(p) for updater in trainer.updaters for p in updater.parameters]
    assert len(known) == len(set(known)) == len(list(trainer.learner.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_stopped_anywhere_it_goes_on_as_if_it_had_not(tmp_path, name):
    base = recipe(name, **WHOLE)
    train(tmp_path, base, into="whole")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(kdkit.Interrupted):
            train(tmp_path, base)
    train(tmp_path, base)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_peers_of_other_backbones_and_the_best_one_is_exported(tmp_path, monkeypatch):
    from kdkit.runs.scoring import Standing

    monkeypatch.setattr(Standing, "chosen", property(lambda self: 1))
    peers = [{"model": "mlp/16", "activation": "tanh"}]
    changes = {"schedule": {"peers": peers, "result": "best"}, "data": {"validation": 8, "dataset": {"train": 56}}}
    result = train(tmp_path, {**recipe("mutual"), "name": "group"}, **changes)
    assert result.network["model"] == "mlp/16" and result.network["activation"] == "tanh"
    assert "layer1.0.weight" in weights(tmp_path / "run")
    for best in (False, True):
        student = kdkit.load_student(tmp_path / "run", best=best)
        assert torch.equal(
            student.module.fc.weight, weights(tmp_path / "run", "best.safetensors" if best else "student.safetensors")["fc.weight"]
        )
    assert json.loads((tmp_path / "run" / "result.json").read_text())["best"]["network"] == result.network
    monkeypatch.undo()
    (tmp_path / "runs").mkdir()
    (tmp_path / "run").rename(tmp_path / "runs" / "group")
    write(tmp_path, merged(recipe("mutual", **changes), {"name": "group"}), "teacher.yaml")
    monkeypatch.chdir(tmp_path)
    pupil = kdkit.train(write(tmp_path, {**PLAIN, "teacher": {"recipe": "teacher.yaml"}}), folder="pupil", quiet=True)
    assert pupil.teacher["top1"] == pytest.approx(result.test["top1"])
    again = kdkit.train(write(tmp_path, {**PLAIN, "teacher": {"recipe": "teacher.yaml"}}), folder="again", quiet=True)
    assert again.teacher == pupil.teacher


def test_a_peer_that_does_not_fit_a_loss_is_told(tmp_path):
    with pytest.raises(kdkit.RecipeError, match="schedule.peers.0.model: 'stage3'"):
        kdkit.check(write(tmp_path, recipe("mutual", schedule={"peers": [{"model": "mlp/16"}]}, losses=[HINT])))
    path = write(tmp_path, recipe("mutual", schedule={"peers": [{"model": "mlp/16"}], "size": 5}))
    with pytest.raises(kdkit.RecipeError, match="`peers` makes 2 students, `size` says 5"):
        kdkit.check(path)
    with pytest.raises(kdkit.RecipeError, match=r"data.validation"):
        kdkit.check(write(tmp_path, recipe("mutual", schedule={"result": "best"})))


def test_each_peers_adapters_are_sized_for_it(tmp_path):
    peer = {**PLAIN["teacher"], "args": {**PLAIN["teacher"]["args"], "channels": [4, 8, 12, 16]}}
    trainer, _ = trainer_of(
        tmp_path, recipe("mutual", schedule={"peers": [peer]}, losses=[*PLAIN["losses"], {**HINT, "adapter": "linear"}])
    )
    epoch(trainer)
    one, two = (str(objective.losses["hint"]) for objective in trainer.learner.objectives)
    assert one != two


@pytest.mark.parametrize(
    ("name", "cost"),
    [("mutual", (2, 2, 0)), ("ensemble_peers", (2, 2, 0)), ("okddip", (3, 3, 0)), ("codistill", (2, 2, 2))],
)
def test_the_plan_says_what_a_step_costs(tmp_path, name, cost):
    (stage,) = kdkit.check(write(tmp_path, recipe(name))).stages
    assert (stage.cost.forwards, stage.cost.backwards, stage.cost.teachers) == cost


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    path = shared(tmp_path, teacher=None, schedule={"use": "mutual"}, losses=[{"use": "cross_entropy"}, {"use": "logit_kl"}])
    commands = [Command(tmp_path, "train", path, "--run", "one"), *together(tmp_path, "train", path, "--run", "two")]
    assert [command.finish()[0] for command in commands] == [0, 0, 0], commands[0].log.read_text()
    assert_alike(tmp_path / "two", tmp_path / "one")
