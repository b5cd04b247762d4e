"""Cross-head distillation: the teacher's head reads what the student's head has made of an image,
and must answer as it does to its own; the student's own answers learn from true boxes alone.

Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR 2024,
arXiv:2306.11369, section 3; alignment by statistics and the weights of boxes as in the released
code. That divides by the number of anchors that answer for true boxes (FCOS: by the sum of their
centre-ness); no true box is read here, and both terms are divided by the sum of the teacher's
scores. The released recipes have layer 3 of 4 and equal weights for RetinaNet, and layer 2 with
weights of 0.4 for classes and 0.75 for boxes (by IoU in place of GIoU) for FCOS.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit

from ..feature._pyramid import PYRAMID
from ..feature._standardised import standardised
from ..tasks import _boxes as boxes
from ..tasks._iou import generalized

ANCHORS = kdkit.LayerPair(student="output2", teacher="output2")


class Branch(NamedTuple):
    """A row of convolutions of a head, for classes or for boxes.

    Attributes:
        front: its modules up to the convolution behind which two heads are joined.
        rest: the whole branch without these; from maps to a tensor of rows, or several.
    """

    front: nn.Sequential
    rest: nn.Module


class CrossHead(kdkit.Loss):
    """Error of the teacher's head on the student's head features, against its own answer.

    Formula: (classes * sum over rows and classes of |p - q|^beta * BCE(z, q) + boxes * sum over
    rows of w * (1 - GIoU(b, b_t))) / max(1, sum over rows of w), over all rows of the batch

    z and b are what the teacher's head makes of the student's features, p = sigmoid(z); q =
    sigmoid(z_t) and b_t the teacher's answer; w the largest q of a row. The student's features are
    those behind convolution `layer` (and its normalisation, before its ReLU) of its own head, for
    classes and for boxes; each channel is given the mean and the deviation that the teacher's has
    there, over the batch and the places of a map, and then passes through the ReLU and the rest of
    the teacher's head. The teacher's head is frozen; gradients pass through it.

    Both detectors have heads as torchvision's FCOS and RetinaNet or `detector/gfl`, of equal width
    on maps (B, C, H, W) of equal sizes; the student's own rows may be others. `layers` are all maps
    that the heads read, from fine to coarse. In several processes, each divides by its own sum of
    w.
    """

    name = "crosskd"
    knowledge = "response"
    tasks = frozenset({"detection"})
    whole_answers = True
    needs_networks = True

    class Options(kdkit.LossOptions):
        layers: tuple[kdkit.LayerPair, ...] = Field(
            default=PYRAMID,
            min_length=1,
            description="Maps that the heads read (default: those of torchvision's pyramid).",
        )
        layer: int = Field(
            default=3,
            ge=0,
            description=(
                "Number of convolutions of the student's head in front of the teacher's; 0: the"
                " teacher's head reads the student's maps."
            ),
        )
        beta: float = Field(
            default=1.0,
            ge=1,
            description="How much rows count on which both already agree: less for more.",
        )
        classes: float = Field(default=1.0, ge=0, description="Weight of the classes.")
        boxes: float = Field(default=1.0, ge=0, description="Weight of the boxes.")

        def taps(self) -> Sequence[kdkit.LayerPair]:
            # `layers` may have been set to what this gives, with globs expanded
            return [*self.maps(), ANCHORS]

        def maps(self) -> Sequence[kdkit.LayerPair]:
            """Return the layers that heads read."""
            return [pair for pair in self.layers if pair != ANCHORS]

    options: Options

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        if context is None or context.teacher is None:
            raise kdkit.ShapeError("it needs the heads of both networks, and there is no teacher")
        boxes.refuse_other_classes(student.logits, teacher.logits)
        network: Any = context.teacher
        ours, theirs = (
            branches(whole, self.options.layer, whose)
            for whole, whose in ((context.student, "student"), (network, "teacher"))
        )
        # in a tuple: networks of the context are no part of the loss
        self.parts = (ours, theirs, network)
        self._refuse_other_maps(student, teacher)
        head = network.head.classification_head
        if head.num_classes != teacher.logits.shape[2] - boxes.CLASSES.start:
            raise kdkit.ShapeError(
                f"the teacher's head has {head.num_classes} classes, of which its answer shows only"
                " some; take a teacher of the data's classes"
            )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        ours, theirs, network = self.parts
        pairs = [
            (student.features[pair.student], teacher.features[pair.teacher])
            for pair in self.options.maps()
        ]
        logits, deltas = (cross(*both, pairs) for both in zip(ours, theirs, strict=True))
        b_t, z_t = (teacher.logits[..., part] for part in (boxes.BOX, boxes.CLASSES))
        q = z_t.sigmoid()
        weights = q.amax(2)
        focus = (logits.sigmoid() - q).abs().pow(self.options.beta)
        # the cross-entropy from logits: a logarithm of a rounded sigmoid would be infinite
        of_classes = (focus * (F.softplus(logits) - logits * q)).sum()
        corners = network.corners(deltas, teacher.features[ANCHORS.teacher].to(deltas))
        of_boxes = (weights * (1 - generalized(corners, b_t))).sum()
        value = self.options.classes * of_classes + self.options.boxes * of_boxes
        return value / weights.sum().clamp_min(1)

    def _refuse_other_maps(self, student: kdkit.Outputs, teacher: kdkit.Outputs) -> None:
        """Refuse maps that the teacher's head cannot take in the student's place, or that are not
        all of them.

        Raises:
            ShapeError: they are.
        """
        places = 0
        for pair in self.options.maps():
            f_s, f_t = student.features[pair.student], teacher.features[pair.teacher]
            if f_s.ndim != 4 or f_s.shape != f_t.shape:
                raise kdkit.ShapeError(
                    f"student '{pair.student}' {tuple(f_s.shape)} and teacher '{pair.teacher}'"
                    f" {tuple(f_t.shape)} must be maps of one shape: heads of equal width on images"
                    " of equal size"
                )
            places += f_t.shape[2] * f_t.shape[3]
        anchors = self.parts[2].head.classification_head.num_anchors
        if places * anchors != teacher.logits.shape[1]:
            raise kdkit.ShapeError(
                f"the teacher's answer has {teacher.logits.shape[1]:,} rows, and its maps in"
                f" `layers` make {places * anchors:,}; name all maps that its head reads"
            )


def cross(ours: Branch, theirs: Branch, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Compute what the rest of the teacher's branch makes of the student's features, as rows
    (B, A, ...).
    """
    joined = []
    for map_s, map_t in pairs:
        with torch.no_grad():
            f_t = theirs.front(map_t)
        joined.append(with_statistics(ours.front(map_s), f_t))
    found = theirs.rest(joined)
    # FCOS's head for boxes also gives their quality
    rows: Tensor = found[0] if isinstance(found, tuple) else found
    return rows


def with_statistics(f_s: Tensor, f_t: Tensor) -> Tensor:
    """Give each channel of f_s, (B, C, H, W), the mean and the deviation that it has in f_t."""
    mean = f_t.mean((0, 2, 3), keepdim=True)
    count = f_t.numel() // f_t.shape[1]
    # a single value has no variance: 0 / 1, not 0 / 0
    variance = (f_t - mean).square().sum((0, 2, 3), keepdim=True) / max(count - 1, 1)
    return standardised(f_s) * variance.sqrt() + mean


def branches(network: nn.Module, layer: int, whose: str) -> tuple[Branch, Branch]:
    """Divide the branches of a detector's head behind a convolution: classes, boxes.

    Args:
        network: the detector.
        layer: number of convolutions in front.
        whose: begins the message: "teacher".

    Raises:
        ShapeError: it has no such head, or fewer convolutions.
    """
    head = getattr(network, "head", None)
    parts = [getattr(head, f"{name}_head", None) for name in ("classification", "regression")]
    if not all(isinstance(getattr(part, "conv", None), nn.Sequential) for part in parts):
        raise kdkit.ShapeError(
            f"the {whose}, {type(network).__name__}, has no head of convolutions for classes and"
            " for boxes; take `detector/fcos`, `detector/retinanet`, or torchvision's FCOS or"
            " RetinaNet"
        )
    classes, corners = (_divided(part, layer, whose) for part in parts)
    return classes, corners


def _divided(branch: Any, layer: int, whose: str) -> Branch:
    modules = list(_leaves(branch.conv))
    ends = [place for place, module in enumerate(modules) if isinstance(module, nn.ReLU)]
    if layer > len(ends):
        raise kdkit.ShapeError(
            f"`layer: {layer}` is too many: the {whose}'s head has {len(ends)} convolutions"
        )
    # each convolution, with its normalisation, ends in a ReLU, which belongs to the rest
    end = ends[layer - 1] if layer else 0
    # shallow: the rest shares its weights with the network
    rest = copy.copy(branch)
    rest._modules = {**branch._modules, "conv": nn.Sequential(*modules[end:])}
    return Branch(nn.Sequential(*modules[:end]), rest)


def _leaves(row: nn.Sequential) -> Iterator[nn.Module]:
    """Yield the modules of a row, those of rows in it among them."""
    for module in row:
        if isinstance(module, nn.Sequential):
            yield from _leaves(module)
        else:
            yield module


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [CrossHead]
