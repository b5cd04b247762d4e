"""Torchmetrics objects of classification, apart from the task: they take long to import."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassRecall
from torchmetrics.utilities import dim_zero_cat


class BalancedAccuracy(MulticlassRecall):
    """Mean of the recalls of the classes that are labelled."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes, average="none", validate_args=False)

    def compute(self) -> Tensor:
        recalls: Tensor = super().compute()
        # a class without samples has no recall: counted as 0, it would lower the mean
        labelled = dim_zero_cat(self.tp) + dim_zero_cat(self.fn) > 0
        return recalls[labelled].mean()


class CrossEntropy(Metric):
    """Cross-entropy of logits (B, K) on class indices (B,), nats per sample.

    Keeps a number for each sample, so that the mean is the same in batches of any size.
    """

    picked: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("picked", default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        self.picked.append(logits.log_softmax(1).gather(1, labels[:, None]))

    def compute(self) -> Tensor:
        picked = dim_zero_cat(self.picked)
        return F.nll_loss(picked, torch.zeros(len(picked), dtype=torch.int64, device=picked.device))


def mean() -> Any:
    """The mean of a number of each sample, summed in double precision."""
    # a search for NaN would make the host wait in every batch
    return MeanMetric(nan_strategy="disable").set_dtype(torch.float64)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence (B,) of the student's answer from the teacher's, nats."""
    ours, theirs = student.log_softmax(1), teacher.log_softmax(1)
    # summed in fp64: where answers agree, terms of both signs cancel
    return F.kl_div(ours, theirs, reduction="none", log_target=True).double().sum(1)
