"""Students that see each other's weights of some steps ago."""

import copy
import json
import signal

import pytest
import torch
import torch.nn.functional as F
from test_distributed import RECIPE as SHARED
from test_distributed import recipe as shared
from test_engine import epoch, trainer_of
from test_mutual import PLAIN_KL, STEADY
from training import PLAIN, Command, lines, merged, metrics, together, weights

RECIPE = merged(PLAIN, {"teacher": None, "schedule": {"use": "codistill", "every": 2}})
PAIR = {"teacher": None, "schedule": {"use": "codistill", "every": 3}, "losses": SHARED["losses"][:2], "data": {"batch_size": 4}}

SIMPLE = {**PAIR, "losses": PLAIN_KL, "train": {**STEADY, "clip_grad": None}}


def test_steps_equal_a_plain_loop(tmp_path):
    trainer, _ = trainer_of(tmp_path, RECIPE, train=STEADY, losses=PLAIN_KL)
    nets = [copy.deepcopy(student.module).train() for student in trainer.stage.students]
    adapt = trainer.stage.students[0].adapt
    stale = [copy.deepcopy(net).eval() for net in nets]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    epoch(trainer)
    for number, batch in enumerate(trainer.loader.epoch(0), 1):
        x = adapt(batch.inputs)
        for k, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
            with torch.no_grad():
                p = stale[1 - k](x).softmax(1)
            z = net(x)
            loss = F.cross_entropy(z, batch.labels) + (p * (p.log() - z.log_softmax(1))).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if number % 2 == 0:
            for old, net in zip(stale, nets, strict=True):
                old.load_state_dict(net.state_dict())
    for net, student in zip(nets, trainer.stage.students, strict=True):
        for name, value in net.state_dict().items():
            torch.testing.assert_close(student.module.state_dict()[name], value, rtol=1e-3, atol=1e-5, msg=name)


def ran(commands):
    for command in commands:
        code, log = command.finish()
        assert code == 0, log
    return commands[0].log.read_text()


def test_processes_are_the_students(tmp_path):
    """Two processes, each with its share of the batches: as two students that a plain loop trains on those shares."""
    path = shared(tmp_path, **SIMPLE)
    ran(together(tmp_path, "train", path, "--run", "run"))
    trainer, _ = trainer_of(tmp_path, merged(SHARED, SIMPLE))
    nets = [copy.deepcopy(student.module).train() for student in trainer.stage.students]
    adapt = trainer.stage.students[0].adapt
    stale = [copy.deepcopy(net) for net in nets]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    for number, batch in enumerate(trainer.loader.epoch(0)):
        half = len(batch.labels) // 2
        for k, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
            x, y = adapt(batch.inputs)[k * half : (k + 1) * half], batch.labels[k * half : (k + 1) * half]
            with torch.no_grad():
                p = stale[1 - k](x).softmax(1)
            z = net(x)
            loss = F.cross_entropy(z, y) + (p * (p.log() - z.log_softmax(1))).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if (number + 1) % 3 == 0:
            for old, net in zip(stale, nets, strict=True):
                old.load_state_dict(net.state_dict())
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(result["peers"]) == 1 and result["ensemble"]
    for name, value in weights(tmp_path / "run").items():
        torch.testing.assert_close(value, nets[0].state_dict()[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_codistill_resumes_each_process_with_its_own_student(tmp_path):
    path = shared(tmp_path, **PAIR, train={"epochs": 12, "evaluate_every": 6})
    ran(together(tmp_path, "train", path, "--run", "whole"))
    stopped = together(tmp_path, "train", path, "--run", "run")
    assert stopped[0].wait_for(lambda: lines(tmp_path / "run") >= 12), stopped[0].finish()
    stopped[1].send(signal.SIGTERM)
    assert [command.finish()[0] for command in stopped] == [143, 143]
    code, log = Command(tmp_path, "train", path, "--run", "run").finish()
    assert code == 2 and "was begun by 2 process(es)" in log and "Traceback" not in log
    assert "going on with stage 'codistill'" in ran(together(tmp_path, "train", path, "--run", "run"))
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for one, two in zip(metrics(tmp_path / "run"), metrics(tmp_path / "whole"), strict=True):
        assert one.get("test") == two.get("test") and one.get("peers") == two.get("peers") and one.get("ensemble") == two.get("ensemble")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schedule": {"use": "codistill", "size": 3}}, "3 students cannot be trained by 2 processes"),
        (
            {"losses": [*PAIR["losses"], {"use": "sp", "gather": True, "layers": [{"student": "conv2", "teacher": "conv2"}]}]},
            "are not to be gathered",
        ),
    ],
)
def test_codistill_refuses_what_processes_that_train_apart_cannot_do(tmp_path, changes, says):
    path = shared(tmp_path, **merged(PAIR, changes))
    for command in together(tmp_path, "train", path, "--run", "run"):
        code, log = command.finish()
        assert code == 2 and says in log, log
