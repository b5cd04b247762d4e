"""The classifier of a served teacher, which may be applied where the student learns."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkit.cache import wire
from kdkit.cache.teacher import autocast
from kdkit.contracts.inputs import Shape, random_inputs
from kdkit.contracts.layers import resolve
from kdkit.errors import RunError, TapError
from kdkit.models.devices import device_of
from kdkit.models.tapped import TappedModel

HIDDEN = "penultimate"  # the layer that it reads
PROBE = 4  # images


@dataclass(frozen=True)
class Head:
    """A network's last layer, logits = W h + b.

    Attributes:
        weight: W (K, D).
        bias: b (K,), if there is one.
        precision: the type that the network autocasts to (None: that of its caller).
    """

    weight: Tensor
    bias: Tensor | None
    precision: torch.dtype | None

    @classmethod
    def of(cls, model: TappedModel, shape: Shape) -> Head:
        """Take it from a model whose samples have that shape.

        Raises:
            RunError: its logits are anything else than the output of one linear layer.
        """
        says = f"{model.role}: `sends: hidden` needs logits that one linear layer gives"
        view = model.view((), needs_logits=True, answers=None)
        try:
            view.layers = {HIDDEN: resolve(HIDDEN, model.module)}
            linear = model.module.get_submodule(view.layers[HIDDEN].path)
            if not isinstance(linear, nn.Linear):
                raise RunError(f"{says}, not {type(linear).__name__}")
            head = cls(linear.weight.detach(), linear.bias, model.precision)
            with torch.no_grad():
                answer = view(random_inputs(shape, PROBE, device_of(model.module)))
                if not torch.equal(head(answer.features[HIDDEN], None), answer.logits):
                    raise RunError(
                        f"{says}; something changes them afterwards (`classes`, `answers`)"
                    )
        except TapError as error:
            raise RunError(f"{says}: {error}") from None
        return head

    def __call__(self, hidden: Tensor, precision: torch.dtype | None) -> Tensor:
        """Return the logits (B, ..., K) of embeddings (B, ..., D), in the caller's type."""
        own = self.precision or precision
        with torch.no_grad(), autocast(hidden.device, None if own == torch.float32 else own):
            logits = F.linear(hidden, self.weight, self.bias)
        return logits if self.precision is None else logits.float()

    def to(self, device: torch.device) -> Head:
        """Return it on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return Head(self.weight.to(device), bias, self.precision)

    def packed(self) -> bytes:
        """Return it as bytes."""
        bias = {} if self.bias is None else {"bias": self.bias}
        return wire.pack({"weight": self.weight, **bias})[0]

    def about(self) -> dict[str, Any]:
        """Return what is told of it: its digest, and its precision."""
        return {
            "sha256": hashlib.sha256(self.packed()).hexdigest(),
            "precision": wire.name_of(self.precision),
        }

    @classmethod
    def unpacked(cls, data: bytes, about: Mapping[str, Any]) -> Head:
        """Return one (see `packed`), if it is the one that was told of.

        Raises:
            RunError: it is another one, or damaged.
        """
        if hashlib.sha256(data).hexdigest() != about["sha256"]:
            raise RunError("sent another classifier than it has told of")
        named = wire.unpack(data)
        return cls(named["weight"], named.get("bias"), wire.PRECISIONS[about["precision"]])
