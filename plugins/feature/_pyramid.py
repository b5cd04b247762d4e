"""The maps of a feature pyramid that losses on detectors compare, unless a recipe names others."""

import kdkit

NAMES = ("layer_blocks.*", "extra_blocks.p6", "extra_blocks.p7")
PYRAMID = tuple(
    kdkit.LayerPair(student=f"backbone.fpn.{name}", teacher=f"backbone.fpn.{name}")
    for name in NAMES
)
"""All maps of torchvision's pyramid in its FCOS and RetinaNet, from fine to coarse."""
