"""N-to-one representation matching (NORM): the student's last map is expanded to several guesses of
the teacher's, contracted again, and classified.

Liu, Li, Li, Yao, "NORM: Knowledge Distillation via N-to-One Representation Matching", ICLR 2023,
https://openreview.net/forum?id=CRNwGauQpb6, section 3. In the released code the two convolutions
are part of the student that is trained, so that every loss reads the logits behind them. A loss of
kdkit cannot change the student's forward; therefore this one classifies the contracted map itself,
by the student's own classifier, and holds the two losses of those logits: `labels` is the paper's
0.1, `soft` its factor of the divergence (above 0 for NORM + KD). What is measured, saved and
exported has the convolutions. So it stands alone, with weight 1; another loss on labels or
responses would read logits of the student without them:

    - {use: norm, layers: [{student: stage3, teacher: stage3}]}

As in that code, logits are normalised over the classes and multiplied by 2.5 (`logit_scale`), on
both sides, and in what is deployed too. On CIFAR-100 it changes the factor of the features with the
epoch: 0.1 before 10, 0.5 before 20, 1 before 180, 0.5 before 210, then 0.1. On ImageNet it matches
all stages; here it is the last one.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit

from ._heads import networks, same_classes

LEAST = 1e-7  # of a variance of logits


class ManyToOne(kdkit.Loss):
    """Squared error of the teacher's map from each of several maps that the student's is expanded
    to; cross-entropy, and divergence, of the logits that their contraction gives.

    Formula: features * sum over segments i of mean (E(f_s)_i - f_t)^2 + labels * CE(z, y) + soft *
    T^2 * KL(softmax(z_t / T) || softmax(z / T)), mean over the batch; z = C(mean over positions of
    f_s + R(E(f_s)))

    E is a 1x1 convolution to `segments` times the teacher's channels, R one back to the student's,
    both with batch normalisation and without an activation; C is the student's own classifier. Of
    segments, the error is a mean over all elements; the larger map is max-pooled to the smaller.
    With `logit_scale` above 0, z and z_t are normalised over the classes and multiplied by it. One
    pair of layers, the last maps (B, C, H, W) before the pooling, or tokens of a square grid; the
    student's head must be pooling and a linear layer.
    """

    name = "norm"
    knowledge = "feature"
    needs_teacher_logits = True
    # the student's classifier reads the contracted map
    needs_networks = True

    class Options(kdkit.MapOptions):
        segments: int = Field(
            default=8, ge=1, le=64, description="Number of guesses of the teacher's map, N."
        )
        residual: bool = Field(
            default=True, description="Add the contracted map to the student's, not replace it."
        )
        features: kdkit.Rampable = Field(
            default=1.0, ge=0, description="Factor of the squared error."
        )
        labels: kdkit.Rampable = Field(
            default=0.1, gt=0, description="Factor of the cross-entropy on the labels."
        )
        soft: kdkit.Rampable = Field(
            default=0.0, ge=0, description="Factor of the divergence from the teacher's prediction."
        )
        temperature: kdkit.Rampable = Field(
            default=4.0, gt=0, description="T: softens both predictions in the divergence."
        )
        logit_scale: float = Field(
            default=2.5,
            ge=0,
            le=100,
            description=(
                "Deviation that logits are given, each sample for itself; 0: they stay as they are."
            ),
        )

    options: Options
    expand: nn.Sequential
    contract: nn.Sequential
    student_classifier: tuple[nn.Linear]  # it is the student's part, not the loss's

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        context = networks(self.options, context, "the student's classifier")
        same_classes(student, teacher)
        ((f_s, f_t),) = self.options.pairs(student, teacher)
        whose = f"student '{self.options.layers[0].student}'"
        own = kdkit.pooled_head(context.student_classifier(), f_s, student.logits, whose)
        # a tuple hides it from `parameters()` and `state_dict()`: the student trains and saves it
        self.student_classifier = (own,)
        self.head = next(name for name, part in context.student.named_modules() if part is own)
        width, wide = f_s.shape[1], self.options.segments * f_t.shape[1]
        self.expand, self.contract = block(width, wide), block(wide, width)
        self.outputs = context.outputs

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        o = self.options
        ((f_s, f_t),) = o.pairs(student, teacher)
        expanded = self.expand(f_s)
        contracted = self.contract(expanded)
        z = classified(f_s + contracted if o.residual else contracted, self.student_classifier[0])
        z, z_t = scaled(z, o.logit_scale), scaled(teacher.logits, o.logit_scale)
        log_p, log_q = F.log_softmax(z / o.temperature, 1), F.log_softmax(z_t / o.temperature, 1)
        soft = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        return (
            o.features * error(expanded, f_t, o.segments)
            + o.labels * F.cross_entropy(z, batch.labels)
            + o.soft * o.temperature**2 * soft
        )

    def deploy(self, student: nn.Module) -> nn.Module:
        backbone = kdkit.Backbone(student, self.options.layers[0].student, self.outputs)
        convolutions = nn.Sequential(self.expand, self.contract)
        head = student.get_submodule(self.head)
        assert isinstance(head, nn.Linear)
        return Deployed(backbone, convolutions, head, self.options)


class Deployed(nn.Module):
    """The student with the two convolutions in front of its pooling."""

    def __init__(
        self,
        backbone: nn.Module,
        convolutions: nn.Module,
        classifier: nn.Linear,
        options: ManyToOne.Options,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.convolutions = convolutions
        self.classifier = classifier
        self.residual = options.residual
        self.logit_scale = options.logit_scale

    def forward(self, images: Tensor) -> Tensor:
        f = kdkit.as_map(self.backbone(images))
        contracted = self.convolutions(f)
        f = f + contracted if self.residual else contracted
        return scaled(classified(f, self.classifier), self.logit_scale)


def block(width: int, wanted: int) -> nn.Sequential:
    # no bias, which batch normalisation would take away
    return nn.Sequential(nn.Conv2d(width, wanted, 1, bias=False), kdkit.AnyBatchNorm(wanted))


def error(expanded: Tensor, f_t: Tensor, segments: int) -> Tensor:
    """The sum over segments of the mean squared error of each."""
    size = [min(a, b) for a, b in zip(expanded.shape[2:], f_t.shape[2:], strict=True)]
    expanded, f_t = (
        f if [*f.shape[2:]] == size else F.adaptive_max_pool2d(f, size) for f in (expanded, f_t)
    )
    each = expanded.reshape(len(f_t), segments, *f_t.shape[1:])
    return segments * (each - f_t[:, None]).square().mean()


def classified(f: Tensor, classifier: nn.Linear) -> Tensor:
    """The logits of maps."""
    # features come in fp32 at least, the student's weights in their own type
    bias = None if classifier.bias is None else classifier.bias.to(f.dtype)
    return F.linear(f.mean((2, 3)), classifier.weight.to(f.dtype), bias)


def scaled(z: Tensor, scale: float) -> Tensor:
    """Logits (B, K), normalised by row and multiplied, or as they are for a scale of 0."""
    return scale * F.layer_norm(z, z.shape[1:], eps=LEAST) if scale else z


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [ManyToOne]
