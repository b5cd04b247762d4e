"""Logit regression: the student's logits approach the teacher's, before any softmax.

Ba, Caruana, "Do Deep Nets Really Need to be Deep?", NeurIPS 2014, arXiv:1312.6184, eq. 1. The paper
has half the squared norm per sample and normalises the targets once; this is the plain mean over
all B * K entries.
"""

import torch.nn.functional as F
from torch import Tensor

import kdkit


class LogitMSE(kdkit.Loss):
    """Mean squared difference of the logits.

    Formula: (z_s - z_t)^2, mean over the batch and the classes, in squared logits

    Logits (B, K) on both sides.
    """

    name = "logit_mse"
    knowledge = "response"
    tasks = "any"
    Options = kdkit.ResponseOptions

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        return F.mse_loss(student.logits, teacher.logits)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [LogitMSE]
