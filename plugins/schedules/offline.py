"""Offline distillation: teachers that were trained before and do not change.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531, for
one teacher and for an ensemble, whose answer is the mean of its members' probabilities (or their
geometric mean, that of the logits); the name as in Gou et al., "Knowledge Distillation: A Survey",
IJCV 2021, arXiv:2006.05525, section 3.1.

`combine: probabilities` averages softmax(z_m) at temperature 1; a loss softens the mean afterwards
by its own temperature T. The mean of the softened predictions softmax(z_m / T), as some codes take
it, is what `combine: each` learns from with a KL divergence:

    sum_m w_m KL(p_m || q) = KL(sum_m w_m p_m || q) + a constant of the student    for shares w_m
    that sum to 1.

`per_sample: cross_entropy` is the weighting of Zhang, Chen, Wang, "Confidence-Aware Multi-Teacher
Knowledge Distillation", ICASSP 2022, arXiv:2201.00007, equation 2, with M teachers and CE_m the
cross-entropy of teacher m on the label:

    w_m = (1 - exp(CE_m) / sum_j exp(CE_j)) / (M - 1)

There it weighs the teachers' losses on each sample, here their answers before they are combined.
With `probabilities` and a KL divergence at temperature 1 the student's gradient is the same; the
released code also divides the loss by M. `per_sample: entropy` puts the entropy of a teacher's
prediction in the place of CE_m, which needs no label.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

import kdkit


class Offline(kdkit.Schedule):
    """One stage: the student learns from a frozen teacher, or from several.

    Losses see the teachers' combined answer, or are averaged over the teachers; a loss with
    `teacher: NAME` sees that teacher's own answer. A step costs a forward of each teacher and a
    forward and backward of the student an image; memory all teachers' weights.
    """

    name = "offline"
    scheme = "offline"
    needs_teacher = True

    class Options(kdkit.ScheduleOptions):
        combine: Literal["probabilities", "logits", "each", "random"] = Field(
            default="probabilities",
            description=(
                "What several teachers give: the mean of their `probabilities` (which a loss's"
                " temperature softens afterwards) or `logits`; `each`: losses are averaged over"
                " them, with a KL divergence as from the mean of the softened probabilities;"
                " `random`: losses look at one, drawn for every batch."
            ),
        )
        weights: dict[str, float] | tuple[float, ...] | None = Field(
            default=None,
            description=(
                "Shares of the teachers, by name or in order, in what `combine` says; none: equal"
                " ones."
            ),
        )
        per_sample: Literal["none", "cross_entropy", "entropy"] = Field(
            default="none",
            description=(
                "Weigh the combined teachers anew for each image: less, the larger a teacher's"
                " cross-entropy on the label, or the entropy of its prediction."
            ),
        )

        @model_validator(mode="after")
        def _fits(self) -> "Offline.Options":
            if self.per_sample != "none" and self.combine not in ("probabilities", "logits"):
                raise ValueError(
                    "per_sample weighs what is combined to one answer (probabilities, logits), not"
                    f" `combine: {self.combine}`"
                )
            if self.per_sample != "none" and self.weights is not None:
                # both say how much a teacher counts
                raise ValueError("give weights or per_sample, not both")
            shares = self.weights.values() if isinstance(self.weights, dict) else self.weights
            if shares is not None and (min(shares, default=0) < 0 or not sum(shares)):
                raise ValueError("weights must not be negative, and one must be above 0")
            return self

    options: Options

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        student, teachers = models.student(), models.teachers()
        shares = self.shares(list(teachers))

        def step(batch: kdkit.Batch) -> Sequence[kdkit.Lesson]:
            with torch.no_grad():
                answers = {
                    name: teacher(batch.inputs).detach() for name, teacher in teachers.items()
                }
                taught, weights = self.combined(models.task, list(answers.values()), shares, batch)
            return [kdkit.Lesson(student(batch.inputs), taught, weights, answers)]

        yield kdkit.Stage("distill", [student], step)

    def shares(self, names: Sequence[str]) -> Sequence[float]:
        """Each teacher's weight.

        Raises:
            RunError: the weights are not those of these teachers.
        """
        weights = self.options.weights
        if (
            isinstance(weights, Mapping)
            and set(weights) != set(names)
            or isinstance(weights, tuple)
            and len(weights) != len(names)
        ):
            given = ", ".join(weights) if isinstance(weights, Mapping) else str(len(weights))
            raise kdkit.RunError(
                f"weights: must be for the teachers {', '.join(names)}, not {given}"
            )
        found = (
            [weights[name] for name in names]
            if isinstance(weights, Mapping)
            else weights or [1.0] * len(names)
        )
        return found

    def combined(
        self,
        task: kdkit.Task,
        answers: Sequence[kdkit.Outputs],
        given: Sequence[float],
        batch: kdkit.Batch,
    ) -> tuple[Sequence[kdkit.Outputs], Tensor | None]:
        """The answers that losses look at, and their shares in each loss."""
        if len(answers) == 1:
            return answers, None
        # not normalised before: shares may be given as any numbers, such as 2 and 1
        shares = kdkit.constants(given, like=answers[0].logits.float()) / sum(given)
        if self.options.combine == "each":
            return answers, shares
        if self.options.combine == "random":
            # as `torch.multinomial` draws, which makes the host wait for the device
            drawn = (shares / torch.empty_like(shares).exponential_()).argmax()
            return answers, torch.arange(len(answers), device=shares.device) == drawn
        if self.options.per_sample != "none":
            if answers[0].logits.ndim != 2:
                raise kdkit.RunError("per_sample weighs answers with one row of logits a sample")
            shares = confidence(
                answers, batch.labels if self.options.per_sample == "cross_entropy" else None
            )
        return [task.combined(answers, self.options.combine, shares)], None


def confidence(answers: Sequence[kdkit.Outputs], labels: Tensor | None) -> Tensor:
    """Shares of M teachers for each sample, (M, B), by their cross-entropies on the labels, or
    (without) by their own entropies.
    """
    # in fp32, also where teachers answer in half precision
    logits = [answer.logits.float() for answer in answers]
    doubts = [
        F.cross_entropy(z, z.softmax(1) if labels is None else labels, reduction="none")
        for z in logits
    ]
    # the softmax is exp(CE_m) / sum exp(CE_j), without the exponentials' size
    return (1 - torch.stack(doubts).softmax(0)) / (len(answers) - 1)


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [Offline]
