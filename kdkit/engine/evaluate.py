"""Measures a classifier, and how far it agrees with its teacher."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor

from kdkit.contracts.ensembles import combined
from kdkit.contracts.records import Batch
from kdkit.contracts.schedule import Model
from kdkit.engine.turns import Turns, finish
from kdkit.errors import RunError
from kdkit.finite import LOOK


@dataclass(frozen=True)
class Predictions:
    """A model's logits (N, K) for a dataset of N samples, in its order, with the class indices
    (N,), on the CPU.
    """

    logits: Tensor
    labels: Tensor


def predict(model: Model, batches: Iterable[Batch], *, world: int = 1) -> Predictions:
    """Answer every batch in eval mode; with several processes, every process gets the answers of
    all.
    """
    return finish(predicting([model], batches, world=world))[0]


def predicting(
    models: Sequence[Model],
    batches: Iterable[Batch],
    *,
    world: int = 1,
    place: tuple[int, int] = (0, -1),
) -> Turns[list[Predictions]]:
    """Every model's answers, as `predict` gives them, in one pass over the batches.

    Yields (*`place`, batch) before each batch; not in several processes, whose shares can differ by
    one batch.
    """
    # a teacher may have only some of them so
    training = [part for model in models for part in model.module.modules() if part.training]
    for model in models:
        model.module.eval()
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in models]
    try:
        coming = iter(batches)
        for number in itertools.count():
            if world == 1:
                yield (*place, number)
            if (batch := next(coming, None)) is None:
                break
            with torch.no_grad():
                for parts, model in zip(found, models, strict=True):
                    parts.append(
                        (
                            batch.index.cpu(),
                            model(batch.inputs).logits.float().cpu(),
                            batch.labels.cpu(),
                        )
                    )
    finally:
        for part in training:
            part.training = True
    return [_in_order(gather_object(parts) if world > 1 else parts) for parts in found]


def _in_order(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Predictions:
    index, logits, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    order = index.argsort()
    return Predictions(logits[order], labels[order])


def predict_together(
    models: Sequence[Model], batches: Iterable[Batch], *, world: int = 1
) -> Predictions | None:
    """The answer of an ensemble, the mean of its models' probabilities; of one model, its own;
    of none, none.

    Raises:
        RunError: an answer is not finite; names the model.
    """
    found = finish(predicting(models, batches, world=world)) if models else []
    for model, one in zip(models, found, strict=True):
        faulty = (~one.logits.isfinite()).any(1)
        if count := int(faulty.sum()):
            role = getattr(model, "role", type(model.module).__name__)
            raise RunError(
                f"{role}: its logits are NaN or infinite for {count:,} of the {len(faulty):,}"
                f" samples that are measured, the first of them number {int(faulty.nonzero()[0])};"
                f" {LOOK}"
            )
    if len(found) < 2:
        return found[0] if found else None
    return Predictions(combined([one.logits for one in found]), found[0].labels)


def metrics(own: Predictions, teacher: Predictions | None = None) -> dict[str, float]:
    """What the field reports of a classifier.

    Returns:
        top1, top5: accuracies in percent (top5 only for more than five classes).
        balanced_accuracy: mean over the classes in the labels of the share that is found (recall),
            in percent.
        macro_f1: mean of the classes' F1 scores, in percent; a class that is neither labelled nor
            predicted is left out.
        nll: cross-entropy on the labels, nats per sample.
        ece: expected calibration error in percent, 15 bins (Guo et al. 2017).
        agreement: share of samples whose most likely class is the teacher's too, in percent.
        kl_to_teacher: KL(softmax(z_t) || softmax(z_s)), nats per sample.
        logit_difference: mean of |z_s - z_t| over samples and classes.
    """
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_calibration_error,
        multiclass_f1_score,
        multiclass_recall,
    )

    logits, labels = own.logits, own.labels
    classes = logits.shape[1]
    accuracy = {
        f"top{k}": multiclass_accuracy(logits, labels, classes, average="micro", top_k=k)
        for k in (1, 5)
        if k == 1 or classes > 5
    }
    found = {
        **{name: 100 * value for name, value in accuracy.items()},
        "balanced_accuracy": (
            100
            * multiclass_recall(logits, labels, classes, average="none")[
                torch.unique(labels)
            ].mean()
        ),
        "macro_f1": 100 * multiclass_f1_score(logits, labels, classes, average="macro"),
        "nll": F.cross_entropy(logits, labels),
        "ece": 100 * multiclass_calibration_error(logits.softmax(1), labels, classes, n_bins=15),
    }
    if teacher is not None:
        found["agreement"] = 100 * (logits.argmax(1) == teacher.logits.argmax(1)).float().mean()
        found["kl_to_teacher"] = F.kl_div(
            logits.log_softmax(1),
            teacher.logits.log_softmax(1),
            reduction="batchmean",
            log_target=True,
        )
        found["logit_difference"] = (logits - teacher.logits).abs().mean()
    return {name: float(value) for name, value in found.items()}
