"""What tasks share that ask for one class of each sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import kdkit

BINS = 15
SUM = 1e-3
"""How far the sum of a label's shares may be from 1."""


class Classes(kdkit.Task):
    """One of K classes for each sample; a row is a sample.

    Targets are class indices (N,), answers logits (B, K). Scores: top-1 (decides) and top-5
    accuracy, balanced accuracy, macro F1, cross-entropy, and the calibration error of Guo et al.
    2017 in 15 bins.
    """

    rows_are = "classes"
    default_loss = "cross_entropy"

    def check(self, info: kdkit.DataInfo) -> None:
        if not info.test_labelled:
            raise kdkit.DataError(
                f"has test images without labels, which task '{self.name}' measures by; `task:"
                " none` does without"
            )
        if info.outputs < 2:
            raise kdkit.DataError(f"says {info.outputs} class: there must be two to tell apart")

    def targets(self, values: Any, info: kdkit.DataInfo, whose: str) -> Tensor:
        """Class indices as int64 (N,), or shares of the classes as fp32 (N, K)."""
        try:
            found = torch.as_tensor(values)
        except (TypeError, ValueError, RuntimeError) as error:
            says = " ".join(str(error).split())
            raise kdkit.DataError(f"{whose} are no numbers: {says}") from None
        supported = (
            f"a label is one whole number from 0 to {info.outputs - 1}, the class of a sample"
        )
        if found.ndim == 2 and found.is_floating_point():
            sums = found.sum(1) if found.shape[1] == info.outputs else found.new_zeros(1)
            if bool(((sums - 1).abs() < SUM).all()):  # NaN is no sum either
                return found.float()
        if found.ndim != 1:
            raise kdkit.DataError(
                f"{whose} have the shape {tuple(found.shape)}; {supported}: several tags or numbers"
                " of a sample are another task (`task:`)"
            )
        if found.is_floating_point() or found.is_complex():
            first = ", ".join(map(str, found.flatten()[:3].tolist()))
            raise kdkit.DataError(
                f"{whose} are {found.dtype} ({first}...); {supported}: regression is another task"
                " (`task:`)"
            )
        # torch's cross-entropy takes class indices in no other type
        found = found.to(torch.int64)
        if len(found) and not 0 <= int(found.min()) <= int(found.max()) < info.outputs:
            raise kdkit.DataError(
                f"{whose} go from {int(found.min())} to {int(found.max())}, but there are"
                f" {info.outputs} classes"
            )
        return found

    def strata(self, targets: Tensor) -> Tensor:
        return targets if targets.ndim == 1 else targets.argmax(1)

    def scored_rows(
        self, answers: Sequence[kdkit.Outputs], batch: kdkit.Batch
    ) -> tuple[list[kdkit.Outputs], kdkit.Batch]:
        return [*answers], replace(batch, labels=batch.classes)

    def random_targets(self, info: kdkit.DataInfo, index: Tensor) -> Tensor:
        return index % info.outputs

    def scores(self, info: kdkit.DataInfo) -> Sequence[kdkit.Score]:
        classes = info.outputs
        per_cent: dict[str, Any] = {"scale": 100.0, "unit": "%"}

        def accuracy(top: int) -> Any:
            from torchmetrics.classification import MulticlassAccuracy

            # its checks look at values, for which the host would wait for the device
            return MulticlassAccuracy(classes, average="micro", top_k=top, validate_args=False)

        def balanced() -> Any:
            from ._metrics import BalancedAccuracy

            return BalancedAccuracy(classes)

        def f1() -> Any:
            from torchmetrics.classification import MulticlassF1Score

            return MulticlassF1Score(classes, average="macro", validate_args=False)

        def cross_entropy() -> Any:
            from ._metrics import CrossEntropy

            return CrossEntropy()

        def calibration_error() -> Any:
            from torchmetrics.classification import MulticlassCalibrationError

            return MulticlassCalibrationError(classes, n_bins=BINS, validate_args=False)

        top1 = kdkit.Score(
            name="top1",
            title="top-1",
            build=lambda: accuracy(1),
            chance=100 / classes,
            meaning="share of samples whose most likely class is right",
            **per_cent,
        )
        top5 = kdkit.Score(
            name="top5",
            title="top-5",
            build=lambda: accuracy(5),
            chance=500 / classes,
            meaning="share of samples whose class is among the five most likely",
            **per_cent,
        )
        return (
            top1,
            # of five classes or fewer, the five most likely are always right
            *([top5] if classes > 5 else []),
            kdkit.Score(
                name="balanced_accuracy",
                title="balanced acc.",
                build=balanced,
                chance=100 / classes,
                meaning="mean over the classes in the data of the share that is found (recall)",
                **per_cent,
            ),
            kdkit.Score(
                name="macro_f1",
                title="macro F1",
                build=f1,
                meaning=(
                    "mean of the classes' F1 scores; a class neither labelled nor predicted is left"
                    " out"
                ),
                **per_cent,
            ),
            kdkit.Score(
                name="nll",
                title="NLL",
                build=cross_entropy,
                unit="nats",
                digits=4,
                higher_is_better=False,
                chance=math.log(classes),
                meaning="cross-entropy on the labels, per sample",
            ),
            kdkit.Score(
                name="ece",
                title="ECE",
                build=calibration_error,
                sees=lambda rows: (rows.answer.softmax(1), rows.target),
                higher_is_better=False,
                meaning=f"expected calibration error, {BINS} bins (Guo et al. 2017)",
                **per_cent,
            ),
        )

    def agreement(self, info: kdkit.DataInfo) -> Sequence[kdkit.Score]:
        def share() -> Any:
            from torchmetrics import MeanMetric

            # a search for NaN would make the host wait in every batch
            return MeanMetric(nan_strategy="disable")

        def mean() -> Any:
            from ._metrics import mean

            return mean()

        def same(rows: kdkit.Rows) -> tuple[Tensor]:
            return ((rows.answer.argmax(1) == rows.teacher.argmax(1)).float(),)

        def divergence(rows: kdkit.Rows) -> tuple[Tensor]:
            from ._metrics import divergence

            return (divergence(rows.answer, rows.teacher),)

        return (
            kdkit.Score(
                name="agreement",
                title="agreement",
                build=share,
                sees=same,
                scale=100.0,
                unit="%",
                meaning="share of samples whose most likely class is the teacher's too",
            ),
            kdkit.Score(
                name="kl_to_teacher",
                title="KL to teacher",
                build=mean,
                sees=divergence,
                unit="nats",
                digits=4,
                higher_is_better=False,
                meaning="KL(softmax(z_t) || softmax(z_s)), per sample",
            ),
            kdkit.Score(
                name="logit_difference",
                title="mean |z_s - z_t|",
                build=mean,
                sees=lambda rows: ((rows.answer - rows.teacher).abs().double().mean(1),),
                digits=4,
                higher_is_better=False,
                meaning="mean of |z_s - z_t| over samples and classes",
            ),
        )

    def metric_arguments(self, info: kdkit.DataInfo) -> Mapping[str, Any]:
        return {"task": "multiclass", "num_classes": info.outputs}
