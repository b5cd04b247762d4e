"""What travels through a training step: a batch, and a model's answer to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kdkit.contracts.features import as_vectors, is_padded
from kdkit.errors import KdkitError

Inputs = Tensor | Mapping[str, Tensor]
MASK = "attention_mask"  # of a mapping, which tokens are real (1) and which padding (0)


@dataclass(frozen=True)
class Batch:
    """One batch, before any normalisation.

    Attributes:
        inputs: images (B, C, H, W) in [0, 1], or a mapping of tensors (text).
        labels: class indices (B,), or shares of the classes (B, K) when inputs are mixed.
        index: the samples' places in the dataset's whole training part (B,), whatever subset is
            trained on.
        views: the same images in further augmentations, where the stage asks for some.
    """

    inputs: Inputs
    labels: Tensor
    index: Tensor
    views: tuple[Inputs, ...] = ()

    @property
    def classes(self) -> Tensor:
        """Class indices (B,); of a mixed sample, the class with the largest share."""
        return self.labels if self.labels.ndim == 1 else self.labels.argmax(1)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same record with every tensor changed."""
        inputs, *views = (
            change(x) if isinstance(x, Tensor) else {k: change(v) for k, v in x.items()}
            for x in (self.inputs, *self.views)
        )
        return Batch(inputs, change(self.labels), change(self.index), tuple(views))


@dataclass(frozen=True, repr=False)
class Outputs:
    """One model's answer to one batch.

    Attributes:
        logits: scores before softmax, (B, K).
        features: what the tapped layers gave, by the layer names of the recipe.
        views: its answers to other views of the same images, where the schedule shows it any.
        mask: which tokens of a text are real, not padding, (B, N); None where samples are not
            padded.
    """

    logits: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)
    views: Mapping[str, Outputs] = field(default_factory=dict)
    # no plain default, which an answer that lacks it would have
    mask: Tensor | None = field(default_factory=lambda: None)

    @classmethod
    def lacking(cls, reason: KdkitError, **present: Any) -> Outputs:
        """An answer of which only these attributes are there; reading another one raises
        `reason`.
        """
        made = object.__new__(cls)
        vars(made).update(present, reason=reason)
        return made

    def __getattr__(self, name: str) -> Any:  # called for attributes that are not there
        if name in self.__dataclass_fields__ and "reason" in vars(self):
            raise vars(self)["reason"]
        raise AttributeError(f"'Outputs' has no attribute '{name}'")

    def __repr__(self) -> str:
        present = {name: value for name, value in vars(self).items() if name != "reason"}
        return f"Outputs({', '.join(f'{name}={value!r}' for name, value in present.items())})"

    def _with(self, **changed: Any) -> Outputs:
        made = object.__new__(type(self))
        vars(made).update(vars(self) | changed)
        return made

    def map(self, change: Callable[[Tensor], Tensor]) -> Outputs:
        """The same record with every tensor but the mask changed; a layer that is the logits
        stays one tensor with them.
        """
        present, changed = vars(self), dict[str, Any]()
        if (logits := present.get("logits")) is not None:
            changed["logits"] = change(logits)
        if "features" in present:
            changed["features"] = {
                name: changed["logits"] if f is logits else change(f)
                for name, f in self.features.items()
            }
        if "views" in present:
            changed["views"] = {name: view.map(change) for name, view in self.views.items()}
        return self._with(**changed)

    def seen_beside(self, views: Mapping[str, Outputs]) -> Outputs:
        """The same answer, with those to other views."""
        return self._with(views=views)

    def masked(self, mask: Tensor | None) -> Outputs:
        """The same answer, of texts of which those tokens are real."""
        return self._with(mask=mask)

    def pooled(self) -> Outputs:
        """The same answer with a vector for each text, the mean over its real tokens, in the
        place of its hidden states.

        For schedules that let a sample learn from another one, whose tokens are others.
        """
        if self.mask is None:
            return self
        features = {
            name: as_vectors(f, self.mask) if is_padded(f, self.mask) else f
            for name, f in self.features.items()
        }
        return self._with(features=features, mask=None)

    def detach(self) -> Outputs:
        """The same values as constants."""
        return self.map(Tensor.detach)


def tensors(record: Batch | Outputs) -> list[Tensor]:
    """Every tensor in a record, in an order that its shape alone gives."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    record.map(note)
    return found
