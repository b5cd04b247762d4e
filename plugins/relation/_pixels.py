"""What losses on pixels share: unit vectors, masks of a map's size, similarities in chunks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import kdkit

MOST_SIMILARITIES = 2**24
"""Similarities in one chunk: 64 MB in fp32, of which some six copies exist at a time."""
SHORTEST = 1e-3
"""Vectors with a smaller norm are divided by this: it bounds the gradient at dead pixels."""


def pixels_of(f: Tensor) -> Tensor:
    """Flatten maps (B, C, H, W) to a vector for each pixel, (B, H * W, C)."""
    return f.flatten(2).transpose(1, 2)


def unit(v: Tensor) -> Tensor:
    """Divide vectors (..., C) by their L2 norms."""
    return F.normalize(v, dim=-1, eps=SHORTEST)


def masks_at(labels: Tensor, f: Tensor) -> Tensor:
    """Resize masks (B, H, W) to the size of maps (B, C, h, w), to the nearest pixel: (B, h * w).

    Raises:
        ShapeError: the labels are no masks.
    """
    if labels.ndim != 3:
        raise kdkit.ShapeError(
            f"labels {tuple(labels.shape)} are no masks (B, H, W), a class index for each pixel"
        )
    resized = F.interpolate(labels[:, None].float(), f.shape[2:], mode="nearest-exact")
    return resized.flatten(1).long()


def membership(masks: Tensor, classes: int, like: Tensor) -> Tensor:
    """Return 1 where a pixel (B, P) has a class, else 0, (B, P, K); ignored ones have none."""
    return (masks[..., None] == torch.arange(classes, device=masks.device)).to(like.dtype)


def count_classes(student: kdkit.Outputs, context: kdkit.Context | None) -> int:
    """Return K; without a context, that of the answer (B, K, h, w)."""
    return student.logits.shape[1] if context is None else context.outputs


def refuse_one_position(
    options: kdkit.MapOptions, student: kdkit.Outputs, teacher: kdkit.Outputs, pool: int = 1
) -> None:
    """Refuse maps that cannot be compared pixel by pixel, after pooling windows of `pool` x `pool`.

    Raises:
        ShapeError: they are no maps, or a single position is left of the teacher's.
    """
    pairs = options.pairs(student, teacher)
    for pair, (f_s, f_t) in zip(options.taps(), pairs, strict=True):
        if pool >= max(f_t.shape[2:]):
            left = f"has one position with `pool: {pool}`" if pool > 1 else "has one position"
            raise kdkit.ShapeError(
                f"teacher '{pair.teacher}' {tuple(f_t.shape)} {left}, so that it tells student"
                f" '{pair.student}' {tuple(f_s.shape)} nothing of how pixels relate; name a layer"
                f" before the pooling{', or take a smaller `pool`' if pool > 1 else ''}"
            )


class Divergence(torch.autograd.Function):
    """Weighted sum of KL divergences between softmaxes of similarities, in nats.

    Rows r (R, C) are compared with columns c (M, C), which form `blocks` of equal size. The sum
    over rows and blocks is of share * KL(softmax(r_t . c_t / T) || softmax(r_s . c_s / T)), each
    softmax over the columns of a block.

    The R x M similarities are never held as a whole: the gradient of a chunk of rows is computed
    right after its value.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        teacher_rows: Tensor,
        teacher_columns: Tensor,
        shares: Tensor,
        silent: Tensor | None,
        blocks: int,
        temperature: float,
    ) -> Tensor:
        """Compute the value, and the gradients for rows and columns where they are needed.

        Args:
            ctx: of autograd.
            rows: (R, C), the student's.
            columns: (M, C), the student's, or constants.
            teacher_rows: (R, C).
            teacher_columns: (M, C).
            shares: weights of the rows, (R,).
            silent: columns that do not count, (M,) bool.
            blocks: number of softmaxes in a row.
            temperature: T.
        """

        needs_rows, needs_columns = ctx.needs_input_grad[:2]
        value = rows.new_zeros(())
        of_rows: list[Tensor] = []
        of_columns = torch.zeros_like(columns) if needs_columns else None
        step = max(1, MOST_SIMILARITIES // len(columns))
        chunks = (torch.split(x, step) for x in (rows, teacher_rows, shares))
        for r_s, r_t, share in zip(*chunks, strict=True):
            log_p = _log_softmax((r_s @ columns.T).div_(temperature), silent, blocks)
            log_q = _log_softmax((r_t @ teacher_columns.T).div_(temperature), silent, blocks)
            q = log_q.exp()
            value = value + share @ (q * (log_q - log_p)).sum((1, 2))
            # the gradient of the similarities
            slope = log_p.exp_().sub_(q).flatten(1).mul_(share[:, None] / temperature)
            if needs_rows:
                of_rows.append(slope @ columns)
            if of_columns is not None:
                of_columns += slope.T @ r_s
        # the finished gradients: a queue may change before backward
        ctx.save_for_backward(torch.cat(of_rows) if needs_rows else None, of_columns)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply the gradients that `forward` has computed."""
        learnt = (None if slope is None else grad * slope for slope in ctx.saved_tensors)
        return (*learnt, None, None, None, None, None, None)


def _log_softmax(z: Tensor, silent: Tensor | None, blocks: int) -> Tensor:
    """Turn logits (R, M), which it may change, into logarithms of shares within each block,
    (R, blocks, M / blocks).
    """
    if silent is not None:
        # not minus infinity: the difference of two is NaN
        z.masked_fill_(silent, torch.finfo(z.dtype).min / 2)
    return z.view(len(z), blocks, -1).log_softmax(2)
