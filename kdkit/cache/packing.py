"""The form of a teacher's cached answers: which tensors, of which type, for which views."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkit.cache.rows import Column
from kdkit.contracts.model_source import CacheOptions
from kdkit.contracts.records import Outputs
from kdkit.data.augment import crop_flip_count, draw_crop_flip
from kdkit.errors import RunError
from kdkit.models.tapped import features_only
from kdkit.recipe.data_section import DataSpec

TYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
VALUES = "logits.values"
INDICES = "logits.indices"
REST = "logits.rest"
LOGITS = "logits"
TAP = "tap "  # prefix of the columns of layers


@dataclass(frozen=True)
class Slots:
    """The views of an image that are cached: one slot for each.

    Attributes:
        count: number of slots.
        exact: whether a slot is one outcome of the crop and flip; otherwise it is one view, in the
            loader's numbering.
        padding, flip: of `data.augment`.
        seed: of the augmentation.
        mixed: whether images are mixed; a slot is then a whole epoch, with its order and mixes.
    """

    count: int
    exact: bool
    padding: int
    flip: float
    seed: int
    mixed: bool = False

    @classmethod
    def of(cls, options: CacheOptions, data: DataSpec, seed: int, *, mixed: bool) -> Slots:
        """Determine the slots of a recipe; one, if images always look the same."""
        padding, flip = (data.augment.crop_padding, data.augment.flip) if data.augment else (0, 0.0)
        outcomes = crop_flip_count(padding) // (1 if 0 < flip < 1 else 2)
        is_still = outcomes == 1 and not (data.timm_augment or data.joint_augment or mixed)
        exact = options.views == "all" or is_still
        return cls(
            outcomes if options.views == "all" or exact else options.views,
            exact,
            padding,
            flip,
            seed,
            mixed,
        )

    def view(self, number: int) -> int:
        """Return the view that is shown in place of view `number`."""
        return number if self.exact else number % self.count

    def shown(self, view: int, index: Tensor) -> Tensor:
        """Return the slot of each image (N,) in a view."""
        if not self.exact:
            return torch.full_like(index, view % self.count)
        outcome = draw_crop_flip(self.seed, view, index, self.padding, self.flip)
        return outcome if 0 < self.flip < 1 else outcome // 2

    def outcome(self, slot: int) -> int:
        """Return the crop and flip of a slot, in `crop_flip`'s numbering."""
        return slot if 0 < self.flip < 1 else 2 * slot + int(self.flip == 1)


@dataclass(frozen=True)
class KeptAnswers:
    """The form in which one teacher's answers are cached.

    Attributes:
        options: the recipe's.
        shape: of the logits of a sample, such as (K,), (K, H, W) of a map, or (N, K) of a text of N
            tokens; those of a shorter text are filled up with 0.
        logits: whether the answer has any.
        taps: shape of each tapped layer's output by name, without the batch.
        aliases: tapped layers that are the logits.
        channels_last: layers whose maps are (B, C, H, W) with channels last in memory, and are
            stored that way.
        axis: of the K classes in logits (B, ...).
    """

    options: CacheOptions
    shape: tuple[int, ...]
    logits: bool
    taps: Mapping[str, tuple[int, ...]]
    aliases: Sequence[str] = ()
    channels_last: Sequence[str] = ()
    axis: int = 1

    def columns(self) -> list[Column]:
        """List the columns of a row of the store."""
        k, dtype = self.options.top_k, TYPES[self.options.dtype]
        columns = []
        if self.logits and k is None:
            columns.append(Column(LOGITS, self.shape, dtype))
        elif self.logits and k is not None:
            classes = self.shape[self.axis - 1]
            short = "int16" if classes <= torch.iinfo(torch.int16).max else "int32"
            largest, one = (self._shape_of(count) for count in (k, 1))
            columns += [Column(VALUES, largest, dtype), Column(INDICES, largest, short)]
            # one number a row: its rounding would change the probability of every other class
            columns.append(Column(REST, one, "float32"))
        for name, shape in self.taps.items():
            stored = (*shape[1:], shape[0]) if name in self.channels_last else shape
            columns.append(Column(TAP + name, stored, dtype))
        return columns

    @property
    def bytes(self) -> int:
        """Size of one answer in bytes."""
        return sum(column.bytes for column in self.columns())

    def pack(self, outputs: Outputs) -> dict[str, Tensor]:
        """Convert an answer (B, ...) to columns, on its device.

        Raises:
            RunError: a number is too large for the type.
        """
        plain: dict[str, Tensor] = {}
        if self.logits and self.options.top_k is None:
            plain[LOGITS] = outputs.logits
        elif self.logits:
            plain |= _largest(outputs.logits.float(), self.options.top_k or 0, self.axis)
        for name in self.taps:
            value = outputs.features[name]
            plain[TAP + name] = value.permute(0, 2, 3, 1) if name in self.channels_last else value
        packed = {
            column.name: _filled(plain[column.name].detach(), column.shape)
            .to(column.type)
            .contiguous()
            for column in self.columns()
        }
        if self.options.dtype == "fp16":
            self._refuse_overflow(plain, packed)
        return packed

    def unpack(self, values: Mapping[str, Tensor], role: str) -> Outputs:
        """Convert columns to an answer in fp32; `role` is the teacher's name in messages."""
        features = {name: values[TAP + name].float() for name in self.taps}
        features |= {name: features[name].permute(0, 3, 1, 2) for name in self.channels_last}
        if not self.logits:
            return features_only(features, role)
        logits = values[LOGITS].float() if self.options.top_k is None else self._spread(values)
        return Outputs(logits, {**features, **dict.fromkeys(self.aliases, logits)})

    def _spread(self, values: Mapping[str, Tensor]) -> Tensor:
        logits = values[REST].expand(-1, *self.shape).clone()
        return logits.scatter_(self.axis, values[INDICES].long(), values[VALUES].float())

    def _shape_of(self, classes: int) -> tuple[int, ...]:
        return (*self.shape[: self.axis - 1], classes, *self.shape[self.axis :])

    def _refuse_overflow(self, plain: Mapping[str, Tensor], packed: Mapping[str, Tensor]) -> None:
        # all columns at once, so that a GPU is waited for once
        lost = torch.stack(
            [packed[name].isinf().any() & ~plain[name].isinf().any() for name in packed]
        )
        if lost.any():
            name = [*packed][int(lost.int().argmax())].removeprefix(TAP)
            raise RunError(
                f"the teacher's '{name}' has numbers above 65,504, which `dtype: fp16` cannot hold;"
                " set `cache.dtype: bf16`"
            )


def is_channels_last(value: Tensor) -> bool:
    """Check whether maps (B, C, H, W) have channels last in memory."""
    return (
        value.ndim == 4
        and value.is_contiguous(memory_format=torch.channels_last)
        and not value.is_contiguous()
    )


def _filled(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Fill answers (B, n, ...) to the tokens of texts up to the shape (N, ...) of the longest."""
    if value.shape[1:] == shape:
        return value
    return F.pad(value, (*(0, 0) * (value.ndim - 2), 0, shape[0] - value.shape[1]))


def _largest(logits: Tensor, k: int, axis: int) -> dict[str, Tensor]:
    """Return the k largest logits of each row, their classes, and the logit of each other class."""
    values, indices = logits.topk(k, dim=axis)
    others = logits.scatter(axis, indices, -torch.inf)
    # the other classes share the remaining probability evenly
    rest = others.logsumexp(axis, keepdim=True) - math.log(logits.shape[axis] - k)
    return {VALUES: values, INDICES: indices, REST: rest}
