"""Verifies that frozen models do not change."""

from __future__ import annotations

import hashlib
import itertools
import weakref
from typing import cast

import torch
from torch import nn

from kdkit.contracts.schedule import Model
from kdkit.errors import RunError
from kdkit.models.tapped import TappedModel


class FrozenModels:
    """Digests of models that must not change."""

    def __init__(self) -> None:
        # weak: a digest must not keep a model's weights in memory
        self._digests: weakref.WeakKeyDictionary[TappedModel, str] = weakref.WeakKeyDictionary()

    def add(self, model: TappedModel) -> None:
        """Record the current digest of a frozen model."""
        if model.frozen and model not in self._digests:
            self._digests[model] = _digest(model.module)

    def leave_out(self, model: Model) -> None:
        """Stop watching a model that a stage changes itself."""
        self._digests.pop(cast("TappedModel", model), None)

    def verify(self) -> None:
        """Compare every frozen model with its recorded digest.

        Raises:
            RunError: a parameter or buffer of it has changed.
        """
        for model, before in self._digests.items():
            if _digest(model.module) != before:
                raise RunError(
                    f"{model.role} is frozen, yet its parameters or buffers have changed; a plugin"
                    " or schedule must have done it"
                )


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    # state_dict leaves some buffers out
    for name, value in itertools.chain(module.named_parameters(), module.named_buffers()):
        digest.update(name.encode())
        # As bytes: numpy has no bf16.
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
