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
    logits: Sequence[Tensor], by: Combination = "probabilities", weights: Tensor | None = None
) -> Tensor:
    """Combine several models' logits, each (R, K), into one answer.

    Args:
        logits: of each of M models.
        by: `logits`: their weighted mean; `probabilities`: the logarithm of the weighted mean of
            their softmaxes.
        weights: shares of the models (M,), or for each row (M, R), that sum to 1 over the models
            (None: equal shares).
    """
    stacked = torch.stack(list(logits))
    shares = torch.full((len(logits),), 1 / len(logits)) if weights is None else weights
    shares = shares.to(stacked).reshape(len(logits), -1, 1)
    if by == "logits":
        # clamp: the logarithm of a share of 0 is -inf, and its gradient is not finite
        return (shares * stacked).sum(0)
    return (
        stacked.log_softmax(2) + shares.clamp_min(torch.finfo(stacked.dtype).tiny).log()
    ).logsumexp(0)


def combined_labels(logits: Sequence[Tensor], weights: Tensor | None = None) -> Tensor:
    """Return the logit of the weighted mean of several models' sigmoids, each (R, K).

    Args:
        logits: of each of M models.
        weights: see `combined`.
    """
    yes = _log_mean([F.logsigmoid(one) for one in logits], weights)
    return yes - _log_mean([F.logsigmoid(-one) for one in logits], weights)


def _log_mean(logs: Sequence[Tensor], weights: Tensor | None) -> Tensor:
    """Return the logarithm of the weighted mean of numbers that are given as logarithms."""
    stacked = torch.stack(list(logs))
    shares = torch.full((len(logs),), 1 / len(logs)) if weights is None else weights
    shares = shares.to(stacked).reshape(len(logs), -1, 1)
    return (stacked + shares.clamp_min(torch.finfo(stacked.dtype).tiny).log()).logsumexp(0)


def ensemble(
    answers: Sequence[Outputs],
    by: Combination = "probabilities",
    weights: Tensor | None = None,
    *,
    of_labels: bool = False,
) -> Outputs:
    """Return the combined logits of several models' answers, without features; their views are
    combined in the same way.
    """
    views = {
        name: ensemble([answer.views[name] for answer in answers], by, weights, of_labels=of_labels)
        for name in answers[0].views
    }
    logits = [answer.logits for answer in answers]
    by_sigmoids = of_labels and by == "probabilities"
    return Outputs(
        combined_labels(logits, weights) if by_sigmoids else combined(logits, by, weights),
        views=views,
        mask=answers[0].mask,
    )


def with_logits(answer: Outputs, logits: Tensor) -> Outputs:
    """Replace the logits of an answer by those of a whole group; the features, which losses read,
    stay its own.
    """
    features = {
        name: logits if value is answer.logits else value for name, value in answer.features.items()
    }
    return Outputs(logits, features, answer.views, answer.mask)
