import copy

import pytest
import torch
import torch.nn.functional as F
from test_distributed import NET, assert_alike
from test_distributed import RECIPE as SHARED
from test_engine import trainer_of
from test_stage_resume import interrupt_at
from training import PLAIN, Command, assert_same_run, metrics, together, train, write

import kdkit
from kdkit.engine.loop import train_epoch
from kdkit.engine.trainer import batches

HINT = {"use": "hint", "weight": 0.1, "adapter": "linear", "layers": [{"student": "stage2", "teacher": "stage3"}]}
RECIPE = {**PLAIN, "teacher": None, "schedule": {"use": "cs_kd"}}
PLAINLY = {"epochs": 1, "optimizer": {"lr": 0.02, "name": "momentum", "momentum": 0.9}, "lr_schedule": {"name": "constant"}}
ONE_WAY = {"use": "cs_kd", "mutual": False}


def value_both(network, images, labels):
    z, total = network(images), 0
    for i in range(len(z)):
        partner = z[i + 1 if i % 2 == 0 else i - 1].detach()
        q, p = (partner / 4).softmax(0), (z[i] / 4).softmax(0)
        total = total - z[i].softmax(0)[labels[i]].log() + 16 * (q * (q / p).log()).sum()
    return total / len(z)


def value_first(network, images, labels):
    with torch.no_grad():
        q = (network(images[1::2]) / 4).softmax(1)
    z = network(images[0::2])
    p = (z / 4).softmax(1)
    return F.cross_entropy(z, labels[0::2]) + 16 * (q * (q / p).log()).sum() / len(z)


@pytest.mark.parametrize(("schedule", "value_of"), [(RECIPE["schedule"], value_both), (ONE_WAY, value_first)])
def test_steps_equal_a_plain_loop(tmp_path, schedule, value_of):
    trainer, _ = trainer_of(tmp_path, RECIPE, schedule=schedule, train=PLAINLY)
    (tapped,) = trainer.stage.students
    naive = copy.deepcopy(tapped.module).train()
    optimizer = torch.optim.SGD(naive.parameters(), lr=0.02, momentum=0.9)
    seen = list(batches(trainer.loader, trainer.stage, 0))
    assert len(seen) == 6
    found = [float(values[0].total.detach()) for values in train_epoch(trainer)]
    for batch, total in zip(seen, found, strict=True):
        assert torch.equal(batch.labels[0::2], batch.labels[1::2])
        value = value_of(naive, tapped.adapt(batch.inputs), batch.labels)
        assert total == pytest.approx(float(value.detach()), rel=1e-4)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    for name, value in naive.state_dict().items():
        torch.testing.assert_close(tapped.module.state_dict()[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("schedule", [RECIPE["schedule"], ONE_WAY])
def test_the_partners_answer_is_a_constant(tmp_path, schedule):
    trainer, _ = trainer_of(tmp_path, RECIPE, schedule=schedule, losses=[*RECIPE["losses"], HINT])
    (lesson,) = trainer.stage.step(next(batches(trainer.loader, trainer.stage, 0)))
    (teacher,) = lesson.teachers
    assert teacher.features.keys() == lesson.student.features.keys() == {"stage2", "stage3"}
    for mine, other in [(lesson.student.logits, teacher.logits), (lesson.student.features["stage2"], teacher.features["stage2"])]:
        assert mine.requires_grad and not other.requires_grad and mine.shape == other.shape


def test_everything_learns_and_a_stop_changes_nothing(tmp_path):
    losses = [*RECIPE["losses"], HINT]
    train(tmp_path, RECIPE, into="whole", losses=losses)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 8)
        with pytest.raises(kdkit.Interrupted):
            train(tmp_path, RECIPE, losses=losses)
    train(tmp_path, RECIPE, losses=losses)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    terms = [line["terms"] for line in metrics(tmp_path / "run") if line["kind"] == "step"]
    assert all(line["logit_kl"] > 0 and line["hint"] > 0 for line in terms)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    path = write(tmp_path, {**SHARED, "teacher": None}, schedule={"use": "cs_kd"}, train={"epochs": 1})
    commands = [Command(tmp_path, "train", path, "--run", "one"), *together(tmp_path, "train", path, "--run", "two")]
    for command in commands:
        code, log = command.finish()
        assert code == 0, log
    assert_alike(tmp_path / "two", tmp_path / "one")


def test_a_process_without_whole_pairs_is_told(tmp_path):
    trainer, _ = trainer_of(tmp_path, RECIPE)
    batch = next(batches(trainer.loader, trainer.stage, 0)).map(lambda x: x[:3])
    with pytest.raises(kdkit.RunError, match="3 images"):
        trainer.stage.step(batch)
