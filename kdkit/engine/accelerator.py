"""The device and precision of one process's training."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import patch_environment

from kdkit.errors import RunError
from kdkit.models.devices import chosen, trains_on_cpu
from kdkit.recipe.sections import TrainSpec


def build_accelerator(spec: TrainSpec, **options: Any) -> Accelerator:
    """Build one process's accelerator for the recipe's device and precision.

    Raises:
        RunError: the machine has no such device, or fp16 without a GPU.
    """
    try:
        device = chosen(spec.device)
    except RunError as error:
        raise RunError(f"train.device: {error}") from None
    # a previous recipe in this process may have used another precision
    AcceleratorState._reset_state()
    if PartialState._shared_state and PartialState().num_processes == 1:
        PartialState._reset_state()
    cpu = trains_on_cpu(spec)
    if spec.precision == "fp16" and cpu:
        raise RunError("train.precision fp16 needs a GPU; on the CPU use fp32 (or bf16)")
    precision = "no" if spec.precision == "fp32" else spec.precision
    which = (
        {"ACCELERATE_TORCH_DEVICE": str(device)}
        if device is not None and device.index is not None
        else {}
    )
    with patch_environment(**which):
        return Accelerator(
            mixed_precision=precision, cpu=cpu, step_scheduler_with_optimizer=False, **options
        )


def multiplies_bf16() -> bool:
    """Check whether this processor has instructions that multiply bf16 matrices."""
    return (
        bool(torch.cpu.get_capabilities().get("amx_bf16"))
        if hasattr(torch.cpu, "get_capabilities")
        else True
    )
