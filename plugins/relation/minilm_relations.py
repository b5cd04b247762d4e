"""Self-attention relations (MiniLM): how a text's tokens relate by their queries, keys and values.

Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained
Transformers", NeurIPS 2020, arXiv:2002.10957, and Wang et al., "MiniLMv2: Multi-Head Self-Attention
Relation Distillation for Compressing Pretrained Transformers", arXiv:2012.15828. It is the only
loss there, of one layer: the last one (MiniLM), or one above the middle of a large teacher (v2).
Version 2 relates queries, keys and values each with themselves; version 1, queries with keys (which
is attention) and values with themselves:

    - use: minilm_relations
      layers:
        - {student: bert.encoder.layer.5.attention.self.query,
           teacher: bert.encoder.layer.9.attention.self.query}
        - ... the same for key and value
      relations: [[0, 1], [2, 2]]   # version 1; left out for version 2

Vision transformers of timm have one layer for all three, `blocks.11.attn.qkv` (`fused: true`).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

import kdkit

from ..feature._tokens import log_shares, token_pairs


class AttentionRelations(kdkit.Loss):
    """KL divergence between the two models' relations of tokens, within each of a number of heads.

    Formula: KL(softmax(A_t B_t' / sqrt(d_t)) || softmax(A_s B_s' / sqrt(d_s))), mean over the
    heads, over the real tokens of a sample and over the samples, summed over the relations (A, B),
    in nats

    A and B are what the tapped layers give, (B, N, D): queries, keys or values of all heads,
    divided into `heads` parts of width d, whatever number of heads the network itself has; the
    widths of the two models need not agree. Maps (B, C, H, W) of equally many positions are tokens
    too. Padding is neither related nor related to.
    """

    name = "minilm_relations"
    knowledge = "relation"

    class Options(kdkit.FeatureOptions):
        heads: int = Field(
            default=12,
            ge=1,
            description="Relation heads; they divide the width of every layer (12 of base models).",
        )
        relations: tuple[tuple[int, int], ...] | None = Field(
            default=None,
            min_length=1,
            description=(
                "Which layers are related, by their numbers in `layers` from 0 (default: each with"
                " itself)."
            ),
        )
        fused: bool = Field(
            default=False,
            description=(
                "Each layer gives queries, keys and values side by side; they are numbered from 0"
                " in that order, layer by layer."
            ),
        )

        def check(self, student: kdkit.Outputs, teacher: kdkit.Outputs) -> None:
            matrices = self.matrices(student, teacher)
            for a, b in self.related(len(matrices)):
                if not 0 <= min(a, b) <= max(a, b) < len(matrices):
                    raise kdkit.ShapeError(
                        f"relations: there is no layer {max(a, b)} in {[a, b]}; numbers go from 0"
                        f" to {len(matrices) - 1}"
                    )
                if matrices[a].real.shape != matrices[b].real.shape:
                    raise kdkit.ShapeError(
                        f"relations: the layers {a} and {b} have unequally many tokens"
                    )

        def related(self, count: int) -> Iterator[tuple[int, int]]:
            """Return the numbers of the matrices that are related, of so many."""
            yield from self.relations or ((number, number) for number in range(count))

        def matrices(self, student: kdkit.Outputs, teacher: kdkit.Outputs) -> list["Matrix"]:
            """Return what the layers give, by head.

            Raises:
                ShapeError: layers have no such parts.
            """
            found = []
            parts = 3 if self.fused else 1
            tokens = token_pairs(self.layers, student, teacher)
            for pair, (f_s, f_t, real) in zip(self.layers, tokens, strict=True):
                if f_s.shape[2] % (parts * self.heads) or f_t.shape[2] % (parts * self.heads):
                    divisor = f"3 x {self.heads}" if self.fused else f"{self.heads}"
                    raise kdkit.ShapeError(
                        f"student '{pair.student}' {tuple(f_s.shape)} and teacher '{pair.teacher}'"
                        f" {tuple(f_t.shape)} must have widths that {divisor} divides; see `heads`"
                    )
                for s, t in zip(f_s.chunk(parts, 2), f_t.chunk(parts, 2), strict=True):
                    found.append(Matrix(by_head(s, self.heads), by_head(t, self.heads), real))
            return found

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        matrices = self.options.matrices(student, teacher)
        related = self.options.related(len(matrices))
        return torch.stack([divergence(matrices[a], matrices[b]) for a, b in related]).sum()


class Matrix(NamedTuple):
    """Queries, keys or values of both models by head, (B, A, N, d), and which tokens are real,
    (B, N).
    """

    student: Tensor
    teacher: Tensor
    real: Tensor


def divergence(a: Matrix, b: Matrix) -> Tensor:
    """Return the divergence of the two models' relations of A with B."""
    log_p = relations(a.student, b.student, b.real)
    log_q = relations(a.teacher, b.teacher, b.real)
    of_tokens = (log_q.exp() * (log_q - log_p)).sum(3).mean(1)
    # a text of padding only would divide by 0
    return (of_tokens * a.real / a.real.sum(1, keepdim=True).clamp_min(1)).sum(1).mean()


def relations(a: Tensor, b: Tensor, real: Tensor) -> Tensor:
    """Return the logarithms of a token's relations to the real ones, (B, A, N, N)."""
    return log_shares(a @ b.mT / math.sqrt(a.shape[3]), real[:, None, None])


def by_head(f: Tensor, heads: int) -> Tensor:
    """Divide tokens (B, N, D) by heads, (B, A, N, d)."""
    return f.reshape(*f.shape[:2], heads, -1).transpose(1, 2)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [AttentionRelations]
