"""Relations within an image: a token's similarities to the others are those that the teacher sees.

LightlyTrain, method "distillation" (version 3), the local part,
https://github.com/lightly-ai/lightly-train; its global part is `queue_kl`. Both have weight 1
there, and there are no labels:

    - {use: queue_kl}
    - {use: token_kl, layers: [{student: stage4, teacher: blocks.11}]}

The N x N similarities of an image are held for some images at a time; the gradient is computed
right after the value.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import kdkit

from ..feature._tokens import log_shares, real_tokens

MOST_SIMILARITIES = 2**24  # in one chunk: 64 MB in fp32, of which some six copies exist at a time


class TokenDivergence(kdkit.Loss):
    """KL divergence between softmaxes of a token's similarities to the tokens of its image.

    Formula: KL(softmax(t_i . t_j / T) || softmax(s_i . s_j / T)) over the tokens j of an image,
    mean over all tokens i of the batch, in nats, then over the layer pairs

    t are the teacher's tokens (B, N, D) and s the student's behind a learnt linear layer to the
    teacher's width, both divided by their L2 norms; a token's similarity to itself, 1, counts.
    Equally many tokens are compared as they are; otherwise maps (B, C, H, W), or tokens of a square
    grid, where the student's is resized to the teacher's (bilinear). Padding of texts does not
    count.
    """

    name = "token_kl"
    knowledge = "relation"

    class Options(kdkit.FeatureOptions):
        temperature: kdkit.Rampable = Field(
            default=0.07, gt=0, description="T: divides the cosine similarities."
        )

        def tokens(
            self, student: kdkit.Outputs, teacher: kdkit.Outputs
        ) -> Iterator[tuple[Tensor, Tensor]]:
            """Return the tokens (B, N, D) of each pair, equally many, padding included.

            Raises:
                ShapeError: a layer has no two tokens.
            """
            # without a mask, padding stays where it is
            pairs = self.pairs(student.masked(None), teacher.masked(None))
            for pair, (f_s, f_t) in zip(self.layers, pairs, strict=True):
                if f_t.ndim == 2 or f_t[0].numel() == f_t.shape[1 if f_t.ndim == 4 else 2]:
                    raise kdkit.ShapeError(
                        f"student '{pair.student}' {tuple(f_s.shape)} and teacher '{pair.teacher}'"
                        f" {tuple(f_t.shape)}: the teacher's has no two tokens that could be alike;"
                        " name layers before the pooling"
                    )
                if f_t.ndim == 4:
                    f_s = kdkit.resized(f_s, f_t.shape[2:])
                yield kdkit.as_tokens(f_s), kdkit.as_tokens(f_t)

    options: Options
    heads: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.heads = nn.ModuleList(
            nn.Linear(f_s.shape[2], f_t.shape[2])
            for f_s, f_t in self.options.tokens(student, teacher)
        )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        values = []
        pairs = self.options.tokens(student, teacher)
        for head, (f_s, f_t) in zip(self.heads, pairs, strict=True):
            s, t = unit(head(f_s)), unit(f_t)
            real = real_tokens(s, student.mask)
            values.append(Divergence.apply(s, t, real, self.options.temperature))
        return torch.stack(values).mean()


def unit(v: Tensor) -> Tensor:
    """Divide vectors (..., C) by their L2 norms."""
    # 1e-3 bounds the gradient at dead tokens
    return F.normalize(v, dim=-1, eps=1e-3)


class Divergence(torch.autograd.Function):
    """Mean over the real tokens (B, N) of KL(softmax(t_i . t_j / T) || softmax(s_i . s_j / T)), for
    s and t (B, N, D); t has no gradient.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor, real: Tensor, temperature: Any) -> Tensor:
        value, slopes = s.new_zeros(()), []
        shares = real / real.sum().clamp_min(1)
        step = max(1, MOST_SIMILARITIES // s.shape[1] ** 2)
        chunks = (torch.split(x, step) for x in (s, t, real, shares))
        for one, other, there, share in zip(*chunks, strict=True):
            log_p, log_q = (
                log_shares(x @ x.mT / temperature, there[:, None]) for x in (one, other)
            )
            q = log_q.exp()
            value = value + (share * (q * (log_q - log_p)).sum(2)).sum()
            if ctx.needs_input_grad[0]:
                # of the similarities; a token is in its own row and in every column
                slope = (log_p.exp() - q) * (share[:, :, None] / temperature)
                slopes.append((slope + slope.mT) @ one)
        ctx.save_for_backward(torch.cat(slopes) if slopes else None)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None, None


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [TokenDivergence]
