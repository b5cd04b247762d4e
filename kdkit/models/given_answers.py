"""Converts a teacher's answers that are not one logit for each class of the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kdkit.contracts.layers import outputs_of

Answers = Literal["logits", "softmax", "sigmoid"]
ROUNDING = 1e-3  # tolerance of the sum of a row of probabilities


class Reading:
    """A forward hook of a network: converts its output to logits of the data's classes.

    Probabilities p become logits again, up to a constant that no softmax sees: log p after a
    softmax, log(p / (1 - p)) after a sigmoid.

    Args:
        answers: the form of the network's output.
        classes: which of its answers are those of the data's classes, in the data's order (None:
            all).
        select: selects classes of an answer, as the task's `of_classes`.
    """

    def __init__(
        self,
        answers: Answers,
        classes: Sequence[int] | None,
        select: Callable[[Tensor, Sequence[int]], Tensor],
    ) -> None:
        self.answers, self.classes = answers, None if classes is None else list(classes)
        self.select = select

    def __call__(self, module: nn.Module, args: object, output: object) -> object:
        if not (outputs := outputs_of(output)):
            return output  # reported when it is read
        logits = outputs[0]
        if self.answers != "logits":
            p = logits.float()
            # clamp: the logarithm of 0 is infinite; 1 - p has no values between 0 and about eps
            logits = p.clamp_min(torch.finfo(p.dtype).tiny).log()
            if self.answers == "sigmoid":
                logits = logits - (1 - p).clamp_min(torch.finfo(p.dtype).eps).log()
        return logits if self.classes is None else self.select(logits, self.classes)


def looks_like(logits: Tensor) -> Answers:
    """Guess the form of answers (N, K): a softmax's lie in [0, 1] and sum to 1."""
    if not bool(((logits >= 0) & (logits <= 1)).all()):
        return "logits"
    return "softmax" if bool(((logits.sum(1) - 1).abs() < ROUNDING).all()) else "sigmoid"
