"""The plan of a recipe, which `kdkit check` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.inputs import is_text
from kdkit.recipe.sections import LossEntry
from kdkit.runs.step_cost import StepCost
from kdkit.units import with_unit


@dataclass(frozen=True)
class ModelPlan:
    """Plan of one model: parameters, multiply-accumulates per image, the shape (without the batch)
    of each tap, and of what it sees of a sample, if that is not all.
    """

    role: str
    parameters: int
    macs: int
    taps: tuple[tuple[str, tuple[int, ...]], ...]
    sees: tuple[int, ...] | None = None


@dataclass(frozen=True)
class StagePlan:
    """Plan of one stage: its objective as a formula, the learnable parts of its losses, its length,
    and the cost of a step.
    """

    name: str
    students: int
    formula: str
    adapters: tuple[tuple[str, str, int], ...]
    epochs: int
    steps: int
    cost: StepCost


@dataclass(frozen=True)
class Plan:
    """The complete plan that `kdkit check` prints."""

    name: str
    info: DataInfo
    rows_are: str
    num_train: int
    student: ModelPlan
    teachers: tuple[ModelPlan, ...]
    stages: tuple[StagePlan, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        info = self.info
        what = (
            f"texts of up to {info.image_shape[0]} tokens"
            if is_text(info.image_shape)
            else f"images {info.image_shape}"
        )
        # `image` or `text`.
        one = what.split()[0][:-1]
        rows = self.rows_are
        answers = rows if rows == "embeddings" else f"{info.outputs} {rows}"
        # data without training images: the schedule makes them
        training = f"{self.num_train:,}" if self.num_train else "no"
        yield f"{self.name}: {training} training and {info.num_test:,} test {what}, {answers}"
        if info.unlabelled:
            yield f"beside them: {info.unlabelled:,} unlabelled training {what.split()[0]}"
        for model in (*self.teachers, self.student):
            yield (
                f"{model.role}: {model.parameters:,} parameters, {with_unit(model.macs)}"
                f" multiply-accumulates per {one}{f', sees {model.sees}' if model.sees else ''}"
            )
            yield from (
                f"  tap {name} (B, {', '.join(map(str, shape))})" for name, shape in model.taps
            )
        for stage in self.stages:
            students = f", {stage.students} students" if stage.students > 1 else ""
            yield f"stage {stage.name}: {stage.epochs} epochs, {stage.steps:,} steps{students}"
            yield f"  total = {stage.formula}"
            yield f"  a step takes {stage.cost}"
            yield from (
                f"  adapters of {name}: {parts} ({parameters:,} parameters)"
                for name, parts, parameters in stage.adapters
            )
        yield from (f"note: {note}" for note in self.notes)


def formula(entries: Mapping[str, LossEntry]) -> str:
    """Format an objective as `0.1 * cross_entropy + 1 * hint(layer2 ~ layer3, adapter linear)`:
    each loss with its weight, layers and options.
    """
    return " + ".join(
        f"{_short(entry.weight)} * {name}{_details(entry)}" for name, entry in entries.items()
    )


def adapters(losses: Mapping[str, nn.Module]) -> Iterator[tuple[str, str, int]]:
    """List the name, the learnable parts with the shapes of their weights, and the number of
    parameters of each loss that has any.
    """
    for name, loss in losses.items():
        if count := sum(p.numel() for p in loss.parameters()):
            own = (
                (type(part).__name__, next(part.parameters(recurse=False), None))
                for part in loss.modules()
            )
            parts = [
                f"{kind} ({', '.join(map(str, weight.shape))})"
                for kind, weight in own
                if weight is not None
            ]
            yield name, ", ".join(parts), count


def _details(entry: LossEntry) -> str:
    layers = [f"{pair.student} ~ {pair.teacher}" for pair in entry.taps()]
    said = [
        f"{field.alias or key} {_short(getattr(entry, key))}"
        # Only what the recipe says: defaults would make each formula a paragraph.
        for key, field in type(entry).model_fields.items()
        if key in entry.model_fields_set and key not in ("use", "name", "weight", "layers")
    ]
    return f"({', '.join([*layers, *sorted(said)])})" if layers or said else ""


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
