"""Random networks, answers and labels that a loss is tried on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.loss import Loss, Rest
from kdkit.contracts.records import Batch, Outputs
from kdkit.contracts.survey import Survey
from kdkit.contracts.task import RowMeaning
from kdkit.recipe import registry
from kdkit.testing.forms import IMAGE, Network, Shape
from kdkit.testing.outputs import random_batch, random_outputs


def meaning_of_rows(loss: Loss) -> RowMeaning:
    """Find what the rows mean that a loss is tried on: classes, unless it is for others only."""
    tasks = loss.for_tasks(loss.options)
    if tasks == "any" or "classes" in tasks:
        return "classes"
    if tasks & {"labels", "labels of samples"}:
        return "labels"
    return "numbers" if "numbers" in tasks else "classes"


def labels_for(loss: Loss, count: int, classes: int) -> Tensor:
    """Make labels that the loss reads: masks, if it is only for a task that has some."""
    tasks, known = loss.for_tasks(loss.options), registry.load().tasks
    if tasks != "any" and all(name in known and known[name].moves for name in tasks):
        info = DataInfo(IMAGE, classes, num_train=count, num_test=count)
        return known[min(tasks)]().random_targets(info, torch.arange(count))
    return random_batch(count, classes, rows=meaning_of_rows(loss)).labels


def layers_of(loss: Loss, shapes: tuple[Shape, Shape]) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Name the layers that a loss reads, with the shapes of the student's and the teacher's."""
    pairs = loss.options.taps()
    student = {pair.student: shapes[0] for pair in pairs}
    teacher = {pair.teacher: shapes[1] for pair in pairs}
    if loss.knowledge == "labels":  # both layers of a pair are the student's
        # A layer that both sides name keeps the student's shape.
        student = {**teacher, **student}
    return student, teacher


def networks_with(layers: tuple[dict[str, Shape], dict[str, Shape]], classes: int) -> list[Network]:
    """Make a student and a teacher with these layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [
            Network({name: shape for name, shape in shapes.items() if shape}, classes)
            for shapes in layers
        ]


def behind(network: nn.Module, layer: str, taps: Sequence[str]) -> Rest:
    """Return a stand-in for what follows a layer of a stand-in."""
    assert isinstance(network, Network)
    return network.behind(layer, taps)


def random_survey(labels: Tensor, network: nn.Module, survey: Survey) -> dict[str, Tensor]:
    """Survey random answers of a stand-in to images with these labels."""
    assert isinstance(network, Network)
    index = torch.arange(len(labels)) if survey.images is None else survey.images
    # a layer without a name of its own is the classifier's input
    embedding = (network.classifier.in_features,)
    shapes = {layer: network.shapes.get(layer, embedding) for layer in survey.layers}
    answer = random_outputs(shapes, size=len(index), classes=network.classes, seed=7)
    return survey.of([(answer, Batch(torch.zeros(len(index), *IMAGE), labels[index], index))])


def random_answers(
    cls: type[Loss],
    layers: tuple[dict[str, Shape], dict[str, Shape]],
    classes: tuple[int, int],
    size: int,
) -> tuple[Outputs, Outputs]:
    """Draw an answer of the student and one of the teacher."""
    student, teacher = (
        random_outputs(
            layers[side], size=size, seed=size + side, views=cls.needs_views, classes=classes[side]
        )
        for side in (0, 1)
    )
    if cls.whole_answers:
        student, teacher = (
            replace(answer, logits=_whole_answer(cls, size, size + side, classes[side]))
            for side, answer in enumerate((student, teacher))
        )
    return student, teacher


def _whole_answer(cls: type[Loss], size: int, seed: int, classes: int) -> Tensor:
    """Draw logits of whole samples, whose rows are parts of them, as the loss's first task does."""
    task = registry.load().tasks[min(cls.tasks)]()
    info = DataInfo(IMAGE, classes, num_train=size, num_test=size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return task.random_answer(info, size).logits
