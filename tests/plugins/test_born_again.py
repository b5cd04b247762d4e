import copy

import pytest
import torch
import torch.nn.functional as F
from test_distributed import NET, assert_alike
from test_distributed import RECIPE as SHARED
from test_stage_resume import interrupt_at
from torch import nn
from training import PLAIN, Command, assert_same_run, metrics, together, train, weights, write

import kdkit
from kdkit.recipe import registry
from kdkit.runs import training

BornAgain = registry.load().schedules["born_again"]
RECIPE = {**PLAIN, "teacher": None, "schedule": {"use": "born_again", "generations": 2}}
SECOND = '''
import kdkit


class Second(kdkit.Schedule):
    """A student that begins as a second one does, taught by a frozen teacher."""

    name = "second"
    scheme = "offline"
    needs_teacher = True

    def stages(self, models):
        models.student()
        student = models.student()
        yield kdkit.Stage("generation_2", [student], kdkit.teach(student, by=[models.teacher()]))


@kdkit.hookimpl
def kdkit_schedules():
    return [Second]
'''


class Students:
    """Hands out small networks of one architecture, each with weights of its own."""

    def __init__(self):
        self.networks = []

    def student(self):
        torch.manual_seed(len(self.networks))
        self.networks.append(nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)))
        return kdkit.taps(self.networks[-1], [])


def batch_of(step):
    return kdkit.Batch(torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(step)), torch.arange(6) % 5, torch.arange(6))


def test_generations_equal_hand_made_ones():
    models, naive, teacher = Students(), Students(), None
    for generation, stage in enumerate(BornAgain(BornAgain.Options(generations=3)).stages(models)):
        assert stage.name == f"generation_{generation + 1}" and len(stage.company) == generation
        naive.student()
        student, taught = models.networks[generation], naive.networks[generation]
        ours, theirs = (torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9) for network in (student, taught))
        frozen = [copy.deepcopy(network.state_dict()) for network in models.networks[:-1]]
        for step in range(4):
            batch = batch_of(step)
            (lesson,) = stage.step(batch)
            assert len(lesson.teachers) == min(generation, 1) and not any(t.logits.requires_grad for t in lesson.teachers)
            ours.zero_grad()
            value = F.cross_entropy(lesson.student.logits, batch.labels)
            (value + sum(F.mse_loss(lesson.student.logits, t.logits) for t in lesson.teachers)).backward()
            ours.step()

            z = taught(batch.inputs)
            value = F.cross_entropy(z, batch.labels)
            if teacher is not None:
                with torch.no_grad():
                    wanted = teacher(batch.inputs)
                value = value + F.mse_loss(z, wanted)
            theirs.zero_grad()
            value.backward()
            theirs.step()
            torch.testing.assert_close(student.state_dict(), taught.state_dict())
        for network, before in zip(models.networks[:-1], frozen, strict=True):
            assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
            assert not network.training and not any(p.requires_grad for p in network.parameters())
        teacher = copy.deepcopy(taught).eval()


def test_the_second_generation_is_an_offline_run_with_the_first_as_teacher(tmp_path):
    train(tmp_path, RECIPE, into="born")
    (tmp_path / "second.py").write_text(SECOND)
    first = {**PLAIN, "name": "first", "teacher": None, "schedule": {"use": "supervised"}, "losses": PLAIN["losses"][:1]}
    write(tmp_path, first, name="first.yaml")
    teacher = {"recipe": "first.yaml", "fold_batchnorm": False}
    offline = {**PLAIN, "plugins": ["second.py"], "schedule": {"use": "second"}, "run": {**PLAIN["run"], "folder": str(tmp_path / "runs")}}
    train(tmp_path, {**offline, "teacher": teacher}, into="offline")
    ours, theirs = weights(tmp_path / "born"), weights(tmp_path / "offline")
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_the_ensemble_of_generations_is_measured(tmp_path):
    result = train(tmp_path, RECIPE)
    first, second = (
        [line for line in metrics(tmp_path / "run") if line["kind"] == "epoch" and line["stage"] == f"generation_{g}"] for g in (1, 2)
    )
    assert not any("ensemble" in line for line in first) and all("ensemble" in line for line in second)
    assert result.ensemble == second[-1]["ensemble"]["test"] and result.ensemble != result.test


def test_generations_may_have_losses_of_their_own(tmp_path):
    schedule = {"first": {"cross_entropy": 0.5}, "later": ["logit_kl"]}
    train(tmp_path, RECIPE, schedule=schedule)
    lines = {line["stage"]: line["train"] for line in metrics(tmp_path / "run") if line["kind"] == "epoch"}
    assert set(lines["generation_1"]) == {"loss", "cross_entropy", "cross_entropy.weighted"}
    assert lines["generation_1"]["cross_entropy.weighted"] == pytest.approx(0.5 * lines["generation_1"]["cross_entropy"])
    assert set(lines["generation_2"]) == {"loss", "logit_kl", "logit_kl.weighted"}


def test_without_labels_the_first_generation_has_nothing_to_learn_from(tmp_path):
    with pytest.raises(kdkit.RecipeError, match="stage 'generation_1' has no teacher, and none of its losses is on labels"):
        kdkit.check(write(tmp_path, RECIPE, losses=[{"use": "logit_kl"}]))
    with pytest.raises(kdkit.RecipeError, match="did you mean 'logit_kl'"):
        kdkit.check(write(tmp_path, RECIPE, schedule={"later": ["logit_lk"]}))


@pytest.mark.parametrize("use", ["srrl", "ofd"])
def test_losses_may_look_into_the_generation_before(tmp_path, use):
    layers = {
        "srrl": [{"student": "stage4", "teacher": "stage4"}],
        "ofd": [{"student": "layer3.0.act2@input", "teacher": "layer3.0.act2@input"}],
    }
    result = train(
        tmp_path, RECIPE, losses=[{"use": "cross_entropy"}, {"use": use, "weight": 0.01, "layers": layers[use]}], train={"epochs": 1}
    )
    assert result.test["nll"] > 0


def test_with_moving_averages_a_generation_teaches_as_it_was_measured(tmp_path, monkeypatch):
    trainers, build = [], training.build_trainer

    def building(*args):
        trainers.append(build(*args))
        return trainers[-1]

    monkeypatch.setattr(training, "build_trainer", building)
    train(tmp_path, RECIPE, train={"ema": {"decay": 0.9}})
    first, second = trainers
    taught = second.stage.company[0].module.state_dict()
    assert all(torch.equal(value, taught[name]) for name, value in first.deployed()[0].state_dict().items())


@pytest.mark.slow
def test_a_run_that_stops_goes_on_with_the_same_bits(tmp_path):
    """Stopped inside the first generation, with its last step, and inside the second."""
    train(tmp_path, RECIPE, into="whole")
    for step, stage in ((4, "generation_1"), (12, "generation_1"), (3, "generation_2")):
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(patch, step)
            with pytest.raises(kdkit.Interrupted, match=stage):
                train(tmp_path, RECIPE)
    train(tmp_path, RECIPE)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    path = write(tmp_path, {**SHARED, "teacher": None, "schedule": RECIPE["schedule"], "losses": SHARED["losses"][:3]})
    commands = [Command(tmp_path, "train", path, "--run", "one"), *together(tmp_path, "train", path, "--run", "two")]
    for command in commands:
        code, log = command.finish()
        assert code == 0, log
    assert_alike(tmp_path / "two", tmp_path / "one")
