"""Chooses the device of a recipe, and the memory layout of its images there."""

from __future__ import annotations

import os

import torch
from torch import nn

from kdkit.errors import RunError
from kdkit.recipe.sections import TrainSpec

LEAST_CHANNELS = 16
"""Input channels that make a strided 1x1 convolution safe on the CPU, channels-last.

oneDNN computes with vectors of 8 numbers (AVX2) or 16 (AVX-512). With fewer channels than that, the
backward pass of such a convolution writes a whole vector, beyond the end of a buffer (seen in torch
2.14 and 2.15; with AVX-512 at 64 x 64 pixels).
"""


def present() -> list[str]:
    """List the devices of this machine, by the names that `train.device` uses."""
    if (kind := torch.accelerator.current_accelerator()) is None:
        return ["cpu"]
    return ["cpu", *(f"{kind.type}:{number}" for number in range(torch.accelerator.device_count()))]


def chosen(name: str) -> torch.device | None:
    """Return the device of that name; None for `auto`.

    Raises:
        RunError: this machine has no such device, or several processes would share it.
    """
    if name == "auto":
        return None
    devices = present()
    # `cuda` is any of `cuda:0`, `cuda:1`...
    if name not in devices and f"{name}:0" not in devices:
        raise RunError(f"this machine has no '{name}'; it has {', '.join(devices)}")
    device = torch.device(name)
    if device.index is not None and (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise RunError(
            f"'{name}' is one device, and each of the {processes} processes takes its own: say"
            f" '{device.type}'"
        )
    return device


def device_of(network: nn.Module) -> torch.device:
    """Return the device of a network's parameters; the CPU if it has none."""
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def for_reading(train: TrainSpec) -> TrainSpec:
    """Return the `train` section for reading a run, with a device that this machine has."""
    try:
        chosen(train.device)
    except RunError:
        return train.model_copy(update={"device": "auto"})
    return train


def trains_on_cpu(train: TrainSpec) -> bool:
    """Check whether the recipe runs on the CPU, by name or for lack of an accelerator."""
    return train.device == "cpu" or not torch.accelerator.is_available()


def is_channels_last(train: TrainSpec, device: torch.device) -> bool:
    """Check whether networks on that device, and their images, are channels-last in memory."""
    return device.type != "cpu" if train.channels_last == "auto" else train.channels_last


def unsafe_convolution(network: nn.Module) -> str | None:
    """Name a convolution that corrupts memory on the CPU with channels-last images, or None."""
    for name, conv in network.named_modules():
        if not isinstance(conv, nn.Conv2d) or conv.groups > 1 or conv.in_channels >= LEAST_CHANNELS:
            continue
        if max(conv.kernel_size) == 1 and max(conv.stride) > 1:
            return str(name)
    return None
