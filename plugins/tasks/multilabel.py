"""Several labels for each image, which do not exclude each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import kdkit

from ._numbers import columns, table


class Multilabel(kdkit.Task):
    """Any of K labels for each image; a row is an image.

    Targets are numbers (N, K) from 0 to 1: 1 where a label holds, or its share. Answers are logits
    (B, K), one yes-or-no question each. Losses learn from shares as they are; for scores, a label
    holds from a share of 1/2 on, and is predicted above a probability of 1/2. Scores: mean average
    precision (decides), macro and micro F1, and the average precision of each label.
    """

    name = "multilabel"
    rows_are = "labels"
    default_loss = "bce"

    def check(self, info: kdkit.DataInfo) -> None:
        if info.outputs < 1:
            raise kdkit.DataError("has no label: there must be one to ask for")

    def targets(self, values: Any, info: kdkit.DataInfo, whose: str) -> Tensor:
        """Shares of the labels as fp32 (N, K)."""
        wanted = (
            f"a target is {info.outputs} numbers from 0 to 1, one for each label: 1 where it holds"
        )
        return table(values, info, whose, wanted, within=(0.0, 1.0))

    def random_targets(self, info: kdkit.DataInfo, index: Tensor) -> Tensor:
        labels = torch.arange(info.outputs, device=index.device)
        return ((index[:, None] + labels) % 2).float()

    def mixer(self, options: Mapping[str, Any], info: kdkit.DataInfo) -> Any:
        """timm's mixup and cutmix; a label's share is that of the images that have it."""
        from timm.data import Mixup

        # bce has label smoothing as an option of its own
        return Mixup(  # type: ignore[no-untyped-call]
            **options, label_smoothing=0.0, num_classes=info.outputs, multi_label=True
        )

    def as_targets(self, answer: kdkit.Outputs) -> Tensor:
        return decided(answer.logits).float()

    def scores(self, info: kdkit.DataInfo) -> Sequence[kdkit.Score]:
        labels = info.outputs
        per_cent: dict[str, Any] = {"scale": 100.0, "unit": "%"}

        def mean_average_precision() -> Any:
            from ._label_metrics import MeanAveragePrecision

            return MeanAveragePrecision(labels)

        def macro_f1() -> Any:
            from ._label_metrics import MacroF1

            return MacroF1(labels)

        def micro_f1() -> Any:
            from torchmetrics.classification import MultilabelF1Score

            # its checks look at values, for which the host would wait for the device
            return MultilabelF1Score(labels, average="micro", validate_args=False)

        def average_precision() -> Any:
            from ._label_metrics import AveragePrecision

            return AveragePrecision(labels)

        each = kdkit.Score(
            name="ap",
            title="AP",
            build=average_precision,
            sees=self.seen,
            parts=columns(info),
            meaning="average precision of the label",
            **per_cent,
        )
        return (
            kdkit.Score(
                name="map",
                title="mAP",
                build=mean_average_precision,
                sees=self.seen,
                meaning="mean of the average precisions of the labels that occur",
                **per_cent,
            ),
            kdkit.Score(
                name="macro_f1",
                title="macro F1",
                build=macro_f1,
                sees=decisions,
                meaning=(
                    "mean of the labels' F1 scores; a label neither true nor predicted is left out"
                ),
                **per_cent,
            ),
            kdkit.Score(
                name="micro_f1",
                title="micro F1",
                build=micro_f1,
                sees=decisions,
                meaning="F1 score of all decisions together",
                **per_cent,
            ),
            # that of a single label is the mean
            *([each] if labels > 1 else []),
        )

    def agreement(self, info: kdkit.DataInfo) -> Sequence[kdkit.Score]:
        def mean() -> Any:
            from ._metrics import mean

            return mean()

        def same(rows: kdkit.Rows) -> tuple[Tensor]:
            return ((decided(rows.answer) == decided(rows.teacher)).double().mean(1),)

        def difference(rows: kdkit.Rows) -> tuple[Tensor]:
            return ((rows.answer.sigmoid() - rows.teacher.sigmoid()).abs().double().mean(1),)

        return (
            kdkit.Score(
                name="agreement",
                title="agreement",
                build=mean,
                sees=same,
                scale=100.0,
                unit="%",
                meaning="share of decisions, over samples and labels, that are the teacher's too",
            ),
            kdkit.Score(
                name="probability_difference",
                title="mean |p_s - p_t|",
                build=mean,
                sees=difference,
                digits=4,
                higher_is_better=False,
                meaning="mean of |sigmoid(z_s) - sigmoid(z_t)| over samples and labels",
            ),
        )

    def seen(self, rows: kdkit.Rows) -> tuple[Any, ...]:
        """Probabilities, and which labels hold."""
        return rows.answer.sigmoid(), holds(rows.target)

    def metric_arguments(self, info: kdkit.DataInfo) -> Mapping[str, Any]:
        return {"task": "multilabel", "num_labels": info.outputs}


def holds(target: Tensor) -> Tensor:
    """Which labels hold (R, K), as int64: those with at least half a share."""
    return (target >= 0.5).long()


def decided(logits: Tensor) -> Tensor:
    """Which labels are predicted (R, K), as int64: those more probable than not."""
    return (logits > 0).long()


def decisions(rows: kdkit.Rows) -> tuple[Tensor, Tensor]:
    """Which labels are predicted, and which hold."""
    return decided(rows.answer), holds(rows.target)


@kdkit.hookimpl
def kdkit_tasks() -> list[type[kdkit.Task]]:
    return [Multilabel]
