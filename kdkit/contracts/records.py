"""Records of a training step: a batch, and a model's answer to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from kdkit.contracts.features import as_vectors, is_padded
from kdkit.contracts.missing_labels import HIDDEN_LABELS
from kdkit.errors import KdkitError

Inputs = Tensor | Mapping[str, Tensor]
MASK = "attention_mask"  # of a mapping, which tokens are real (1) and which padding (0)


@dataclass(frozen=True)
class Batch:
    """One batch, before any normalisation.

    Attributes:
        inputs: images (B, C, H, W) in [0, 1], or a mapping of tensors (text).
        labels: targets (B, ...) in the task's form: class indices (B,), or shares of the classes
            when inputs are mixed.
        index: the samples' places in the dataset's whole training part (B,), whatever subset is
            trained on.
        views: the same images in further augmentations, if the stage asks for them.
        labelled: how many of the samples, the first ones, have labels (None: all of them). If it is
            set, only losses on labels can read some; they receive these samples alone.
    """

    inputs: Inputs
    labels: Tensor
    index: Tensor
    views: tuple[Inputs, ...] = ()
    labelled: int | None = None

    @property
    def classes(self) -> Tensor:
        """Class indices (B,); for a mixed sample, the class with the largest share."""
        return self.labels if self.labels.ndim == 1 else self.labels.argmax(1)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the same record with a function applied to every tensor."""
        inputs, *views = (
            change(x) if isinstance(x, Tensor) else {k: change(v) for k, v in x.items()}
            for x in (self.inputs, *self.views)
        )
        labels, index = change(self.labels), change(self.index)
        return Batch(inputs, labels, index, tuple(views), self.labelled)

    def without_labels(self) -> Batch:
        """Return the batch as all but losses on labels see it: if not every sample has a label,
        reading one raises an error.
        """
        return self if self.labelled is None else replace(self, labels=HIDDEN_LABELS)

    def labelled_part(self) -> Batch:
        """Return those samples of the batch that have labels."""
        return replace(self.map(lambda x: x[: self.labelled]), labelled=None)


@dataclass(frozen=True, repr=False)
class Outputs:
    """One model's answer to one batch.

    Attributes:
        logits: output of the network; losses on labels and responses, and scores, receive it row by
            row, (R, K).
        features: outputs of the tapped layers, by their names in the recipe.
        views: its answers to other views of the same images, if the schedule shows it any.
        mask: marks the tokens of a text that are real, not padding, (B, N); None if samples are not
            padded.
    """

    logits: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)
    views: Mapping[str, Outputs] = field(default_factory=dict)
    # a factory: a plain default would be a class attribute and hide that an answer lacks the mask
    mask: Tensor | None = field(default_factory=lambda: None)

    @classmethod
    def lacking(cls, reason: KdkitError, **present: Any) -> Outputs:
        """Return an answer that has only these attributes; reading another one raises `reason`."""
        # without `__init__`, so that a missing attribute reaches `__getattr__`
        made = object.__new__(cls)
        vars(made).update(present, reason=reason)
        return made

    @property
    def has_logits(self) -> bool:
        """Whether the answer has logits, not only layers."""
        return "logits" in vars(self)

    def __getattr__(self, name: str) -> Any:  # called for missing attributes only
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
        """Return the same record with a function applied to every tensor but the mask; a layer that
        is the logits still shares their tensor.
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
        """Return the same answer with the answers to other views added."""
        return self._with(views=views)

    def masked(self, mask: Tensor | None) -> Outputs:
        """Return the same answer with a mask of the texts' real tokens."""
        return self._with(mask=mask)

    def pooled(self) -> Outputs:
        """Return the same answer with one vector for each text, the mean over its real tokens, in
        place of its hidden states.

        For schedules in which a sample learns from another one, whose tokens differ.
        """
        if self.mask is None:
            return self
        features = {
            name: as_vectors(f, self.mask) if is_padded(f, self.mask) else f
            for name, f in self.features.items()
        }
        return self._with(features=features, mask=None)

    def first(self, count: int, of: int) -> Outputs:
        """Return the answer to the first `count` of `of` samples; its views may hold several copies
        of each sample, all samples once, then all again.
        """

        def of_these(x: Tensor) -> Tensor:
            if len(x) == of:
                return x[:count]
            return x.reshape(-1, of, *x.shape[1:])[:, :count].flatten(0, 1)

        answer = self.map(of_these)
        return answer if self.mask is None else answer.masked(self.mask[:count])

    def detach(self) -> Outputs:
        """Return the same values as constants."""
        return self.map(Tensor.detach)


def tensors(record: Batch | Outputs) -> list[Tensor]:
    """List every tensor in a record, in an order that depends on its structure only."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    record.map(note)
    return found
