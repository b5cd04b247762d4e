"""One class for each image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import kdkit

from ._classes import Classes


class Classification(Classes):
    """One of K classes for each image; a row is an image.

    Targets are class indices (N,); mixed images have shares of the classes (B, K). Answers are
    logits (B, K). Scores: top-1 (decides) and top-5 accuracy, balanced accuracy, macro F1,
    cross-entropy, and the calibration error of Guo et al. 2017 in 15 bins.
    """

    name = "classification"

    def mixer(self, options: Mapping[str, Any], info: kdkit.DataInfo) -> Any:
        """timm's mixup and cutmix; labels become shares (B, K)."""
        from timm.data import Mixup

        # cross_entropy has label smoothing as an option of its own
        return Mixup(  # type: ignore[no-untyped-call]
            **options, label_smoothing=0.0, num_classes=info.outputs
        )


@kdkit.hookimpl
def kdkit_tasks() -> list[type[kdkit.Task]]:
    return [Classification]
