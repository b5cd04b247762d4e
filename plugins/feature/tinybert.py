"""TinyBERT: hidden states through one linear layer, and attention scores, are the teacher's.

Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", Findings of EMNLP 2020,
arXiv:1909.10351, section 3.1, eq. 7 to 9. It is the only loss of a first stage there; a second one
has the predictions (`soft_labels`). A student of M layers and a teacher of k M: layer m learns from
layer k m, the embeddings from the embeddings.

Attention scores, before the softmax, are no module's output; they are computed from the queries and
keys, which are:

    - use: tinybert
      heads: 12
      attention: 1
      layers:
        - {student: bert.embeddings, teacher: bert.embeddings}
        - {student: bert.encoder.layer.0, teacher: bert.encoder.layer.2}
        - {student: bert.encoder.layer.0.attention.self.query,
           teacher: bert.encoder.layer.2.attention.self.query}
        - {student: bert.encoder.layer.0.attention.self.key,
           teacher: bert.encoder.layer.2.attention.self.key}

The released code counts padding, with scores of 0, in the mean; here it does not count.
"""

import math
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

import kdkit

from ._tokens import token_pairs

Tokens = tuple[Tensor, Tensor, Tensor]


class TransformerDistillation(kdkit.Loss):
    """Squared errors of hidden states behind a shared linear map, and of attention scores.

    Formula: sum over the hidden states of mean (W h_s - h_t)^2 + sum over the attention layers of
    mean (Q_s K_s' / sqrt(d_s) - Q_t K_t' / sqrt(d_t))^2

    Means are over the batch's real tokens and the width, or over its real pairs of tokens and the
    heads. Hidden states, queries and keys are tokens (B, N, D), or maps (B, C, H, W) of equally
    many positions; d is the width of a head. W is one linear layer for all hidden states, so that
    they must have one width.
    """

    name = "tinybert"
    knowledge = "feature"

    class Options(kdkit.FeatureOptions):
        attention: int = Field(
            default=0,
            ge=0,
            description=(
                "Attention layers to compare; the last pairs of `layers`, twice as many, are their"
                " queries and keys in turns."
            ),
        )
        heads: int = Field(
            default=12, ge=1, description="Attention heads of both models, if scores are compared."
        )

        def check(self, student: kdkit.Outputs, teacher: kdkit.Outputs) -> None:
            self.parts(student, teacher)

        def parts(self, student: kdkit.Outputs, teacher: kdkit.Outputs) -> "Parts":
            """Return the tokens of hidden states, and of queries and keys.

            Raises:
                ShapeError: they do not fit each other.
            """
            tokens = list(token_pairs(self.layers, student, teacher))
            count = len(tokens) - 2 * self.attention
            if count < 0:
                raise kdkit.ShapeError(
                    f"attention: {self.attention} needs {2 * self.attention} pairs of layers,"
                    f" queries and keys in turns; there are {len(tokens)}"
                )
            hidden, scored = tokens[:count], tokens[count:]
            if len({(f_s.shape[2], f_t.shape[2]) for f_s, f_t, _ in hidden}) > 1:
                widths = ", ".join(f"{f_s.shape[2]} to {f_t.shape[2]}" for f_s, f_t, _ in hidden)
                raise kdkit.ShapeError(
                    f"one linear layer serves all hidden states, but their widths are {widths};"
                    " use the loss once for each width"
                )
            self._check_heads(scored)
            return Parts(hidden, list(zip(scored[::2], scored[1::2], strict=True)))

        def _check_heads(self, scored: list[Tokens]) -> None:
            for f_s, f_t, _ in scored:
                if f_s.shape[2] % self.heads or f_t.shape[2] % self.heads:
                    raise kdkit.ShapeError(
                        f"queries or keys {tuple(f_s.shape)} and {tuple(f_t.shape)} must have"
                        f" widths that {self.heads} divides; see `heads`"
                    )
            for (query, *_), (key, *_) in zip(scored[::2], scored[1::2], strict=True):
                if query.shape != key.shape:
                    raise kdkit.ShapeError(
                        f"queries {tuple(query.shape)} and keys {tuple(key.shape)} must have one"
                        " shape; name them in turns"
                    )

    options: Options
    map: nn.Module

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        hidden = self.options.parts(student, teacher).hidden
        self.map = nn.Identity()
        if hidden:
            f_s, f_t, _ = hidden[0]
            self.map = nn.Linear(f_s.shape[2], f_t.shape[2])

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        hidden, attention = self.options.parts(student, teacher)
        values = []
        for f_s, f_t, real in hidden:
            values.append(mean_over((self.map(f_s) - f_t).square(), real[:, :, None]))
        for (q_s, q_t, real), (k_s, k_t, _) in attention:
            gaps = scores(q_s, k_s, self.options.heads) - scores(q_t, k_t, self.options.heads)
            both = real[:, None, :, None] & real[:, None, None, :]
            values.append(mean_over(gaps.square(), both))
        return torch.stack(values).sum()


class Parts(NamedTuple):
    """Tokens of both models and which are real: of hidden states, and of queries and keys."""

    hidden: list[Tokens]
    attention: list[tuple[Tokens, Tokens]]


def scores(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Return attention scores (B, A, N, N) of queries and keys (B, N, D), before the softmax."""
    query, key = (f.reshape(*f.shape[:2], heads, -1).transpose(1, 2) for f in (query, key))
    return query @ key.mT / math.sqrt(query.shape[3])


def mean_over(x: Tensor, real: Tensor) -> Tensor:
    """Return the mean of x over where `real` is, whose shape x's can be expanded from."""
    real = real.expand_as(x)
    return (x * real).sum() / real.sum().clamp_min(1)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [TransformerDistillation]
