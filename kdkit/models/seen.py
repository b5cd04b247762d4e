"""What one network sees of a sample: one of its fields, a crop, grey, another size."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kdkit.contracts.inputs import Shape, is_text
from kdkit.contracts.model_source import InputOptions, ModelOptions
from kdkit.contracts.records import Inputs
from kdkit.contracts.task import Task
from kdkit.errors import InputError, suggest
from kdkit.models.normalization import LUMINANCE, InputAdapter, Interpolation, resized_to

COLOUR = len(LUMINANCE)


class Seen(nn.Module):
    """Reduces samples of a batch to what a network sees of them.

    What is reduced already passes unchanged: a deployed network may be given either.

    Args:
        options: what it sees.
        shape: (C, H, W) of the images in a batch.
        fields: the fields that are stacked in their channels, see `DataInfo.fields`.

    Attributes:
        shape: (C, H, W) of what it sees.

    Raises:
        InputError: the samples do not have it.
    """

    mix: Tensor

    def __init__(self, options: InputOptions, shape: Shape, fields: Mapping[str, int]) -> None:
        super().__init__()
        if is_text(shape):
            raise InputError("is for images, and the data are texts")
        self.options = options
        self._stacked = shape[0]
        self._channels = _channels_of(options.field, shape[0], fields)
        self.shape = _shape_of(options, (len(self._channels), *shape[1:]))
        # not persistent, so that a checkpoint is the network's alone
        mix = torch.tensor(LUMINANCE, device="cpu").view(1, COLOUR, 1, 1)
        self.register_buffer("mix", mix, persistent=False)

    def forward(self, inputs: Inputs, *, drawing: bool = False) -> Tensor:
        """Reduce images (B, C, H, W), of values in [0, 1] or uint8.

        Args:
            inputs: images; or a mapping from the names of fields to them, of which it is one.
            drawing: draw the place of a random crop for each image, by torch's global generator;
                otherwise it is the centre.
        """
        images = self._field(inputs)
        if images.dtype == torch.uint8:
            images = images.to(self.mix.dtype) / 255
        crop = self.options.crop
        # smaller than the crop, and of the size after it: it was cropped before
        is_cropped = crop and images.shape[2:] == self.shape[1:] and self.shape[1] < crop.size
        if crop and not is_cropped:
            images = _crop(images, crop.size, drawing=drawing and self.is_drawn)
        if self.options.grey and images.shape[1] == COLOUR:
            images = (images * self.mix.to(images.dtype)).sum(1, keepdim=True)
        return resized_to(self.options.size, images, self.options.interpolation)

    @property
    def is_drawn(self) -> bool:
        """True if it differs from step to step."""
        return self.options.is_drawn

    def extra_repr(self) -> str:
        """Describe it completely: a teacher's cache depends on it."""
        return f"{self.options.model_dump_json()}, channels={list(self._channels)}"

    def _field(self, inputs: Inputs) -> Tensor:
        if isinstance(inputs, Mapping):
            return inputs[str(self.options.field)]
        # what has other channels than the samples is the field itself
        if inputs.shape[1] != self._stacked:
            return inputs
        return inputs[:, self._channels.start : self._channels.stop]


class SeenInput(InputAdapter):
    """Shows a network a part of each sample, then adapts that to its input."""

    def __init__(
        self,
        seen: Seen,
        normalization: nn.Module,
        size: int | None = None,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        super().__init__(normalization, size, interpolation)
        self.seen = seen

    def forward(self, inputs: Inputs, *, drawing: bool = False) -> Inputs:
        """Convert images to the network's input; `drawing`: see `Seen`."""
        # a mapping without its field is meant for the network as it is
        if isinstance(inputs, Mapping) and self.seen.options.field not in inputs:
            return inputs
        return super().forward(self.seen(inputs, drawing=drawing))

    def of_seen(self) -> InputAdapter:
        """Return the adapter of what the network sees, without the way from a sample to that."""
        return InputAdapter(self.normalization, self.size, self.interpolation)


def _channels_of(field: str | None, channels: int, fields: Mapping[str, int]) -> range:
    """Return the channels of a field; all if none is named."""
    if field is None:
        return range(channels)
    if field not in fields:
        known = suggest(field, fields) if fields else "samples of this dataset have no fields"
        raise InputError(f"field: there is no '{field}'; {known}")
    if (said := sum(fields.values())) != channels:
        raise InputError(f"field: the dataset's fields have {said} channels, its images {channels}")
    names = list(fields)
    first = sum(fields[name] for name in names[: names.index(field)])
    return range(first, first + fields[field])


def _shape_of(options: InputOptions, shape: Shape) -> Shape:
    """Return the shape of what is seen of images of that shape."""
    channels, height, width = shape
    if (crop := options.crop) is not None:
        if crop.size > min(height, width):
            raise InputError(
                f"crop: {crop.size} x {crop.size} pixels of images of {height} x {width}"
            )
        height = width = crop.size
    if options.grey and channels not in (1, COLOUR):
        raise InputError(
            f"grey: is made of colour images ({COLOUR} channels), these have {channels}"
        )
    side = options.size
    return (1 if options.grey else channels, side or height, side or width)


def _crop(images: Tensor, size: int, *, drawing: bool) -> Tensor:
    """Cut a square out of each image: the centre, or one that is drawn for each.

    Raises:
        InputError: the images are smaller.
    """
    count, channels, height, width = images.shape
    if size > min(height, width):
        raise InputError(f"input.crop: {size} x {size} pixels of images of {height} x {width}")
    if not drawing:
        top, left = (height - size) // 2, (width - size) // 2
        return images[:, :, top : top + size, left : left + size]

    def chosen(room: int) -> Tensor:
        # on the device, without a number for the host: a recorded step draws anew
        first = torch.randint(room + 1, (count, 1), device=images.device)
        return first + torch.arange(size, device=images.device)

    rows, columns = chosen(height - size), chosen(width - size)
    sample = torch.arange(count, device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
    return images[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def refuse_other_places(options: ModelOptions, task: Task) -> None:
    """Refuse an input whose places are not those of the task's targets or answers.

    Raises:
        InputError: says which key.
    """
    if options.input and options.input.crop and task.moves:
        raise InputError(
            f"crop: targets of task '{task.name}' belong to the whole image; crop both by"
            " `data.joint_augment`"
        )
    if task.in_pixels and (options.input_size or (options.input and options.input.size)):
        raise InputError(
            f"answers of task '{task.name}' are in pixels of the batch's images, which all networks"
            " see at that size (`data.image_size`)"
        )
