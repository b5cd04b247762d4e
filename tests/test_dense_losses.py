"""Losses on the pixels of a segmentation batch: rows of logits as of any task, and maps with masks, from end to end."""

import pytest
import torch
from naive_pixels import CLASSES, masks
from small_masks import lay_out, write
from test_capture import compare
from torch import nn
from training import assert_same_run, stop_and_go_on

import kdkit
from kdkit import recipe
from kdkit.contracts.task import serves
from kdkit.engine.objective import Objective
from kdkit.recipe import registry
from kdkit.recipe.sections import LossEntry
from kdkit.runs.run import Run
from kdkit.study.lockstep import train_together

PLUGINS = registry.load()
BODY, LOGITS = ([{"student": name, "teacher": name}] for name in ("body", "logits"))
PIXELS, SAMPLES = PLUGINS.tasks["segmentation"](), PLUGINS.tasks["classification"]()
ON_ROWS = [
    name
    for name, cls in PLUGINS.losses.items()
    if cls.knowledge in ("labels", "response") and not cls.needs_networks and serves(cls.tasks or cls.for_tasks(), PIXELS)
]


def of(name, task):
    """The loss alone, as an objective."""
    cls = PLUGINS.losses[name]
    entry = type("Entry", (LossEntry, cls.Options), {})(use=name)
    return Objective({name: (entry, cls(entry))}, task)


def value_and_slope(name, task, logits, teacher, batch):
    """What a loss gives for logits in the form of a task."""
    logits = logits.clone().requires_grad_()
    lesson, objective = kdkit.Lesson(kdkit.Outputs(logits), [kdkit.Outputs(teacher)]), of(name, task)
    torch.manual_seed(0)
    context = kdkit.Context(nn.Identity(), nn.Identity(), CLASSES, 0, torch.zeros(0))
    objective.setup(lesson, batch, context)
    value = objective(lesson, batch).total
    value.backward()
    return value.detach(), logits.grad


@pytest.mark.parametrize("name", ON_ROWS)
def test_pixels_are_rows_as_samples_are(name):
    batch, (student, teacher) = masks(2), torch.randn(2, 2, CLASSES, 8, 12, generator=torch.Generator().manual_seed(0))
    counts = batch.labels != 255
    student_rows, teacher_rows = (logits.permute(0, 2, 3, 1)[counts] for logits in (student, teacher))
    samples = kdkit.Batch(
        torch.zeros(len(student_rows), 3, 8, 8), batch.labels[counts], batch.index[:, None, None].expand_as(counts)[counts]
    )
    value, slope = value_and_slope(name, PIXELS, student, teacher, batch)
    expected, slopes = value_and_slope(name, SAMPLES, student_rows, teacher_rows, samples)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(slope.permute(0, 2, 3, 1)[counts], slopes)
    assert not slope.permute(0, 2, 3, 1)[~counts].any() and value != 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("masks"))


ON_SAMPLES = ["byot", "cat_kd", "crd", "frskd", "irg", "simkd", "srrl", "sskd"]


def test_losses_on_whole_samples_are_refused(folder):
    losses = [{"use": name, "layers": BODY * (2 if name in ("frskd", "irg") else 1)} for name in ON_SAMPLES]
    with pytest.raises(kdkit.RecipeError) as told:
        recipe.load(write(folder, "samples.yaml", losses=losses))
    for name, line in zip(ON_SAMPLES, str(told.value).splitlines(), strict=True):
        assert f"'{name}' is for classes of samples, and task 'segmentation' has rows of classes" in line


@pytest.mark.parametrize("name", ["ifvd", "cirkd_memory"])
def test_losses_on_masks_are_refused_for_other_tasks(name):
    assert not any(serves(PLUGINS.losses[name].tasks, cls()) for cls in PLUGINS.tasks.values() if not cls.moves)


NEW = [
    {"use": "skd_pairwise", "layers": BODY},
    {"use": "ifvd", "layers": BODY},
    {"use": "cirkd_pixel", "layers": BODY, "pool": 2},
    {"use": "cirkd_memory", "layers": BODY, "pixel_rows": 30, "region_rows": 9, "pixel_contrast": 20, "region_contrast": 9},
    {"use": "cwd", "layers": LOGITS},
]


def dense(folder, name, **changes):
    """A recipe of all these losses."""
    return write(folder, f"{name}.yaml", name=name, losses=[{"use": "cross_entropy"}, *NEW], **changes)


def test_steps_with_queues_and_masks_are_recorded(folder):
    plain = {"device": "cpu", "optimizer": {"lr": 1e-3, "args": {"fused": True}}}
    path = dense(folder, "recorded", task={"use": "segmentation", "rows_per_image": 9}, train=plain)
    assert not compare(path)


def test_a_stopped_run_and_one_beside_another_have_the_same_bits(folder, monkeypatch):
    """Queues go on where they were."""

    alone = kdkit.train(dense(folder, "alone"), folder=folder / "runs" / "alone", quiet=True).folder
    together = [
        Run(recipe.load(dense(folder, "alone")), folder / "together"),
        Run(recipe.load(dense(folder, "other", seed=1)), folder / "other"),
    ]
    assert all(outcome.reason is None for outcome in train_together(together))
    assert_same_run(alone, folder / "together")
    stop_and_go_on(folder / "alone.yaml", folder / "stopped", monkeypatch)
    assert_same_run(alone, folder / "stopped")
