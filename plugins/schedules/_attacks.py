"""Attacks that a schedule shows its student: projected gradient descent within a box of pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit

LEVELS = 255.0


class AttackOptions(kdkit.ScheduleOptions):
    """Options of an attack by signed gradient steps."""

    epsilon: float = Field(
        default=8.0, gt=0, le=LEVELS, description="Largest change of a pixel, in units of 1/255."
    )
    step: float = Field(
        default=2.0, gt=0, le=LEVELS, description="Change of a pixel by a step, units of 1/255."
    )
    steps: int = Field(default=10, ge=1, le=1000, description="Number of steps.")
    start: Literal["uniform", "normal", "image"] = Field(
        default="uniform",
        description=(
            "Where the attack starts: uniform in the box of `epsilon`, the image with normal noise"
            " of deviation 0.001 (RSLAD, TRADES), or the image itself."
        ),
    )


def attacked(options: AttackOptions, images: Tensor, harm: Callable[[Tensor], Tensor]) -> Tensor:
    """Change images so that `harm` rises: x <- clip(x + step * sign(gradient of harm at x)).

    All is in pixels: a network normalises what it sees by itself, and the gradient passes that.

    Args:
        options: of the attack.
        images: (B, C, H, W) in [0, 1].
        harm: the scalar that the attack raises; a sum over the images, so that none counts less in
            a large batch.

    Returns:
        (B, C, H, W), constants: |x' - x| <= epsilon / 255 and 0 <= x' <= 1. Where augmentation has
        left a pixel outside of [0, 1], it is moved towards that range only.
    """
    epsilon, step = options.epsilon / LEVELS, options.step / LEVELS
    low = torch.minimum((images - epsilon).clamp_min(0), images)
    high = torch.maximum((images + epsilon).clamp_max(1), images)
    changed = images.detach()
    # the global generators, which follow from the step's place: a run that goes on draws the same
    if options.start == "uniform":
        changed = changed + torch.empty_like(changed).uniform_(-epsilon, epsilon)
    elif options.start == "normal":
        changed = changed + 0.001 * torch.randn_like(changed)
    changed = changed.clamp(low, high)
    for _ in range(options.steps):
        with torch.enable_grad():
            changed.requires_grad_()
            # of the images alone: gradients of the network's parameters stay as they are
            # a view of them, as torch's counter of operations cannot follow a leaf
            (gradient,) = torch.autograd.grad(harm(changed.view_as(changed)), changed)
        changed = (changed.detach() + step * gradient.sign()).clamp(low, high)
    return changed.detach()


def against_labels(student: kdkit.Model, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Cross-entropy of the student's answer on the labels, summed over the images."""
    return lambda images: F.cross_entropy(student(images).logits.float(), labels, reduction="sum")


def against_answers(student: kdkit.Model, logits: Tensor) -> Callable[[Tensor], Tensor]:
    """KL divergence of the student's answer from a teacher's to the clean images, summed."""
    known = logits.float().log_softmax(1)
    return lambda images: F.kl_div(
        student(images).logits.float().log_softmax(1), known, reduction="sum", log_target=True
    )


def images_of(batch: kdkit.Batch) -> Tensor:
    """Return the images of a batch as floating point in [0, 1].

    Raises:
        ShapeError: they are texts.
    """
    images = batch.inputs
    if not isinstance(images, Tensor):
        raise kdkit.ShapeError("an attack changes pixels, and texts have none")
    return images if images.is_floating_point() else images.float() / LEVELS
