"""Reused classifier: the student learns to give the teacher's last features, and the teacher's
classifier decides for it.

Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", CVPR 2022,
arXiv:2203.14001, section 3; projector (reduction factor 2), pooling and reduction as in the
released code. What is measured, saved and exported is the student's backbone, the projector and the
teacher's classifier; the student's own classifier takes no part. The teacher's head is checked, not
assumed, to be pooling and a linear layer.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit

from ._heads import networks


class ReusedClassifier(kdkit.Loss):
    """Mean squared error of the teacher's last map, predicted from the student's by a learnt
    projector P.

    Formula: (P(f_s) - f_t)^2, mean over all elements

    P is a 1x1, a 3x3 and a 1x1 convolution, each with batch normalisation and ReLU. One pair of
    layers, the last maps (B, C, H, W) before the pooling, or tokens of a square grid; the larger
    map is average-pooled to the smaller, the student's before P, and a deployed student does the
    same. P suits maps that are not negative, as behind a ReLU.
    """

    name = "simkd"
    knowledge = "feature"
    # by them it is checked that the teacher's head is pooling and a linear layer
    needs_teacher_logits = True
    # a deployed student has the teacher's classifier
    needs_networks = True

    class Options(kdkit.MapOptions):
        factor: int = Field(
            default=2,
            ge=1,
            le=64,
            description="The projector's inner width is the teacher's channels divided by this.",
        )

    options: Options
    projector: nn.Sequential
    classifier: nn.Linear

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        context = networks(self.options, context, "the teacher's classifier")
        ((f_s, f_t),) = self.options.pairs(student, teacher)
        layer = self.options.layers[0].teacher
        # a frozen copy, which a deployed student takes along
        self.classifier = kdkit.pooled_head(
            context.teacher_classifier(), f_t, teacher.logits, f"teacher '{layer}'"
        )
        wide = f_t.shape[1]
        # a large factor would leave a narrow teacher no channel
        inner = max(wide // self.options.factor, 1)
        self.projector = nn.Sequential(
            *block(f_s.shape[1], inner, 1), *block(inner, inner, 3), *block(inner, wide, 1)
        )
        self.size = (f_t.shape[2], f_t.shape[3])
        self.num_classes = context.outputs

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        ((f_s, f_t),) = self.options.pairs(student, teacher)
        f_s, f_t = kdkit.pooled_alike(f_s, f_t)
        return F.mse_loss(self.projector(f_s), f_t)

    def deploy(self, student: nn.Module) -> nn.Module:
        backbone = kdkit.Backbone(student, self.options.layers[0].student, self.num_classes)
        return Deployed(backbone, self.projector, self.classifier, self.size)


class Deployed(nn.Module):
    """The student's backbone, the projector and the teacher's classifier; `size` is that of the
    teacher's maps.
    """

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        classifier: nn.Module,
        size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.classifier = classifier
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        f = kdkit.as_map(self.backbone(images))
        # what `pooled_alike` did in training, without the teacher's map
        size = min(f.shape[2], self.size[0]), min(f.shape[3], self.size[1])
        f = f if tuple(f.shape[2:]) == size else F.adaptive_avg_pool2d(f, size)
        logits: Tensor = self.classifier(self.projector(f).mean((2, 3)))
        return logits


def block(channels: int, width: int, kernel: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False),
        kdkit.AnyBatchNorm(width),
        nn.ReLU(),
    ]


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [ReusedClassifier]
