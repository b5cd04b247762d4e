"""On-the-fly native ensemble (ONE): one network with several branches, which learn from a gated
mixture of their own answers.

Lan, Zhu, Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018,
arXiv:1806.04606, section 3. Behind a trunk, K branches give logits z_1..z_K; a gate (linear, batch
norm, ReLU, softmax over branches) looks at what the trunk gives and mixes them:

    z_e = sum_k g_k z_k
    L   = sum_k cross_entropy(z_k, y) + cross_entropy(z_e, y) + c(t) T^2 sum_k KL(softmax(z_e / T)
    || softmax(z_k / T))

which is `cross_entropy`, and `logit_kl` with a weight that follows the released code's consistency
ramp c(t) = exp(-5 (1 - t / 80)^2) until epoch 80: `{from: 0, to: 1, epochs: 80, shape: sigmoid}`.
As in the released code, z_e is a constant where it teaches. The gate sees the trunk's answer as the
mean over its positions.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import kdkit


class Branches(kdkit.Schedule):
    """One stage: K branches behind a common trunk learn from their mixture by a gate, which
    learns from the labels with them.

    The mixture has a lesson of its own, from the labels alone and without losses that read layers
    (NAME@K+1 in the logs); it teaches the branches. Losses that read layers see those of the other
    branches, and their mean counts. Each branch with the trunk is a whole student, and one is
    exported. The trunk learns at the first student's rate, from the lessons of all. A step costs
    one forward and backward of the trunk and K of what is behind it; with `train.compile`, or where
    a network's later code looks back before the split, K of the trunk too (`kdkit check` counts).
    """

    name = "branches"
    scheme = "online"
    needs_teacher = False
    # peers are weighed for each sample, whose answer is one row
    tasks = frozenset(
        {"classes of samples", "labels of samples", "numbers of samples", "embeddings of samples"}
    )
    students_teach = True

    class Options(kdkit.ScheduleOptions):
        """Where the network is split."""

        split: str = Field(
            description="The layer behind which the branches begin, such as `stage2`."
        )
        branches: int = Field(default=3, ge=2, le=64, description="K: how many branches.")
        result: Literal["first", "best"] = Field(
            default="first",
            description=(
                "Which branch is exported: the first, or the best on `data.validation` at the end."
            ),
        )

    options: Options

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        students = [
            # the trunk is the first student's: only there is the split looked at
            models.student(taps=(self.options.split,) if k == 0 else ())
            for k in range(self.options.branches)
        ]
        network = kdkit.Trunk(students, self.options.split)
        gate = Gate(kdkit.channels(students[0], self.options.split), len(students))

        def step(batch: kdkit.Batch) -> Sequence[kdkit.Lesson]:
            trunk, answers = network(batch.inputs)
            mixture = gate(
                kdkit.as_vectors(trunk, answers[0].mask), [answer.logits for answer in answers]
            )
            # the mixture's logits with each branch's own layers, for losses that read layers
            taught = [kdkit.with_logits(answer.detach(), mixture.detach()) for answer in answers]
            lessons = [
                kdkit.Lesson(own, taught[:k] + taught[k + 1 :]) for k, own in enumerate(answers)
            ]
            # without layers: the mixture is of logits alone
            return [*lessons, kdkit.Lesson(kdkit.Outputs(mixture))]

        yield kdkit.Stage("branches", students, step, parts=gate, result=self.options.result)


class Gate(nn.Module):
    """Mixes the branches' logits by what the trunk gives, a vector of each sample."""

    def __init__(self, channels: int, branches: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, branches)
        self.norm = nn.BatchNorm1d(branches)

    def forward(self, trunk: Tensor, logits: Sequence[Tensor]) -> Tensor:
        shares = self.norm(self.linear(trunk)).relu().softmax(1)
        mixture: Tensor = (shares.unsqueeze(2) * torch.stack(list(logits), 1)).sum(1)
        return mixture


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [Branches]
