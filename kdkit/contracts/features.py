"""Converts features between forms: maps (B, C, H, W), tokens (B, N, D), vectors (B, D).

A vision transformer's tokens become a map by leaving out what precedes the patches (class,
distillation and register tokens) and folding the rest to the square grid it came from; a map's
positions become tokens, row by row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkit.errors import ShapeError

MOST_PREFIX_TOKENS = 5  # a class token and four registers


def constants(values: Sequence[float], like: Tensor) -> Tensor:
    """Return numbers as a tensor (N,) of the type and device of `like`, without waiting for the
    device, as a copy from the host would.
    """
    return torch.stack([like.new_full((), value) for value in values])


def prefix_tokens(count: int) -> int | None:
    """Count the tokens that precede the patches: the fewest that leave a square (None: none do)."""
    for prefix in range(min(MOST_PREFIX_TOKENS + 1, count)):
        if math.isqrt(count - prefix) ** 2 == count - prefix:
            return prefix
    return None


def is_padded(f: Tensor, mask: Tensor | None) -> bool:
    """Check whether features are hidden states (B, N, D) of texts that the mask (B, N) is for."""
    return mask is not None and f.ndim == 3 and f.shape[:2] == mask.shape


def as_map(f: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return maps or tokens as maps (B, C, H, W).

    Args:
        f: a map or tokens of each sample.
        mask: `Outputs.mask`; set for texts, which have no grid.

    Raises:
        ShapeError: there is no grid of positions.
    """
    if f.ndim == 4:
        return f
    prefix = prefix_tokens(f.shape[1]) if f.ndim == 3 and not is_padded(f, mask) else None
    if prefix is None:
        raise ShapeError("no map (B, C, H, W), nor tokens (B, N, D) of a square grid")
    # row by row, as a vision transformer numbers its patches
    side = math.isqrt(f.shape[1] - prefix)
    return f[:, prefix:].transpose(1, 2).reshape(len(f), f.shape[2], side, side)


def as_tokens(f: Tensor) -> Tensor:
    """Return maps or tokens as tokens (B, N, D).

    Raises:
        ShapeError: they are neither maps nor tokens.
    """
    if f.ndim == 3:
        return f
    if f.ndim != 4:
        raise ShapeError("neither tokens (B, N, D) nor a map (B, C, H, W)")
    return f.flatten(2).transpose(1, 2)


def as_vectors(f: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return one vector per sample (B, D): the mean over positions or tokens, or the vector.

    Args:
        f: a map, tokens or a vector of each sample.
        mask: `Outputs.mask`: of texts, which tokens (B, N) are real and count.

    Raises:
        ShapeError: it is neither a map, nor tokens, nor a vector.
    """
    if f.ndim == 2:
        return f
    if mask is not None and is_padded(f, mask):
        real = mask[:, :, None].to(f.dtype)
        # a text of padding only would divide by 0
        return (f * real).sum(1) / real.sum(1).clamp_min(1)
    if f.ndim not in (3, 4):
        raise ShapeError("neither a vector (B, D), tokens (B, N, D) nor a map (B, C, H, W)")
    return f.mean(1) if f.ndim == 3 else f.mean((2, 3))


def resized(f: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps (B, C, H, W) by bilinear interpolation."""
    if tuple(f.shape[2:]) == tuple(size):
        return f
    return F.interpolate(f, size=tuple(size), mode="bilinear", align_corners=False)


def pooled_alike(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
    """Bring two maps to the smaller height and width: the larger one is average-pooled."""
    size = min(f_s.shape[2], f_t.shape[2]), min(f_s.shape[3], f_t.shape[3])
    pooled_s, pooled_t = (
        f if tuple(f.shape[2:]) == size else F.adaptive_avg_pool2d(f, size) for f in (f_s, f_t)
    )
    return pooled_s, pooled_t
