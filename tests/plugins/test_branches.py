"""One trunk, several branches, a gate."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_distributed import assert_alike
from test_distributed import recipe as shared
from test_engine import epoch, trainer_of
from test_mutual import HINT, STEADY
from training import PLAIN, Command, merged, metrics, together, train, weights, write

import kdkit

RECIPE = merged(PLAIN, {"teacher": None, "schedule": {"use": "branches", "split": "stage2", "branches": 3}})
T = 3.0
LOSSES = [{"use": "cross_entropy"}, {"use": "logit_kl", "weight": 0.5, "temperature": T}]


def test_steps_equal_a_plain_loop(tmp_path):
    trainer, _ = trainer_of(tmp_path, RECIPE, train=STEADY, losses=LOSSES)
    first, *others = (student.module for student in trainer.stage.students)
    adapt, gate = trainer.stage.students[0].adapt, copy.deepcopy(trainer.stage.parts).train()
    nets = [copy.deepcopy(first).train()]
    for other in others:  # a network with the first copy's trunk
        net = copy.deepcopy(other).train()
        for part in ("conv1", "bn1", "layer1", "layer2"):
            setattr(net, part, getattr(nets[0], part))
        nets.append(net)
    learning = {id(p): p for module in (*nets, gate) for p in module.parameters()}
    optimizer = torch.optim.SGD(learning.values(), lr=0.1)
    terms = epoch(trainer)
    for batch, values in zip(trainer.loader.epoch(0), terms, strict=True):
        x = adapt(batch.inputs)
        net = nets[0]
        h = net.layer2(net.layer1(net.maxpool(net.act1(net.bn1(net.conv1(x))))))
        z = [net.forward_head(net.layer4(net.layer3(h))) for net in nets]
        g = F.softmax(F.relu(gate.norm(gate.linear(h.mean((2, 3))))), 1)
        mixed = sum(g[:, k : k + 1] * z[k] for k in range(3))
        q = F.softmax(mixed.detach() / T, 1)
        loss = F.cross_entropy(mixed, batch.labels)
        for one in z:
            kl = (q * (q.log() - F.log_softmax(one / T, 1))).sum(1).mean()
            loss = loss + F.cross_entropy(one, batch.labels) + 0.5 * T**2 * kl
        assert float(sum(value.total.detach() for value in values)) == pytest.approx(float(loss.detach()), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for net, student in zip(nets, trainer.stage.students, strict=True):
        for name, value in net.state_dict().items():
            torch.testing.assert_close(student.module.state_dict()[name], value, rtol=1e-3, atol=1e-5, msg=name)
    for name, value in gate.state_dict().items():
        torch.testing.assert_close(trainer.stage.parts.state_dict()[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_the_plan_counts_the_trunk_once(tmp_path):
    losses = [*LOSSES, HINT]
    cost = [kdkit.check(write(tmp_path, RECIPE, losses=losses, schedule={"split": f"stage{i}"})).stages[0].cost for i in (1, 3)]
    assert 1 < cost[1].forwards < cost[0].forwards < 3
    assert all(one.backwards == one.forwards and one.teachers == 0 for one in cost)
    with pytest.raises(kdkit.RecipeError, match="stage7"):
        kdkit.check(write(tmp_path, RECIPE, schedule={"split": "stage7"}))


def test_each_branch_is_a_whole_student_and_the_mixture_is_logged(tmp_path):
    result = train(tmp_path, RECIPE, losses=[*LOSSES, HINT])
    assert len(result.peers) == 2 and result.network is None
    student = kdkit.load_student(tmp_path / "run")
    assert student.module.state_dict().keys() == weights(tmp_path / "run").keys()
    terms = metrics(tmp_path / "run")[-1]["train"]
    assert "cross_entropy@4" in terms and "logit_kl@4" not in terms and "hint@4" not in terms and "hint@3" in terms


def test_first_weights_of_the_gate_follow_the_seed(tmp_path):
    for name in ("one", "two"):
        torch.manual_seed(hash(name) % 1000)
        train(tmp_path, RECIPE, into=name, train={"epochs": 1})
    one, two = (weights(tmp_path / name) for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    schedule = {"use": "branches", "split": "conv1", "branches": 2}
    (tmp_path / "gates.py").write_text(PLAIN_GATE)
    path = shared(tmp_path, teacher=None, plugins=["gates.py"], schedule={**schedule, "use": "plain_branches"}, losses=LOSSES)
    commands = [Command(tmp_path, "train", path, "--run", "one"), *together(tmp_path, "train", path, "--run", "two")]
    assert [command.finish()[0] for command in commands] == [0, 0, 0], commands[0].log.read_text()
    assert_alike(tmp_path / "two", tmp_path / "one")


# batch statistics of the gate are each process's own, as those of any network are
PLAIN_GATE = '''
from torch import nn
import kdkit
from kdkit_plugins.schedules import branches


class PlainBranches(branches.Branches):
    """Without batch normalisation in the gate."""

    name = "plain_branches"

    def stages(self, models):
        for stage in super().stages(models):
            stage.parts.norm = nn.Identity()
            yield stage


@kdkit.hookimpl
def kdkit_schedules():
    return [PlainBranches]
'''
