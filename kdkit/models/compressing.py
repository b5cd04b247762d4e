"""Compresses networks: before they learn, and before they are deployed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from kdkit.contracts.compression import Compression, Samples
from kdkit.contracts.inputs import Shape, is_text, random_inputs
from kdkit.errors import ModelError

PROBE = 2  # images: one would be taken for a batch of a fixed size


def parameters_of(module: nn.Module) -> int:
    """Count the numbers that a network has learnt: its parameters, and weights in int8."""
    weights = (value for value in module.buffers() if value.dtype == torch.int8)
    return sum(value.numel() for value in (*module.parameters(), *weights))


def refuse_device(compressions: Sequence[Compression], device: torch.device | None) -> None:
    """Check that compressed networks run on a device.

    Raises:
        ModelError: one runs on the CPU only.
    """
    for one in compressions:
        if one.on_cpu_only and device is not None and device.type not in ("cpu", "meta"):
            raise ModelError(f"{one.name} is for the CPU: say `device: cpu`, or `--device cpu`")


def begun(module: nn.Module, shape: Shape, compressions: Sequence[Compression]) -> nn.Module:
    """Return the network that learns, after each compression; it may be the same, changed.

    Args:
        module: on the CPU, with its first weights.
        shape: of what it takes.
        compressions: in their order.

    Raises:
        ModelError: it cannot be compressed so.
    """
    for compression in compressions:
        module = compression.begin(module, _images(shape, compression))
    return module


def finished(
    module: nn.Module,
    shape: Shape,
    compressions: Sequence[Compression],
    samples: Samples | None = None,
) -> nn.Module:
    """Return what is deployed of a network that `begun` made.

    Args:
        module: not modified.
        shape: of what it takes.
        compressions: in their order.
        samples: None: random ones, where the structure alone counts.
    """
    for compression in compressions:
        module = compression.finish(module, samples or _random(shape, compression))
    return module


def _random(shape: Shape, compression: Compression) -> Samples:
    def samples(_: int) -> Iterable[Tensor]:
        return [_images(shape, compression)]

    return samples


def _images(shape: Shape, compression: Compression) -> Tensor:
    if is_text(shape):
        raise ModelError(f"{compression.name} is for networks that take images, not texts")
    images = random_inputs(shape, PROBE)
    assert isinstance(images, Tensor)
    return images
