"""The interface of a balance plugin: one gradient of those of a student's losses."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from kdkit.contracts.options import Options


class BalanceOptions(Options):
    """Options of a balance; subclass it as `Options` in the balance."""


@dataclass(frozen=True)
class Sizes:
    """What a balance is built for.

    Attributes:
        terms: names of the losses, L.
        labels: of each loss, whether it is on labels.
        own: number of values in the student's parameters that learn.
        all: the same with the learnable parts of its losses behind them, P.
    """

    terms: Sequence[str]
    labels: Sequence[bool]
    own: int
    all: int


@dataclass(frozen=True)
class Gradients:
    """Gradients of a step, averaged over its batches and over all processes.

    Attributes:
        rows: of each weighted loss, (L, P), the student's parameters first; 0 where a loss does
            not reach a parameter, or was not part of the step.
        reached: whether it does, (L, P).
        values: of the weighted losses, (L,).
        parameters: (P,), their values before the step.
    """

    rows: Tensor
    reached: Tensor
    values: Tensor
    parameters: Tensor


class Balance(nn.Module, abc.ABC):
    """Combines the gradients of a student's losses in each step. What it remembers are buffers,
    changed in place.
    """

    name: ClassVar[str]
    capturable: ClassVar[bool] = True
    """False if its values must be computed anew by Python in each step (`train.capture`)."""
    Options: ClassVar[type[BalanceOptions]] = BalanceOptions

    def __init__(self, options: BalanceOptions, sizes: Sizes) -> None:
        super().__init__()
        self.options = options
        self.sizes = sizes

    @classmethod
    def refused(
        cls, options: Any, terms: Sequence[str], optimizer: Mapping[str, Any]
    ) -> Mapping[str, str]:
        """Return what is wrong with the options for these losses and these options of the
        optimizer: the key, empty for the whole section, and the reason.
        """
        return {}

    @abc.abstractmethod
    def forward(self, gradients: Gradients) -> Tensor:
        """Return the gradient that the optimizer is given, (P,)."""

    def factors(self) -> Tensor | None:
        """Return by how much each loss's weight was multiplied in the last step, (L,); None if
        that is no number. The log has them in the weighted losses.
        """
        return None
