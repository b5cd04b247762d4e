"""Torchmetrics objects of several labels, apart from the task: they take long to import."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MultilabelF1Score
from torchmetrics.functional.classification import multilabel_average_precision
from torchmetrics.utilities import dim_zero_cat


class AveragePrecision(Metric):
    """Exact average precision (K,) of each label, NaN for a label without positives.

    An exact value needs all answers. They take 5 bytes each, where torchmetrics' own object takes
    12: it stores targets as int64.
    """

    answers: list[Tensor]
    positive: list[Tensor]

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.labels = labels
        self.add_state("answers", default=[], dist_reduce_fx="cat")
        self.add_state("positive", default=[], dist_reduce_fx="cat")

    def update(self, probabilities: Tensor, positive: Tensor) -> None:
        self.answers.append(probabilities)
        # uint8: not all backends gather booleans over processes
        self.positive.append(positive.to(torch.uint8))

    def compute(self) -> Tensor:
        answers, positive = dim_zero_cat(self.answers), dim_zero_cat(self.positive).long()
        # torchmetrics would warn of a label without positives, and call it 0
        occur = positive.any(0)
        count = int(occur.sum())
        each = answers.new_full((self.labels,), torch.nan)
        if count:
            each[occur] = multilabel_average_precision(
                answers[:, occur], positive[:, occur], count, average="none", validate_args=False
            ).reshape(count)
        return each


class MeanAveragePrecision(AveragePrecision):
    """Mean of the labels' average precisions, those without positives left out."""

    def compute(self) -> Tensor:
        return super().compute().nanmean()


class MacroF1(MultilabelF1Score):
    """Mean of the labels' F1 scores, those that are neither true nor predicted left out."""

    def __init__(self, labels: int) -> None:
        super().__init__(labels, average="none", validate_args=False)

    def compute(self) -> Tensor:
        each: Tensor = super().compute()
        seen = dim_zero_cat(self.tp) + dim_zero_cat(self.fp) + dim_zero_cat(self.fn) > 0
        # torchmetrics counts a label that does not occur as 0
        return each[seen].mean()
