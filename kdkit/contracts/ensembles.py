"""Several answers as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kdkit.contracts.records import Outputs

Combination = Literal["logits", "probabilities"]


def combined(
    logits: Sequence[Tensor], by: Combination = "probabilities", weights: Tensor | None = None
) -> Tensor:
    """One answer out of several models' logits, each (B, K).

    Args:
        logits: what each of M models says.
        by: `logits`: their weighted mean; `probabilities`: the logarithm of the weighted mean of
            their softmaxes.
        weights: shares of the models (M,), or for each sample (M, B), that sum to 1 over the models
            (None: equal shares).
    """
    stacked = torch.stack(list(logits))
    shares = torch.full((len(logits),), 1 / len(logits)) if weights is None else weights
    shares = shares.to(stacked).reshape(len(logits), -1, 1)
    if by == "logits":
        return (shares * stacked).sum(0)
    return (
        stacked.log_softmax(2) + shares.clamp_min(torch.finfo(stacked.dtype).tiny).log()
    ).logsumexp(0)


def ensemble(
    answers: Sequence[Outputs], by: Combination = "probabilities", weights: Tensor | None = None
) -> Outputs:
    """The combined logits of several models' answers, without features; views are combined
    likewise.
    """
    views = {
        name: ensemble([answer.views[name] for answer in answers], by, weights)
        for name in answers[0].views
    }
    return Outputs(
        combined([answer.logits for answer in answers], by, weights),
        views=views,
        mask=answers[0].mask,
    )


def with_logits(answer: Outputs, logits: Tensor) -> Outputs:
    """An answer with other logits, those of a whole group: what losses read of layers stays the
    answer's own.
    """
    features = {
        name: logits if value is answer.logits else value for name, value in answer.features.items()
    }
    return Outputs(logits, features, answer.views, answer.mask)
