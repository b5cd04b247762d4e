"""Edge-case inputs for a loss: equal rows, zeros, constants, numbers at the limits of their
type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]
LARGEST = "numbers up to 6e4"  # inputs for which a large gradient is legitimate


def as_it_is(x: Tensor) -> Tensor:
    return x


def equal_rows(x: Tensor) -> Tensor:
    return x[:1].expand_as(x).clone()


def huge_logits(x: Tensor) -> Tensor:
    return 1e4 * x.sign() if x.ndim == 2 else x


def certain(x: Tensor) -> Tensor:
    return 100.0 * (x == x.amax(1, keepdim=True)) if x.ndim == 2 else x


def constant(x: Tensor) -> Tensor:
    return torch.ones_like(x) if x.ndim > 2 else x


def tiny(x: Tensor) -> Tensor:
    return 1e-6 * torch.ones_like(x) if x.ndim > 2 else x


def smallest(x: Tensor) -> Tensor:
    return 1e-8 * x


def largest(x: Tensor) -> Tensor:
    return 6e4 * x.clamp(-1, 1)  # the range of fp16


# The change of the student's tensors, and of the teacher's.
DEGENERATE: Mapping[str, tuple[Change, Change]] = {
    "equal rows": (equal_rows, as_it_is),
    "equal rows of the teacher": (as_it_is, equal_rows),
    "two equal rows": (lambda x: torch.cat([x[:1], x[:1], x[2:]]), as_it_is),
    "two rows equal but for rounding": (
        lambda x: torch.cat([x[:1], x[:1] * (1 + 2e-7), x[2:]]),
        as_it_is,
    ),
    "a row of zeros": (lambda x: torch.cat([0 * x[:1], x[1:]]), as_it_is),
    "a row of zeros of the teacher": (as_it_is, lambda x: torch.cat([0 * x[:1], x[1:]])),
    "zeros": (torch.zeros_like, as_it_is),
    "zeros of the teacher": (as_it_is, torch.zeros_like),
    "zeros on both sides": (torch.zeros_like, torch.zeros_like),
    "a dead channel": (
        lambda x: torch.cat([0 * x[:, :1], x[:, 1:]], 1),
        lambda x: torch.cat([0 * x[:, :1], x[:, 1:]], 1),
    ),
    "constant maps": (constant, as_it_is),
    "constant maps on both sides": (constant, constant),
    "constant maps of 1e-6": (tiny, as_it_is),
    "numbers of 1e-8": (smallest, as_it_is),
    "numbers of 1e-8 of the teacher": (as_it_is, smallest),
    LARGEST: (largest, as_it_is),
    f"{LARGEST} on both sides, opposed": (largest, lambda x: -largest(x)),
    "logits of 1e4": (huge_logits, as_it_is),
    "logits of 1e4 of the teacher": (as_it_is, huge_logits),
    "a teacher that is certain": (as_it_is, certain),
    "logits of 1e4 on both sides, opposed": (huge_logits, lambda x: -huge_logits(x)),
}
