"""A teacher that is a set of answers without a network, and the folder that may hold them."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kdkit import files
from kdkit.contracts.model_source import ModelOptions, ModelSource
from kdkit.contracts.options import Options
from kdkit.errors import ModelError, RunError

INDEX = "index.json"
ROUNDED = 1e-2  # by how much probabilities kept in half precision may sum to more than 1
WAY_OUT = "the folder must be made again"


class AnswersOptions(ModelOptions):
    """Options of a teacher whose answers exist already; keys of a network are refused."""


NETWORK_KEYS = (
    *("checkpoint", "strip_prefix", "new_head", "normalize", "input", "input_size"),
    *("interpolation", "precision", "mode", "fold_batchnorm", "cache", "at", "sends"),
)
"""Keys of a teacher that describe its network, or the way it is run."""


@dataclass(frozen=True)
class TopK:
    """The k largest logits of each of N rows, and one logit for each of the other classes.

    Attributes:
        values: the k largest logits (N, k), floating-point.
        indices: their classes (N, k), integers.
        rest: the logit of each other class (N, 1).
        classes: K, of a whole row.
    """

    values: Tensor
    indices: Tensor
    rest: Tensor
    classes: int

    @classmethod
    def of_log_probabilities(cls, values: Tensor, indices: Tensor, classes: int) -> TopK:
        """Spread the probability that values (N, k) = log p leave evenly over the other classes.

        Raises:
            ModelError: the probabilities of a row sum to more than 1.
        """
        sums = values.float().exp().sum(1, keepdim=True)
        if over := (sums[:, 0] > 1 + ROUNDED).nonzero().flatten()[:1].tolist():
            raise ModelError(
                "without `rest`, the largest values must be logarithms of"
                f" probabilities; those of row {over[0]} (counted from 0) sum to"
                f" {float(sums[over[0]]):.3g}, not at most 1"
            )
        left = (1 - sums).clamp_min(torch.finfo(torch.float32).eps)
        return cls(values, indices, left.log() - math.log(classes - values.shape[1]), classes)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return whole rows of logits (N, K) in fp32."""
        logits = self.rest[rows].float().expand(-1, self.classes).clone()
        return logits.scatter_(1, self.indices[rows].long(), self.values[rows].float())

    def to(self, device: torch.device) -> TopK:
        """Return them on a device."""
        values, indices, rest = (part.to(device) for part in (self.values, self.indices, self.rest))
        return TopK(values, indices, rest, self.classes)

    def verify(self) -> None:
        """Check that each row names k different classes.

        Raises:
            ModelError: one does not.
        """
        ascending = self.indices.sort(1).values
        wrong = (ascending[:, 0] < 0) | (ascending[:, -1] >= self.classes)
        wrong |= (ascending[:, 1:] == ascending[:, :-1]).any(1)
        if found := wrong.nonzero().flatten()[:1].tolist():
            raise ModelError(
                f"row {found[0]} (counted from 0) names classes twice, or others than 0 to"
                f" {self.classes - 1}: {self.indices[found[0]].tolist()}"
            )


class KnownAnswers(ModelSource):
    """A source that has a teacher's answers to the training images, but no network.

    Such a teacher answers only the images of the training part, without augmentation: it is not
    measured.
    """

    takes: ClassVar[Literal["images", "texts", "any"]] = "any"
    Options: ClassVar[type[ModelOptions]] = AnswersOptions

    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the answers without reading them; it must be (N, K).

        Raises:
            ModelError: there are none, or they are no floating-point numbers.
        """

    @abc.abstractmethod
    def read(self) -> Tensor | TopK:
        """Return the answers (N, K): row i answers the image with `Batch.index` i.

        Raises:
            ModelError: they cannot be read.
        """

    def layers(self) -> Mapping[str, tuple[int, ...]]:
        """Return the layers whose outputs are kept, with the shape of one; none by default.

        Raises:
            ModelError: see `shape`.
        """
        return {}

    def read_layer(self, name: str) -> Tensor:
        """Return the outputs (N, ...) of one of `layers`, in the order of `read`.

        Raises:
            ModelError: see `read`.
        """
        raise ModelError(f"'{name}' is not kept")

    def build(self, outputs: int, image_shape: Any) -> nn.Module:
        """Build a stand-in for the network."""
        return AnswersAlone(outputs, self.layers())


# a module, so that hooks which read a network's answers also read these
class AnswersAlone(nn.Module):
    """Returns answers (N, K) as they are; for any other batch, as a check tries, random ones, also
    of layers.
    """

    output_fmt = "NCHW"  # so that no map is taken for one with channels last

    def __init__(self, outputs: int, layers: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.outputs = outputs
        self.rows = nn.ModuleList(_Noise(shape) for shape in layers.values())
        # a name may hold dots, which a module's may not
        self.layer_paths = {name: f"rows.{i}" for i, name in enumerate(layers)} | {"logits": ""}

    def forward(self, *inputs: Tensor, **texts: Tensor) -> Tensor:
        # the place that reads answers passes rows of them; images have more dimensions, token ids
        # are integers
        first = inputs[0] if inputs else next(iter(texts.values()))
        if first.ndim == 2 and first.is_floating_point():
            return first
        for layer in self.rows:
            layer(first)
        return torch.randn(len(first), self.outputs, device=first.device)


class _Noise(nn.Module):
    """Stands in for a layer; returns random numbers."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, first: Tensor) -> Tensor:
        return torch.randn(len(first), *self.shape, device=first.device)


class AnswerArray(Options):
    """One array of a folder of answers.

    With `top_k`, a shard holds ARRAY.values and ARRAY.indices (n, k) in place of ARRAY; with
    `rest` also ARRAY.rest (n, 1), the logit of each other class.
    """

    shape: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        min_length=1, description="Of a row, such as [K]."
    )
    dtype: Literal["float16", "bfloat16", "float32", "float64"] = Field(
        description="Type of the numbers."
    )
    top_k: int | None = Field(default=None, ge=1, description="Number k of logits that are kept.")
    rest: bool = Field(
        default=False,
        description=(
            "Whether the logit of each other class is kept. If not, the values are logarithms of"
            " probabilities, whose rest is spread evenly over the other classes."
        ),
    )
    channels_last: bool = Field(
        default=False, description="Whether `shape` is [H, W, C]; losses get (B, C, H, W)."
    )

    @model_validator(mode="after")
    def _keeps_a_part(self) -> Self:
        if self.top_k is not None and self.top_k >= self.shape[-1]:
            raise ValueError(f"top_k {self.top_k} of {self.shape[-1]} classes; leave it out")
        if self.channels_last and len(self.shape) != 3:
            raise ValueError(f"channels_last is of maps [H, W, C], not {[*self.shape]}")
        return self


class AnswerShard(Options):
    """One file of a folder of answers."""

    file: str = Field(pattern=r"^[^/\\\x00]+$", description="Its name in the folder.")
    rows: int = Field(ge=1, description="Number of its rows.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Digest of the file.")


class AnswerIndex(Options):
    """The content of a folder's `index.json`: what its shards hold, in order.

    Row i of all shards together answers image i of the dataset's whole training part.
    """

    format: Literal[1] = Field(description="Version of the format.")
    rows: int = Field(ge=1, description="Number of images.")
    arrays: Mapping[str, AnswerArray] = Field(min_length=1, description="By name.")
    shards: tuple[AnswerShard, ...] = Field(min_length=1, description="In order.")
    dataset: str = Field(default="", description="What was answered, in words.")
    teacher: str = Field(default="", description="Who answered, in words.")

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if (found := sum(shard.rows for shard in self.shards)) != self.rows:
            raise ValueError(f"its shards have {found:,} rows together, not {self.rows:,}")
        return self

    @classmethod
    def read(cls, path: Path) -> AnswerIndex:
        """Read an index.

        Raises:
            ModelError: it is missing, damaged, or no index.
        """
        try:
            return files.read_json(path, cls, WAY_OUT)
        except RunError as error:
            raise ModelError(str(error)) from None

    def verified(self, index: Path) -> Iterator[tuple[Path, int]]:
        """Yield the path of each shard and its number of rows, after comparing its digest.

        Raises:
            ModelError: one is missing, or another file than the index says.
        """
        for shard in self.shards:
            path = index.parent / shard.file
            try:
                files.refuse_other(path, shard.sha256, index, WAY_OUT)
            except RunError as error:
                raise ModelError(str(error)) from None
            yield path, shard.rows
