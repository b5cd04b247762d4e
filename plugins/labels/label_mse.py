"""Squared error on labels that are shares of the classes.

Nguyen, Chen, Lee, "Dataset Meta-Learning from Kernel Ridge-Regression", ICLR 2021,
arXiv:2011.00050, section 4.3, trains networks by it on the labels that a kernel regression has
learnt; Hui, Belkin, "Evaluation of Neural Architectures Trained with Square Loss vs Cross-Entropy
in Classification Tasks", ICLR 2021, arXiv:2006.07322, on one-hot labels.
"""

import torch.nn.functional as F
from torch import Tensor

import kdkit


class LabelMSE(kdkit.Loss):
    """Squared difference of the student's logits and the labels, of mean 0.

    Formula: (z_s - y + 1/K)^2, mean over all elements

    y is the one-hot label, or the labels' own numbers (B, K), which need be no probabilities
    (`data.distilled.labels: solved`). Student logits (B, K); the teacher is not read.
    """

    name = "label_mse"
    knowledge = "labels"

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        z, y = student.logits, batch.labels
        if y.ndim == 1:
            y = F.one_hot(y, z.shape[1])
        return F.mse_loss(z, y.to(z) - 1 / z.shape[1])


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [LabelMSE]
