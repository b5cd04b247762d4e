"""Which tokens of a text count, for the task and for schedules that write texts."""

from collections.abc import Mapping

import torch
from torch import Tensor

import kdkit

TOKENS, MASK = "input_ids", "attention_mask"
COMPLETION = "completion_mask"
"""Of a batch's inputs, which tokens are to be learnt (1), and which are given, as a prompt (0)."""


def texts_of(batch: kdkit.Batch) -> Mapping[str, Tensor]:
    """The tensors (B, N) of a batch of texts.

    Raises:
        ShapeError: they are no texts.
    """
    if not isinstance(batch.inputs, Mapping) or TOKENS not in batch.inputs:
        raise kdkit.ShapeError(f"a batch of texts is a mapping with {TOKENS} (B, N)")
    return batch.inputs


def counted(batch: kdkit.Batch) -> Tensor:
    """Which next tokens count, (B, N - 1) bool: real ones behind real ones, and not of a prompt."""
    texts = texts_of(batch)
    real = texts.get(MASK, torch.ones_like(texts[TOKENS])).bool()
    learnt = texts.get(COMPLETION, real).bool()
    return real[:, :-1] & real[:, 1:] & learnt[:, 1:]
