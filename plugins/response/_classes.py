"""The label's class and the others, apart: what response losses share that need both."""

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkit


class SeveralClasses(kdkit.ResponseOptions):
    """Options of a loss that compares logits over the same classes, of which there are several."""

    def check(self, student: kdkit.Outputs, teacher: kdkit.Outputs) -> None:
        super().check(student, teacher)
        if student.logits.shape[1] < 2:
            raise kdkit.ShapeError(
                f"logits {tuple(student.logits.shape)} have no class beside the label; at least two"
                " are needed"
            )


def others(z: Tensor, classes: Tensor) -> Tensor:
    """Return the logits of every class but the label, in order, (B, K - 1)."""
    k = torch.arange(z.shape[1] - 1, device=z.device)
    return z.gather(1, k + (k >= classes[:, None]))


def log_probabilities(z: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Of the label and of the rest (B, 2); of each other class, given that it is not the label
    (B, K - 1).
    """
    rest = others(z, classes)
    # log p_y - log(1 - p_y), from logits: 1 - p_y would round to 0 for a certain label
    margin = z.gather(1, classes[:, None]) - rest.logsumexp(1, keepdim=True)
    # both from one margin: log(1 - sigmoid) would be infinite where the sigmoid rounds to 1
    return F.logsigmoid(torch.cat([margin, -margin], 1)), F.log_softmax(rest, dim=1)
