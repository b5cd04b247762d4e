"""LumiNet: a logit counts by how it stands among the same class's logits in the batch, for the
student as for the teacher.

Hossain et al., "LumiNet: The Bright Side of Perceptual Knowledge Distillation", 2023,
arXiv:2310.03669, with the 1e-5 of the released code. That code multiplies by the square
of a scale of 31 to 33 for CIFAR-100: here it is the recipe's weight, 961 and more, ramped up over
20 epochs beside twice the cross-entropy. The value depends on which samples share a batch.
"""

from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit


class LumiNet(kdkit.Loss):
    """KL divergence between the teacher's and the student's softened predictions, each class's
    logits standardised over the batch first.

    Formula: KL(softmax(h_t / T) || softmax(h_s / T)) with h = (z - m) / sqrt(v + 1e-5), mean over
    the batch, in nats

    m and v are the mean and the biased variance of a class over the batch. There is no factor T^2.
    A batch of one gives 0. Logits (B, K) on both sides.
    """

    name = "luminet"
    knowledge = "response"

    class Options(kdkit.ResponseOptions):
        temperature: kdkit.Rampable = Field(
            default=4.0,
            gt=0,
            description="T: softens both distributions; 1 leaves them as they are.",
        )
        gather: bool = Field(
            default=False,
            description="Standardise over the samples of all processes, not of each process alone.",
        )

    options: Options

    @classmethod
    def for_tasks(cls, options: Any = None) -> frozenset[str]:
        """Processes can gather samples, not pixels, of which each may have another number."""
        gathers = options is not None and options.gather
        return frozenset({"classes of samples" if gathers else "classes"})

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        t = self.options.temperature
        z_s, z_t = student.logits, teacher.logits
        if self.options.gather:
            z_s, z_t = kdkit.gather(z_s), kdkit.gather(z_t)
        log_p = F.log_softmax(perceived(z_s) / t, dim=1)
        log_q = F.log_softmax(perceived(z_t) / t, dim=1)
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def perceived(z: Tensor) -> Tensor:
    """Logits (B, K), each class with mean 0 and deviation 1 over the batch."""
    centred = z - z.mean(0)
    return centred / (centred.square().mean(0) + 1e-5).sqrt()


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [LumiNet]
