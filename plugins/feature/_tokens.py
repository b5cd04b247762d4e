"""Tokens of one sample with their padding, for losses that relate or choose them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import kdkit


def token_pairs(
    layers: Sequence[kdkit.LayerPair], student: kdkit.Outputs, teacher: kdkit.Outputs
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the tokens (B, N, D) of each pair, and which of them are real, (B, N); a map's
    positions are tokens.

    Raises:
        ShapeError: they are not equally many tokens.
    """
    # without a mask, the options leave padding where it is
    answers = student.masked(None), teacher.masked(None)
    for f_s, f_t in kdkit.TokenOptions(layers=tuple(layers)).pairs(*answers):
        yield f_s, f_t, real_tokens(f_s, student.mask)


def real_tokens(f: Tensor, mask: Tensor | None) -> Tensor:
    """Return which tokens (B, N, ...) are no padding, (B, N)."""
    if mask is not None and mask.shape == f.shape[:2]:
        return mask.bool()
    return torch.ones(f.shape[:2], dtype=torch.bool, device=f.device)


def log_shares(z: Tensor, real: Tensor) -> Tensor:
    """Return the log-softmax of scores (..., N) over the columns that are real, a mask that z's
    shape can be expanded from.
    """
    # not minus infinity: the difference of two is NaN
    return z.masked_fill(~real, torch.finfo(z.dtype).min / 2).log_softmax(-1)
