"""Combines the answers of several models into one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkit.contracts.records import Outputs

Combination = Literal["logits", "probabilities"]


def combined(
    logits: Sequence[Tensor],
    by: Combination = "probabilities",
    weights: Tensor | None = None,
    axis: int = 1,
) -> Tensor:
    """Combine several models' logits, each (R, K) or (B, ..., K, ...), into one answer.

    Args:
        logits: of each of M models.
        by: `logits`: their weighted mean; `probabilities`: the logarithm of the weighted mean of
            their softmaxes.
        weights: shares of the models (M,), or for each row (M, R), that sum to 1 over the models
            (None: equal shares).
        axis: of the K classes.
    """
    stacked = torch.stack(list(logits))
    if by == "logits":
        return (_shares(weights, stacked) * stacked).sum(0)
    return _log_mean(stacked.log_softmax(axis + 1), weights)


def combined_labels(logits: Sequence[Tensor], weights: Tensor | None = None) -> Tensor:
    """Return the logit of the weighted mean of several models' sigmoids, each (R, K).

    Args:
        logits: of each of M models.
        weights: see `combined`.
    """
    stacked = torch.stack(list(logits))
    # both sides by logarithms: from the mean p itself, 1 - p would round to 0 for certain labels
    yes, no = (_log_mean(F.logsigmoid(signed), weights) for signed in (stacked, -stacked))
    return yes - no


def _log_mean(logs: Tensor, weights: Tensor | None) -> Tensor:
    """Return the logarithm of the weighted mean over M models of numbers given as logarithms."""
    # clamp: the logarithm of a share of 0 is -inf, and its gradient is not finite
    shares = _shares(weights, logs).clamp_min(torch.finfo(logs.dtype).tiny)
    return (logs + shares.log()).logsumexp(0)


def _shares(weights: Tensor | None, stacked: Tensor) -> Tensor:
    """Return the models' shares in the form (M, R or 1, 1, ...)."""
    count = len(stacked)
    shares = stacked.new_full((count,), 1 / count) if weights is None else weights
    return shares.to(stacked).reshape(count, -1, *(1 for _ in stacked.shape[2:]))


def ensemble(
    answers: Sequence[Outputs],
    by: Combination = "probabilities",
    weights: Tensor | None = None,
    *,
    of_labels: bool = False,
    axis: int = 1,
) -> Outputs:
    """Combine several models' answers, and their views, into one without features."""
    views = {
        name: ensemble(
            [answer.views[name] for answer in answers],
            by,
            weights,
            of_labels=of_labels,
            axis=axis,
        )
        for name in answers[0].views
    }
    logits = [answer.logits for answer in answers]
    by_sigmoids = of_labels and by == "probabilities"
    return Outputs(
        combined_labels(logits, weights) if by_sigmoids else combined(logits, by, weights, axis),
        views=views,
        mask=answers[0].mask,
    )


def with_logits(answer: Outputs, logits: Tensor) -> Outputs:
    """Replace an answer's logits by those of a group; its features stay its own."""
    # a loss may name the logits as a layer
    features = {
        name: logits if value is answer.logits else value for name, value in answer.features.items()
    }
    return Outputs(logits, features, answer.views, answer.mask)
