"""torchvision's detectors as networks from images to one tensor of boxes and classes.

In torchvision, a detector resizes and normalises its images itself, returns losses in training and
lists of detections otherwise. Here images arrive as the recipe prepares them, and every answer is
(B, A, 5 + K), as task `detection` describes it; losses are computed from the answer (`losses`), and
the task chooses detections. Weights have torchvision's names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

import kdkit

Targets = Sequence[Mapping[str, Tensor]]
"""Of each image, `boxes` (M, 4), x0, y0, x1, y1 in pixels, and `labels` (M,) from 0."""
Terms = dict[str, Tensor]
"""torchvision's losses, by its names; under `COUNT`, the number of rows that they are divided by
(1 if there are none), unless they are means over images.
"""
COUNT = "count"

CERTAIN = 30.0
"""Logit of a probability that is 1 in fp32."""


class Detector:
    """What all detectors share, beside a class of torchvision.

    A forward returns `logits`, the answer; `raw`, what `losses` needs of the forward; `anchors`
    (B, A, 4), x0, y0, x1, y1.
    """

    backbone: nn.Module
    grids: dict[str, tuple[int, int]]
    """(h, w) of the maps of the last forward, which depend on the size of its images alone."""
    background: int = 0
    """Number of classes that stand for none, in front of those of the data."""
    not_in_onnx: str | None = None
    """Why ONNX cannot express it, if it cannot."""
    remark: str | None = None
    """What a message about a layer that it lacks adds."""

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return the maps of the feature pyramid, the finest first."""
        found = self.backbone(images)
        found = {"0": found} if isinstance(found, Tensor) else found
        self.grids = {name: (f.shape[-2], f.shape[-1]) for name, f in found.items()}
        return dict(found)

    def anchors(self, images: Tensor, maps: Iterable[Tensor]) -> Tensor:
        """Return the anchors (B, A, 4) in fp32, equal in all images."""
        only_one = ImageList(images[:1], [(images.shape[-2], images.shape[-1])])
        (anchors,) = self._generator()(only_one, [f.float() for f in maps])
        boxes: Tensor = anchors.expand(images.shape[0], -1, -1)
        return boxes

    def anchors_at_a_place(self) -> list[int]:
        """Return how many anchors each place of a map has, for each map, the finest first."""
        counts: list[int] = self._generator().num_anchors_per_location()
        return counts

    def corners(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Return the boxes of what the head gives, (B, A, 4)."""
        return _decoded(self.box_coder, deltas, anchors)  # type: ignore[attr-defined]

    def _generator(self) -> Any:
        return self.anchor_generator  # type: ignore[attr-defined]

    def losses(
        self, raw: Tensor, anchors: Tensor, size: tuple[int, int], targets: Targets
    ) -> Terms:
        """Compute torchvision's losses of an answer.

        Args:
            raw: that output of the forward.
            anchors: that output, too.
            size: (H, W) of the images.
            targets: of each image.
        """
        raise NotImplementedError

    def _labels(self, targets: Targets) -> list[dict[str, Tensor]]:
        return [
            {"boxes": each["boxes"], "labels": each["labels"] + self.background} for each in targets
        ]


class Fcos(Detector, FCOS):  # type: ignore[misc]
    """FCOS (Tian et al., ICCV 2019, arXiv:1904.01355): a row is a point."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = [*self.maps(images).values()]
        head = {name: value.float() for name, value in self.head(maps).items()}
        anchors = self.anchors(images, maps)
        deltas, quality, classes = (
            head[name] for name in ("bbox_regression", "bbox_ctrness", "cls_logits")
        )
        corners = self.corners(deltas, anchors)
        return {
            "logits": torch.cat([corners, quality, classes], dim=2),
            "raw": torch.cat([deltas, quality, classes], dim=2),
            "anchors": anchors,
        }

    def corners(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        boxes: Tensor = self.box_coder.decode(deltas, anchors)
        return boxes

    def losses(
        self, raw: Tensor, anchors: Tensor, size: tuple[int, int], targets: Targets
    ) -> Terms:
        """Each is divided by the number of points that answer for an object."""
        head = {
            "bbox_regression": raw[..., :4],
            "bbox_ctrness": raw[..., 4:5],
            "cls_logits": raw[..., 5:],
        }
        counts = [height * width for height, width in self.grids.values()]
        terms: Terms = self.compute_loss([*targets], head, [*anchors], counts)
        return terms


class FcosHead(FCOSHead):  # type: ignore[misc]
    """torchvision's head of FCOS, which tells what its losses are divided by."""

    def compute_loss(
        self,
        targets: Any,
        head_outputs: Any,
        anchors: Any,
        matched_idxs: Sequence[Tensor],
    ) -> Terms:
        """Add the number of points that answer for an object."""
        terms = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        return {**terms, COUNT: _count(matched_idxs)}


class Retina(Detector, RetinaNet):  # type: ignore[misc]
    """RetinaNet (Lin et al., ICCV 2017, arXiv:1708.02002): a row is an anchor."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = [*self.maps(images).values()]
        head = {name: value.float() for name, value in self.head(maps).items()}
        anchors = self.anchors(images, maps)
        deltas, classes = head["bbox_regression"], head["cls_logits"]
        corners = self.corners(deltas, anchors)
        return {
            "logits": without_quality(corners, classes),
            "raw": torch.cat([deltas, classes], dim=2),
            "anchors": anchors,
        }

    def losses(
        self, raw: Tensor, anchors: Tensor, size: tuple[int, int], targets: Targets
    ) -> Terms:
        """Means over the images of each one's losses."""
        head = {"bbox_regression": raw[..., :4], "cls_logits": raw[..., 4:]}
        terms: Terms = self.compute_loss([*targets], head, [*anchors])
        return terms


class Ssd(Detector, SSD):  # type: ignore[misc]
    """SSD (Liu et al., ECCV 2016, arXiv:1512.02325): a row is an anchor.

    Its classes exclude one another and the background; the logit of a class is that of its
    probability, z_k - log sum_(j != k) exp(z_j).
    """

    background = 1

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = [*self.maps(images).values()]
        head = {name: value.float() for name, value in self.head(maps).items()}
        anchors = self.anchors(images, maps)
        deltas, classes = head["bbox_regression"], head["cls_logits"]
        corners = self.corners(deltas, anchors)
        return {
            "logits": without_quality(corners, _against_others(classes)[..., 1:]),
            "raw": torch.cat([deltas, classes], dim=2),
            "anchors": anchors,
        }

    def losses(
        self, raw: Tensor, anchors: Tensor, size: tuple[int, int], targets: Targets
    ) -> Terms:
        """Each is divided by the number of anchors that answer for an object."""
        wanted = self._labels(targets)
        head = {"bbox_regression": raw[..., :4], "cls_logits": raw[..., 4:]}
        matched = [
            self.proposal_matcher(box_iou(each["boxes"], boxes))
            if len(each["boxes"])
            else boxes.new_full((len(boxes),), -1, dtype=torch.int64)
            for each, boxes in zip(wanted, anchors, strict=True)
        ]
        terms: Terms = self.compute_loss(wanted, head, [*anchors], matched)
        return {**terms, COUNT: _count(matched)}


class FasterRcnn(Detector, FasterRCNN):  # type: ignore[misc]
    """Faster R-CNN (Ren et al., NeurIPS 2015, arXiv:1506.01497).

    A row is a detection of its second stage, with one certain class. In training, rows are the
    anchors of its first stage, which knows no classes: all classes have the logit of an object.
    """

    background = 1
    not_in_onnx = (
        "Faster R-CNN's second stage reads as many boxes as its first one finds in an image; export"
        " FCOS, RetinaNet or SSD, or its weights (`--format timm`)"
    )

    remark = (
        "rows of Faster R-CNN are detections, not anchors or points: it teaches by `pseudo_labels`"
        " and by maps that `layers` names, not by `score_weighted`, `crosskd` or row by row"
    )

    def _generator(self) -> Any:
        return self.rpn.anchor_generator

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.maps(images)
        if self.training:
            return self._proposed(images, maps)
        size = (images.shape[-2], images.shape[-1])
        sizes = [size] * len(images)
        # in fp32, as coordinates need it
        maps = {name: f.float() for name, f in maps.items()}
        proposals, _ = self.rpn(ImageList(images, sizes), maps)
        found, _ = self.roi_heads(maps, proposals, sizes)
        classes = self.roi_heads.box_predictor.cls_score.out_features - self.background
        rows = [_certain(each, classes, self.roi_heads.detections_per_img) for each in found]
        answer = torch.stack(rows)
        return {"logits": answer, "raw": _flat(maps), "anchors": answer[..., :4]}

    def _proposed(self, images: Tensor, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        objects, deltas = concat_box_prediction_layers(*self.rpn.head([*maps.values()]))
        anchors = self.anchors(images, maps.values())
        corners = _decoded(self.rpn.box_coder, deltas.float().view_as(anchors), anchors)
        classes = self.roi_heads.box_predictor.cls_score.out_features - self.background
        logits = objects.float().view(*anchors.shape[:2], 1).expand(-1, -1, classes)
        return {"logits": without_quality(corners, logits), "raw": _flat(maps), "anchors": anchors}

    def losses(
        self, raw: Tensor, anchors: Tensor, size: tuple[int, int], targets: Targets
    ) -> Terms:
        """Those of both stages, over anchors and proposals that are drawn."""
        counts = [height * width for height, width in self.grids.values()]
        flat = zip(torch.split(raw, counts, dim=1), self.grids.items(), strict=True)
        maps = {name: f.transpose(1, 2).reshape(len(f), -1, *grid) for f, (name, grid) in flat}
        wanted = self._labels(targets)
        images = ImageList(raw.new_empty((len(raw), 3, *size)), [size] * len(raw))
        proposals, first = self.rpn(images, maps, wanted)
        _, second = self.roi_heads(maps, proposals, images.image_sizes, wanted)
        return {**first, **second}


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    FCOS: Fcos,
    RetinaNet: Retina,
    SSD: Ssd,
    FasterRCNN: FasterRcnn,
}


def as_network(detector: nn.Module) -> nn.Module:
    """Let a detector of torchvision answer with one tensor; its weights stay as they are.

    Raises:
        ModelError: it is of another kind.
    """
    if isinstance(detector, Detector):
        return detector
    if type(detector) not in CLASSES:
        known = ", ".join(cls.__name__ for cls in CLASSES)
        raise kdkit.ModelError(f"{type(detector).__name__} is no detector of these: {known}")
    detector.__class__ = CLASSES[type(detector)]
    if isinstance(head := getattr(detector, "head", None), FCOSHead):
        head.__class__ = FcosHead
    return detector


def background(name: str) -> int:
    """Return the number of classes that stand for none in a detector of torchvision."""
    return 0 if name.startswith(("fcos", "retinanet")) else 1


def _count(matched: Sequence[Tensor]) -> Tensor:
    """Count the rows that answer for an object."""
    return torch.stack([(rows >= 0).sum() for rows in matched]).sum()


def _decoded(coder: Any, deltas: Tensor, anchors: Tensor) -> Tensor:
    """Decode offsets (B, A, 4) from anchors to boxes."""
    boxes: Tensor = coder.decode_single(deltas.flatten(0, 1), anchors.flatten(0, 1))
    return boxes.view_as(deltas)


def without_quality(corners: Tensor, classes: Tensor) -> Tensor:
    """Put boxes and classes together, of a detector that knows no quality."""
    quality = corners.new_full((*corners.shape[:2], 1), CERTAIN)
    return torch.cat([corners, quality, classes], dim=2)


def _against_others(logits: Tensor) -> Tensor:
    """Turn logits of classes that exclude one another into the logit of each one's probability."""
    log_p = logits.log_softmax(-1)
    # clamp: a probability that rounds to 1 has no finite logit
    return log_p - (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).eps).log()


def _certain(found: Mapping[str, Tensor], classes: int, count: int) -> Tensor:
    """Turn the detections of an image into `count` rows, each with one class; empty rows are boxes
    of no size without any class.
    """
    boxes, scores, labels = found["boxes"], found["scores"], found["labels"]
    rows = boxes.new_zeros((count, 5 + classes))
    rows[:, 4], rows[:, 5:] = CERTAIN, -CERTAIN
    number = torch.arange(len(boxes), device=boxes.device)
    rows[: len(boxes), :4] = boxes
    rows[number, 4 + labels] = scores.logit(eps=1e-6)
    return rows


def _flat(maps: Mapping[str, Tensor]) -> Tensor:
    """Put maps (B, C, h, w) behind one another, (B, sum h w, C)."""
    return torch.cat([f.flatten(2).transpose(1, 2) for f in maps.values()], dim=1)
