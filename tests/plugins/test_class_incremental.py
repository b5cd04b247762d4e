import pytest
import torch
from test_stage_resume import interrupt_at
from torch import nn
from training import PLAIN, assert_same_run, metrics, train, write

import kdkit
from kdkit.recipe import registry

ClassIncremental = registry.load().schedules["class_incremental"]
RECIPE = {
    **PLAIN,
    "teacher": None,
    "schedule": {"use": "class_incremental", "stages": 2},
    "losses": [{"use": "cross_entropy"}, {"use": "logit_kl", "temperature": 2}],
}


class Students:
    """Hands out linear networks for 6 classes."""

    def __init__(self, classes=6):
        self.info = kdkit.DataInfo((1, 2, 2), classes, 24, 8)
        self.networks = []

    def student(self):
        torch.manual_seed(len(self.networks))
        self.networks.append(nn.Sequential(nn.Flatten(), nn.Linear(4, self.info.outputs)))
        return kdkit.taps(self.networks[-1], [])


def stages(classes=6, **options):
    return ClassIncremental(ClassIncremental.Options(**options)).stages(Students(classes))


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"stages": 3}, [{0, 1}, {2, 3}, {4, 5}]),
        ({"stages": 3, "first": 4}, [{0, 1, 2, 3}, {4}, {5}]),
        ({"stages": 4, "first": 2}, [{0, 1}, {2}, {3}, {4, 5}]),
    ],
)
def test_a_stage_shows_its_classes_equally_often(options, shown):
    labels, order = torch.arange(24) % 6, torch.randperm(24, generator=torch.Generator().manual_seed(0))
    for stage, classes in zip(stages(**options), shown, strict=True):
        arranged = stage.data.arrange(order, labels[order], 8)
        assert len(arranged) == 24 and {*labels[arranged].tolist()} == classes
        times = arranged.bincount()
        times = times[times > 0]
        assert len(times) == 4 * len(classes) and times.max() - times.min() <= 1


def test_memory_keeps_the_same_first_images_of_earlier_classes():
    labels = torch.arange(24) % 6
    _, second, third = stages(stages=3, memory=2)
    for seed in range(3):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
        for stage, old in ((second, 2), (third, 4)):
            arranged = stage.data.arrange(order, labels[order], 8)
            for c in range(old):
                assert {*arranged[labels[arranged] == c].tolist()} == {c, c + 6}


@pytest.mark.parametrize("memory", [0, 2])
def test_the_student_before_teaches_the_classes_that_it_knows(memory):
    batch = kdkit.Batch(torch.rand(8, 1, 2, 2), torch.arange(8) % 2 + 2, torch.arange(8))
    before = None
    for number, stage in enumerate(stages(stages=3, memory=memory)):
        student = stage.students[0]
        (lesson,) = stage.step(batch)
        z = student(batch.inputs).logits
        start, end = 0 if memory else 2 * number, 2 * number + 2
        labelled = (lesson.supervised or lesson).student.logits.softmax(1)
        assert labelled[:, :start].sum() == labelled[:, end:].sum() == 0
        torch.testing.assert_close(labelled[:, start:end], z[:, start:end].softmax(1))
        assert len(lesson.teachers) == (before is not None)
        if before is not None:
            assert torch.equal(z, before(batch.inputs).logits)  # begins where it ended
            assert torch.equal(lesson.student.logits, z[:, : 2 * number])
            assert torch.equal(lesson.teachers[0].logits, before(batch.inputs).logits[:, : 2 * number])
        with torch.no_grad():
            student.module[1].weight.add_(1.0)
        before = student


def test_a_run_trains_and_keeps_to_labels_in_the_first_stage(tmp_path):
    train(tmp_path, RECIPE)
    lines = {line["stage"]: line["train"] for line in metrics(tmp_path / "run") if line["kind"] == "epoch"}
    assert "logit_kl" not in lines["stage_1"] and lines["stage_2"]["logit_kl"] > 0


def test_too_many_stages_are_refused_in_one_line(tmp_path):
    path = write(tmp_path, RECIPE, schedule={"stages": 100})
    with pytest.raises(kdkit.KdkitError, match="classes cannot come in 100 stages, 0 in the first; each needs one") as error:
        kdkit.check(path)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_run_that_stops_goes_on_with_the_same_bits(tmp_path):
    train(tmp_path, RECIPE, into="whole")
    for step, stage in ((4, "stage_1"), (3, "stage_2")):
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(patch, step)
            with pytest.raises(kdkit.Interrupted, match=stage):
                train(tmp_path, RECIPE)
    train(tmp_path, RECIPE)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
