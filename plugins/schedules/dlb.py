"""Self-distillation from the last mini-batch (DLB): what the student said one step ago teaches
it now.

Shen, Xu, Yang, Li, Guo, "Self-Distillation from the Last Mini-Batch for Consistency
Regularization", CVPR 2022, arXiv:2203.16172, algorithm 1: half of each batch is half of the one
before, seen once more. With `cross_entropy` and `logit_kl` (T = 3, weight 1) the total is CE(all
images) + T^2 KL(p_old; T of the last step || p; T), mean over the images that were there in the
last step. As in the released code, an image looks the same in both steps. There, the batch size
counts the new images alone; here all of them. There, the first step has labels only; here, in the
first step of an epoch, the student's own present answer stands where the remembered one will be,
for `logit_kl` a divergence of 0 without gradient.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import kdkit


class LastBatch(nn.Module):
    """What the student said of the new images of the last batch, those of all processes; saved
    with the stage.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[str, Any] = {}

    def forget(self) -> None:
        self._known = {}

    def keep(self, answer: kdkit.Outputs, batch: kdkit.Batch) -> None:
        # of all processes: an image may come to another one in the next step
        answer = answer.detach().map(kdkit.gather)
        self._known = {
            "index": kdkit.gather(batch.index),
            "logits": answer.logits,
            "features": dict(answer.features),
        }

    def recall(self, batch: kdkit.Batch) -> kdkit.Outputs | None:
        """The answer to these images; None where there is none yet."""
        if not self._known:
            return None
        rows = (self._known["index"].to(batch.index.device) == batch.index[:, None]).int().argmax(1)
        return kdkit.Outputs(self._known["logits"], self._known["features"]).map(
            lambda x: x.to(rows.device)[rows]
        )

    def get_extra_state(self) -> dict[str, Any]:
        return self._known

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._known = state


class LastMiniBatch(kdkit.Schedule):
    """Half of each batch was in the one before, and the student learns from what it then said of
    it.

    Labels count for all images. An epoch shows half of its images twice, a batch apart, and those
    of its first batch once; the others have their turn in other epochs, so epochs have as many
    steps as ever. Cost: one forward and one backward per image, as the student alone; the logits
    and tapped layers of half a batch are kept.
    """

    name = "dlb"
    scheme = "self"
    needs_teacher = False
    students_teach = True

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        student, last = models.student(), LastBatch()

        def step(batch: kdkit.Batch) -> Sequence[kdkit.Lesson]:
            if len(batch.labels) % 2:
                raise kdkit.RunError(
                    f"dlb: a process got {len(batch.labels)} images of a batch, which have no"
                    " halves; change `data.batch_size`"
                )
            answer = student(batch.inputs).pooled()
            # `overlapping` puts old images in even places, new ones in odd places
            seen, old = answer.map(lambda x: x[::2]), batch.map(lambda x: x[::2])
            teacher = last.recall(old) or seen.detach()
            if student.module.training:  # a probe leaves no trace
                last.keep(answer.map(lambda x: x[1::2]), batch.map(lambda x: x[1::2]))
            return [kdkit.Lesson(seen, [teacher], batch=old, supervised=kdkit.Lesson(answer))]

        yield kdkit.Stage(
            "last_batch",
            [student],
            step,
            # the next epoch begins with images that were not in this one's last batch
            after_epoch=last.forget,
            # saved with the stage, so that a resumed run knows the last batch
            parts=last,
            arrange=overlapping,
            teachers=[student],
        )


def overlapping(order: Tensor, classes: Tensor, batch_size: int) -> Tensor:
    """Old and new images in turns; the old ones of a batch are the new ones of the batch before."""
    count, half = len(order) // 2, batch_size // 2
    if batch_size % 2 or len(order) % 2:
        raise kdkit.RunError(
            f"dlb: `data.batch_size` ({batch_size}) and what an epoch has ({len(order)} images)"
            " must be even"
        )
    new = order[:count]
    # no batch comes before the first: its old images are from the half that is not new
    old = torch.cat([order[count : count + half], new])[:count]
    return torch.stack([old, new], 1).flatten()


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [LastMiniBatch]
