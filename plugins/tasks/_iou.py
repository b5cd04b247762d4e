"""How boxes x0, y0, x1, y1 overlap, with gradients that are finite for boxes without an area."""

import torch
from torch import Tensor

LEAST_AREA = 1e-2
"""Square pixels; a smaller area is divided by as if it were this large."""


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """Compute the IoU of boxes (..., 4) that are broadcast against each other."""
    common, union = _areas(a, b)
    return common / union.clamp_min(LEAST_AREA)


def generalized(a: Tensor, b: Tensor) -> Tensor:
    """Compute the GIoU of pairs of boxes (..., 4), between -1 and 1.

    Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019, arXiv:1902.09630.
    torchvision's selects by a mask, which waits for the device.
    """
    common, union = _areas(a, b)
    hull = _area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    iou = common / union.clamp_min(LEAST_AREA)
    return iou - (hull - union) / hull.clamp_min(LEAST_AREA)


def _areas(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the areas of intersection and union."""
    common = _area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    whole = _area(a[..., :2], a[..., 2:]) + _area(b[..., :2], b[..., 2:])
    return common, whole - common


def _area(first: Tensor, last: Tensor) -> Tensor:
    # not `prod`, whose gradient counts zeros on the host
    width, height = (last - first).clamp_min(0).unbind(-1)
    return width * height
