"""A detector whose boxes are distributions: generalized focal loss on the points of FCOS.

Li et al., "Generalized Focal Loss: Learning Qualified and Distributed Bounding Boxes for Dense
Object Detection", NeurIPS 2020, arXiv:2006.04388, section 3. A class score is the IoU that the
point's box has with an object of that class; each side of a box is a distribution over `bins` + 1
distances. Which points answer for an object is decided as in torchvision's FCOS, by the object's
size and centre, where the paper has ATSS; distances are in strides, without a factor for each map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead

from ..tasks._iou import generalized, overlaps
from ._detectors import Detector, Targets, Terms, without_quality

SIDES = 4
QUALITY_BETA = 2.0
BOX_WEIGHT = 2.0
DISTRIBUTION_WEIGHT = 0.25


class Distributions(FCOSRegressionHead):  # type: ignore[misc]
    """Convolutions from maps to logits of distances, (B, A, 4 * (bins + 1))."""

    def __init__(self, channels: int, bins: int) -> None:
        super().__init__(channels, num_anchors=1)
        del self.bbox_ctrness
        self.bbox_reg = nn.Conv2d(channels, SIDES * (bins + 1), 3, padding=1)
        for weight, spread in zip(self.bbox_reg.parameters(), (0.01, 0.0), strict=True):
            nn.init.normal_(weight, std=spread)

    def forward(self, maps: list[Tensor]) -> Tensor:
        found = [self.bbox_reg(self.conv(f)) for f in maps]
        return torch.cat([f.flatten(2).transpose(1, 2) for f in found], dim=1)


class GflHead(nn.Module):
    """Two branches: the class scores of points, and the distributions of their boxes' sides."""

    def __init__(self, channels: int, classes: int, bins: int) -> None:
        super().__init__()
        self.classification_head = FCOSClassificationHead(channels, 1, classes)
        self.regression_head = Distributions(channels, bins)
        self.bins = bins
        self.coder = BoxLinearCoder(normalize_by_size=True)

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        return {
            "cls_logits": self.classification_head(maps),
            "bbox_regression": self.regression_head(maps),
        }

    def distances(self, logits: Tensor) -> Tensor:
        """Return the expected distances (..., 4) of distributions (..., 4 * (bins + 1))."""
        p = logits.reshape(*logits.shape[:-1], SIDES, self.bins + 1).softmax(-1)
        return torch.matmul(p, torch.arange(self.bins + 1, device=p.device, dtype=p.dtype))

    def compute_loss(
        self,
        targets: Targets,
        outputs: Mapping[str, Tensor],
        anchors: Sequence[Tensor],
        matched: Sequence[Tensor],
    ) -> Terms:
        """Compute the terms, with the paper's weights.

        Args:
            targets: of each image.
            outputs: of this head.
            anchors: of each image, (A, 4).
            matched: of each image, the number of the object that a point answers for, (A,); -1 if
                there is none.
        """
        answers = torch.stack([*matched]) >= 0
        boxes, labels = (
            torch.cat([t[name][m[m >= 0]] for t, m in zip(targets, matched, strict=True)])
            for name in ("boxes", "labels")
        )
        points, logits = torch.stack([*anchors])[answers], outputs["bbox_regression"][answers]
        corners = self.coder.decode(self.distances(logits), points)
        classes = outputs["cls_logits"]
        quality = torch.zeros_like(classes)
        found = overlaps(corners.detach(), boxes).to(quality)
        quality[answers] = F.one_hot(labels, classes.shape[-1]).to(quality) * found[:, None]
        # points that are sure of a class have more weight
        weights = classes[answers].detach().sigmoid().amax(-1)
        weights = weights / weights.sum().clamp_min(1)
        wanted = self.coder.encode(points, boxes).clamp(0, self.bins - 0.1)
        return {
            "classification": quality_focal_loss(classes, quality) / max(1, len(boxes)),
            "bbox_regression": BOX_WEIGHT * (weights @ (1 - generalized(corners, boxes))),
            "bbox_distribution": DISTRIBUTION_WEIGHT * (weights @ self._spread(logits, wanted)),
        }

    def _spread(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """Cross-entropy (P,) of the two bins beside each distance, mean over the sides.

        Args:
            logits: (P, 4 * (bins + 1)).
            wanted: distances (P, 4), below `bins`.
        """
        log_p = logits.reshape(len(logits), SIDES, self.bins + 1).log_softmax(-1)
        below = wanted.long()
        share = wanted - below
        low, high = (log_p.gather(-1, place[..., None])[..., 0] for place in (below, below + 1))
        errors: Tensor = -((1 - share) * low + share * high).mean(-1)
        return errors


def quality_focal_loss(logits: Tensor, quality: Tensor) -> Tensor:
    """Sum of the errors of class scores (B, A, K) against the qualities that they should be."""
    focus = (logits.sigmoid() - quality).abs().pow(QUALITY_BETA)
    return (focus * F.binary_cross_entropy_with_logits(logits, quality, reduction="none")).sum()


class Gfl(Detector, FCOS):  # type: ignore[misc]
    """The detector of the generalized focal loss; a row is a point.

    `raw` is (B, A, 4 * (bins + 1) + K): logits of the distances from the point to x0, y0, x1, y1 in
    strides, then logits of the classes.
    """

    def __init__(self, backbone: Any, classes: int, points: Any, bins: int) -> None:
        head = GflHead(backbone.out_channels, classes, bins)
        super().__init__(backbone, classes, anchor_generator=points, head=head)

    @property
    def bins(self) -> int:
        """Largest distance of a side from its point, in strides."""
        bins: int = self.head.bins
        return bins

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = [*self.maps(images).values()]
        head = {name: value.float() for name, value in self.head(maps).items()}
        anchors = self.anchors(images, maps)
        distributions, classes = head["bbox_regression"], head["cls_logits"]
        return {
            "logits": without_quality(self.corners(distributions, anchors), classes),
            "raw": torch.cat([distributions, classes], dim=2),
            "anchors": anchors,
        }

    def corners(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        boxes: Tensor = self.box_coder.decode(self.head.distances(deltas), anchors)
        return boxes

    def losses(
        self, raw: Tensor, anchors: Tensor, size: tuple[int, int], targets: Targets
    ) -> Terms:
        """Classes are divided by the number of points that answer for an object, the other terms by
        the sum of their scores, at least 1.
        """
        width = SIDES * (self.bins + 1)
        head = {"bbox_regression": raw[..., :width], "cls_logits": raw[..., width:]}
        counts = [height * width for height, width in self.grids.values()]
        terms: Terms = self.compute_loss([*targets], head, [*anchors], counts)
        return terms
