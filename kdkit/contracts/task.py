"""The interface of a task plugin: the form of targets and answers, and the scores.

A sample is a set of rows: one row an image, a pixel, a token or an anchor. Losses on labels and
responses, and scores, see rows of an answer, (R, K), beside their targets, (R, ...); so one loss
serves every task whose rows mean the same.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.ensembles import Combination, ensemble
from kdkit.contracts.inputs import Shape, TextShape, random_inputs
from kdkit.contracts.options import Options
from kdkit.contracts.records import Batch, Inputs, Outputs
from kdkit.errors import DataError, ShapeError

# torchmetrics takes seconds to import, and commands that measure nothing do without it
if TYPE_CHECKING:
    from torchmetrics import Metric

RowMeaning = Literal["classes", "labels", "numbers", "embeddings"]
"""Meaning of the K values of a row: logits of mutually exclusive classes (softmax), logits of
independent labels (sigmoid), the answer itself, or an embedding, whose axes have no meaning.
"""


@dataclass(frozen=True)
class Rows:
    """Answers and targets in the form that scores receive, row by row.

    Attributes:
        answer: (R, K), fp32.
        target: (R, ...).
        teacher: what the task remembers of the teacher's answers to the same samples; None without
            a teacher.
    """

    answer: Tensor
    target: Tensor
    teacher: Any = None

    def to(self, device: torch.device) -> Rows:
        """Move the rows to another device."""
        # what a task remembers of a teacher need not be a tensor
        teacher = self.teacher.to(device) if isinstance(self.teacher, Tensor) else self.teacher
        return Rows(self.answer.to(device), self.target.to(device), teacher)


@dataclass(frozen=True)
class Example:
    """A sample of the test data, and what networks answer to it, for a report.

    Attributes:
        image: (C, H, W) in [0, 1], on the CPU.
        target: in the task's form; None if it is not known.
        answers: logits by the network's name: those of the teacher first if there is one, then
            those of the baseline's student and of the best other students.
        frame: x0, y0, x1, y1 of the picture in a padded image, pixels; None if it is not known.
    """

    image: Tensor
    target: Tensor | None
    answers: Mapping[str, Tensor]
    frame: tuple[int, int, int, int] | None = None


def answer_and_target(rows: Rows) -> tuple[Any, ...]:
    """Return the answer and the target, the arguments of most metrics."""
    return rows.answer, rows.target


@dataclass(frozen=True, kw_only=True)
class ScoreInfo:
    """Description of a score: its names, unit and direction.

    Attributes:
        name: its key in files, snake_case.
        title: its name in tables and texts, such as `mean IoU`.
        unit: `%`, `nats`...; empty for a plain number.
        digits: after the decimal point.
        higher_is_better: its direction.
        chance: its value for random guessing; None if undefined.
        meaning: its definition in a few words.
        part_of: title of the score that this is a part of, such as `IoU` of a class; empty for a
            score of its own. Tables leave parts out.
    """

    name: str
    title: str
    unit: str = ""
    digits: int = 2
    higher_is_better: bool = True
    chance: float | None = None
    meaning: str = ""
    part_of: str = ""

    @property
    def heading(self) -> str:
        """Heading of its column: `mean IoU %`; `NLL, nats ↓` if lower is better."""
        unit = " %" if self.unit == "%" else f", {self.unit}" if self.unit else ""
        return f"{self.title}{unit}{'' if self.higher_is_better else ' ↓'}"

    @property
    def difference_unit(self) -> str:
        """Unit of its differences: `points` for per cent."""
        # A difference of percentages in % would read as relative.
        return "points" if self.unit == "%" else self.unit

    def rank(self, value: float) -> float:
        """Return the value with the sign that makes larger better."""
        return value if self.higher_is_better else -value

    def number(self, value: float) -> str:
        """Format the value with its digits; `-` for NaN: there is nothing to measure."""
        return "-" if math.isnan(value) else f"{value:.{self.digits}f}"

    def text(self, value: float) -> str:
        """Format the value with its unit: `97.40 %`."""
        unit = "" if math.isnan(value) else self.unit
        return f"{self.number(value)} {unit}".rstrip()


def _whole(computed: Any) -> Any:
    return computed


Ask = Callable[[Inputs], Outputs]
"""A network, or several as one, as a function from a batch's inputs to its answer."""


@dataclass(frozen=True, kw_only=True)
class Score(ScoreInfo):
    """A score: a number that measures how good answers are.

    Attributes:
        build: makes the torchmetrics object that accumulates it, batch by batch and over processes.
        sees: selects the arguments of the object's `update`.
        scale: factor of its value, 100 for per cent.
        reads: selects the score from what the object computes. Scores with the same `build`,
            `sees` and `shown` share one object.
        parts: names of the numbers (P,) that the object computes, such as classes; empty if it
            computes one. Each is a score `name/part`; NaN, such as the accuracy of a class that
            does not occur, is left out.
        shown: makes the batch that a network is asked about in place of the data's, such as
            attacked images; it may have fewer samples. Called in eval mode, without gradients.
        of_teacher: whether it compares answers with a teacher's. Without a teacher it is left out;
            the score of the teacher itself is that of its answers to themselves.
    """

    build: Callable[[], Metric]
    sees: Callable[[Rows], tuple[Any, ...]] = answer_and_target
    scale: float = 1.0
    reads: Callable[[Any], Any] = _whole
    parts: tuple[str, ...] = ()
    shown: Callable[[Ask, Batch], Batch] | None = None
    of_teacher: bool = False

    def infos(self) -> tuple[ScoreInfo, ...]:
        """Return the descriptions that are stored in files: one, or one for each part."""
        # `fields`, not `asdict`: this record also has functions, which no file can store
        whole = ScoreInfo(**{field.name: getattr(self, field.name) for field in fields(ScoreInfo)})
        if not self.parts:
            return (whole,)
        return tuple(
            replace(whole, name=f"{self.name}/{part}", title=part, part_of=self.title)
            for part in self.parts
        )

    def numbers(self, computed: Any) -> dict[str, float]:
        """Return what the object has computed, scaled, by the names of `infos`.

        Raises:
            ShapeError: it is not one number, or not one for each part.
        """
        value = self.reads(computed)
        found = torch.as_tensor(value)
        # torchmetrics gives a tensor of one element as a number
        if len(self.parts) == 1 and found.ndim == 0:
            found = found[None]
        if found.shape != ((len(self.parts),) if self.parts else ()):
            told = f"{len(self.parts)} parts" if self.parts else "a score, which is one number"
            raise ShapeError(f"{self.name}: its values are {tuple(found.shape)}, for {told}")
        if not self.parts:
            return {self.name: float(self.scale * value)}
        listed = (found * self.scale).tolist()
        return {
            f"{self.name}/{part}": number
            for part, number in zip(self.parts, listed, strict=True)
            if not math.isnan(number)
        }


def serves(tasks: Set[str] | Literal["any"], task: Task) -> bool:
    """Check whether a plugin for these tasks, by name or meaning of rows, serves this one."""
    meanings = {task.name, task.rows_are}
    if type(task).rows is Task.rows:
        meanings.add(f"{task.rows_are} of samples")
    return tasks == "any" or bool(meanings & set(tasks))


class TaskOptions(Options):
    """Options of a task; subclass it as `Options` in the task."""


class Task(abc.ABC):
    """A task: the question that is asked of every sample, and the form of an answer.

    A task knows no network, loss or schedule. Its methods are defaults for tasks with one row for
    each sample, whose targets are one tensor.
    """

    name: ClassVar[str]
    takes: ClassVar[Literal["images", "texts"]] = "images"
    rows_are: ClassVar[RowMeaning]
    moves: ClassVar[bool] = False
    """Whether targets move with the image, as masks do: then they are read with it (`movable`), and
    transformed together.
    """
    fill: ClassVar[int] = 0
    """Value of a mask where its image is padded."""
    answer_axis: ClassVar[int] = 1
    """Axis of a network's output (B, ...) that has the K values of a row."""
    in_pixels: ClassVar[bool] = False
    """Whether answers are in pixels of the batch's images, as boxes are: then networks see images
    at that size.
    """
    labels_rows: ClassVar[bool] = True
    """Whether each row has a target of its own. If not, as where a network decides which of its
    anchors answers for an object, losses on labels must read whole answers.
    """
    default_loss: ClassVar[str]
    """Name of the usual loss on labels for this task; of embeddings, of the usual loss."""
    least_score: ClassVar[str | None] = None
    """Name of the option that is the least score of what `predicted` lists, if there is one;
    `kdkit predict --threshold` gives another value.
    """
    Options: ClassVar[type[TaskOptions]] = TaskOptions

    def __init__(self, options: TaskOptions | None = None) -> None:
        self.options = options or self.Options()

    # hooks about samples and targets

    @abc.abstractmethod
    def check(self, info: DataInfo) -> None:
        """Refuse a dataset whose samples or information the task cannot use.

        Raises:
            DataError: says what is missing.
        """

    def shape(self, shape: Sequence[int]) -> Shape:
        """Return the shape of a sample, in the task's terms.

        Raises:
            DataError: samples of this task have no such shape.
        """
        of_texts = self.takes == "texts"
        takes = "texts of at most N tokens (N,)" if of_texts else "images (C, H, W)"
        if len(shape) != (1 if of_texts else 3):
            raise DataError(
                f"task '{self.name}' takes {takes}, and the samples are {tuple(shape)}; say which"
                " task it is (`task:`)"
            )
        return TextShape(shape) if of_texts else tuple(shape)

    def described(self, info: DataInfo) -> DataInfo:
        """Return what is known of a dataset in the task's terms, such as other outputs than those
        that it was made for.
        """
        return info

    @abc.abstractmethod
    def targets(self, values: Any, info: DataInfo, whose: str) -> Tensor:
        """Convert the targets of a part of the data to one tensor (N, ...).

        Args:
            values: as the dataset gives them, one for each sample.
            info: of the dataset.
            whose: begins a message, such as "dataset 'digits': training labels".

        Raises:
            DataError: they are of the wrong type, shape or range.
        """

    def movable(
        self, target: Any, size: tuple[int, int], info: DataInfo
    ) -> Tensor | Mapping[str, Tensor]:
        """Convert one target that moves with its image to a `tv_tensor` of torchvision, which
        transforms know how to move, or to several by name; only called if `moves`.

        Args:
            target: as the dataset gives it beside its image; None for an unlabelled image.
            size: (H, W) of the image, pixels.
            info: of the dataset.

        Raises:
            DataError: it is of the wrong type, size or range; the caller names the sample.
        """
        raise NotImplementedError(f"task '{self.name}' has targets that stay where they are")

    def moved(self, target: Any) -> Tensor:
        """Convert what `movable` returned, after it has moved with its image, to a plain tensor.

        Those of a batch are stacked. If they differ in length (a number of boxes), the shorter ones
        are padded by -1.
        """
        return torch.as_tensor(target).as_subclass(Tensor)

    def strata(self, targets: Tensor) -> Tensor | None:
        """Return a group (N,), counted from 0, for each sample: subsets, balanced sampling and
        arrangements preserve the groups' proportions. None: there are no groups, and samples are
        drawn at random.
        """
        return None

    @abc.abstractmethod
    def random_targets(self, info: DataInfo, index: Tensor) -> Tensor:
        """Make random targets of samples with these numbers (B,), for checks and tests."""

    def random_inputs(
        self, shape: Shape, count: int, device: torch.device | str | None = None, seed: int = 0
    ) -> Inputs:
        """Make random samples without content; equal for equal seeds."""
        return random_inputs(self.shape(shape), count, device, seed)

    # hooks about answers

    def outputs(self, info: DataInfo) -> int:
        """Return the number of outputs that a network is built with; 0: it is built without a
        head, and its answer is an embedding.
        """
        return info.outputs

    def fits(self, shape: Sequence[int], info: DataInfo, count: int) -> bool:
        """Check whether a network's output of that shape is an answer to `count` samples."""
        return tuple(shape) == (count, info.outputs)

    def of_classes(self, answer: Tensor, classes: Sequence[int]) -> Tensor:
        """Select classes, by number, of a network's answer (B, ...)."""
        chosen = torch.tensor(list(classes), device=answer.device)
        return answer.index_select(self.answer_axis, chosen)

    def random_answer(self, info: DataInfo, count: int) -> Outputs:
        """Make a random answer to `count` samples, for checks and tests."""
        return Outputs(torch.randn(count, info.outputs))

    def row_width(self, info: DataInfo) -> int:
        """Return K, the number of values in a row: by default all outputs of a network."""
        return self.outputs(info)

    def rows(self, answers: Sequence[Outputs], batch: Batch) -> tuple[list[Outputs], Batch]:
        """Split the answers to one batch, and the batch itself, into rows: `logits` (R, K) beside
        `labels` (R, ...) and `index` (R,), the sample that a row belongs to. Rows that do not count
        are left out; layers stay as they are.
        """
        return [*answers], batch

    def scored_rows(self, answers: Sequence[Outputs], batch: Batch) -> tuple[list[Outputs], Batch]:
        """Split answers and batch into the rows that scores receive, if those differ from the rows
        that losses receive.
        """
        return self.rows(answers, batch)

    def combined(
        self,
        answers: Sequence[Outputs],
        by: Combination = "probabilities",
        weights: Tensor | None = None,
    ) -> Outputs:
        """Combine the answers of several models into one.

        Raises:
            ShapeError: answers of this task have no mean.
        """
        if self.rows_are == "numbers":  # numbers have only one kind of mean
            by = "logits"
        is_of_labels = self.rows_are == "labels"
        return ensemble(answers, by, weights, of_labels=is_of_labels, axis=self.answer_axis)

    def mixer(
        self, options: Mapping[str, Any], info: DataInfo
    ) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Make the mixer of a batch's images and targets (`train.mixup`), with timm's options.

        Raises:
            DataError: targets of this task cannot be mixed.
        """
        raise DataError(f"targets of task '{self.name}' cannot be mixed")

    def as_targets(self, answer: Outputs) -> Tensor:
        """Convert a teacher's answer to labels (B, ...)."""
        if self.rows_are == "classes":
            return answer.logits.argmax(self.answer_axis)
        # a logit above 0 is a probability above 1/2
        return (answer.logits > 0).long() if self.rows_are == "labels" else answer.logits

    # hooks about scores

    @abc.abstractmethod
    def scores(self, info: DataInfo) -> Sequence[Score]:
        """Return the scores of an answer; the first one chooses epochs, students and variants."""

    def agreement(self, info: DataInfo) -> Sequence[Score]:
        """Return the scores that compare answers with those of a teacher."""
        return ()

    def remembered(self, answer: Outputs, batch: Batch) -> Sequence[Any] | Tensor:
        """Extract what the agreement scores need of a teacher's answer, one entry a sample."""
        return answer.logits

    def seen(self, rows: Rows) -> tuple[Any, ...]:
        """Return the arguments of torchmetrics classes: probabilities, or numbers like the target.

        Torchmetrics takes logits too, but guesses by each batch whether they are any.
        """
        if self.rows_are == "numbers":
            return rows.answer.reshape(rows.target.shape), rows.target
        if self.rows_are == "labels":
            return rows.answer.sigmoid(), rows.target.long()
        return rows.answer.softmax(1), rows.target

    def predicted(self, answer: Outputs, info: DataInfo) -> Sequence[Mapping[str, Any]]:
        """Say what a network answers to each sample, by column of a table.

        A tensor (H, W) of uint8 is a picture. Where a sample has several objects, all columns have
        a list, an entry for each; their boxes are torchvision's `BoundingBoxes` in pixels.
        """
        names = info.class_names or tuple(map(str, range(info.outputs)))
        logits = answer.logits.float()
        if self.rows_are == "numbers":
            return [dict(zip(names, row, strict=True)) for row in logits.tolist()]
        if self.rows_are == "labels":
            return [
                {
                    "labels": " ".join(n for n, p in zip(names, row, strict=True) if p > 0.5),
                    **dict(zip(names, row, strict=True)),
                }
                for row in logits.sigmoid().tolist()
            ]
        largest, classes = logits.softmax(1).max(1)
        pairs = zip(classes.tolist(), largest.tolist(), strict=True)
        return [{"class": names[index], "probability": share} for index, share in pairs]

    def drawn(self, example: Example, info: DataInfo) -> Any:
        """Draw what networks answer to a sample, for a report; return a matplotlib figure, or None
        if there is nothing to see.
        """
        return None

    def metric_arguments(self, info: DataInfo) -> Mapping[str, Any]:
        """Return the arguments for torchmetrics classes; a class receives those that it accepts."""
        return {}
