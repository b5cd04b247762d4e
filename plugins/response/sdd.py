"""Scale-decoupled distillation (SDD): parts of the image are classified too, by each network's own
classifier, and the student's answer to each part follows the teacher's.

Wei, Luo, Luo, "Scaled Decoupled Distillation", CVPR 2024, arXiv:2403.13512, section 3. The paper
takes it with KD (0.9, beside a cross-entropy of 0.1), DKD or NKD (1, ramped from 0 over 20 epochs,
beside a cross-entropy of 1), with grids of 1, 2 and 4 or of 1 and 2. In the released code the
coarser grids are pooled from the finest, which for sides that are no multiple of it are not the
network's own logits; here each is pooled from the map. In its NKD, the label stays among the other
classes, by a mask that holds none back; here it is left out. How often the two answers disagree is
measured against the teacher's own answer to the whole image.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit

from ..feature._heads import classifiers
from ._classes import log_probabilities, others

Inner = Literal["logit_kl", "dkd", "nkd"]


class ScaleDecoupled(kdkit.Loss):
    """A response loss of each part of the image, twice where part and whole are not both right.

    Formula: sum over cells of w * inner(C_s(pool(f_s)), C_t(pool(f_t))) / cells, mean over the
    batch, in nats

    Cells are those of adaptive average pooling to g x g, for each g of `grids`; C_s and C_t are the
    networks' own classifiers, the teacher's frozen. w = 2 where the teacher's answer to the cell is
    right and that to the whole image is wrong, or the other way about, else 1. `inner`:
    `logit_kl`: T^2 * KL(q || p), softmaxes at T; `dkd`: T^2 * (alpha * TCKD + beta * NCKD); `nkd`:
    -alpha * q_y log p_y - beta * T^2 * sum_{c != y} q'_c log p'_c, as in the losses of these names.
    One pair of layers, the last maps (B, C, H, W) before the pooling, or tokens of a square grid;
    both networks' heads must be pooling and a linear layer, over the same K classes.
    """

    name = "sdd"
    knowledge = "response"
    tasks = frozenset({"classes of samples"})
    # the cells are classified by the networks' own classifiers
    needs_networks = True
    exceptions = {
        "check_reads_every_layer": "the teacher's logits are computed from its layer, cell by cell",
    }

    class Options(kdkit.MapOptions):
        inner: Inner = Field(
            default="logit_kl", description="Loss of each cell: `logit_kl`, `dkd` or `nkd`."
        )
        grids: tuple[Annotated[int, Field(ge=1, le=16)], ...] = Field(
            default=(1, 2, 4),
            min_length=1,
            description="Cells along each side of the image, for each scale.",
        )
        temperature: kdkit.Rampable = Field(
            default=4.0, gt=0, description="T: softens the distributions; `nkd` is meant for 1."
        )
        alpha: kdkit.Rampable = Field(
            default=1.0, ge=0, description="Factor of the part on the label, of `dkd` and `nkd`."
        )
        beta: kdkit.Rampable = Field(
            default=8.0,
            ge=0,
            description=(
                "Factor of the part on the other classes, of `dkd` and `nkd`; `nkd` is meant for"
                " 1.5."
            ),
        )

    options: Options
    teacher_classifier: nn.Linear
    student_classifier: tuple[nn.Linear]  # it is the student's part, not the loss's

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        own, self.teacher_classifier = classifiers(self.options, student, teacher, context)
        # a tuple hides it from `parameters()` and `state_dict()`: the student trains and saves it
        self.student_classifier = (own,)
        if own.out_features < 2:
            raise kdkit.ShapeError("one class leaves none beside the label; two are needed")

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        ((f_s, f_t),) = self.options.pairs(student, teacher)
        own = self.student_classifier[0]
        bias = None if own.bias is None else own.bias.to(f_s.dtype)
        # features come in fp32 at least, the student's weights in their own type
        z_s = F.linear(cells(f_s, self.options.grids), own.weight.to(f_s.dtype), bias)
        z_t = self.teacher_classifier(cells(f_t, self.options.grids))
        # not the teacher's logits, which may have been rounded in another way than those of cells
        whole = self.teacher_classifier(kdkit.as_vectors(f_t))
        y = batch.classes
        differs = (z_t.argmax(2) == y) != (whole.argmax(1) == y)
        labels = y.expand(len(z_s), -1).flatten()
        each = INNER[self.options.inner](z_s.flatten(0, 1), z_t.flatten(0, 1), labels, self.options)
        value: Tensor = ((1 + differs.flatten()) * each).mean()
        return value


def cells(f: Tensor, grids: tuple[int, ...]) -> Tensor:
    """Maps (B, C, H, W) to the mean of each cell, (cells, B, C), scale by scale."""
    pooled = [F.adaptive_avg_pool2d(f, grid).flatten(2) for grid in grids]
    return torch.cat(pooled, 2).movedim(2, 0)


def logit_kl(z_s: Tensor, z_t: Tensor, y: Tensor, options: Any) -> Tensor:
    """The divergence of each row."""
    t: float = options.temperature
    return t**2 * divergence((z_s / t).log_softmax(1), (z_t / t).log_softmax(1))


def dkd(z_s: Tensor, z_t: Tensor, y: Tensor, options: Any) -> Tensor:
    """The decoupled divergences of each row."""
    t = options.temperature
    label_s, others_s = log_probabilities(z_s / t, y)
    label_t, others_t = log_probabilities(z_t / t, y)
    tckd, nckd = divergence(label_s, label_t), divergence(others_s, others_t)
    value: Tensor = t**2 * (options.alpha * tckd + options.beta * nckd)
    return value


def nkd(z_s: Tensor, z_t: Tensor, y: Tensor, options: Any) -> Tensor:
    """The normalised cross-entropies of each row."""
    t = options.temperature
    label = (z_t.softmax(1) * z_s.log_softmax(1)).gather(1, y[:, None]).squeeze(1)
    soft = others(z_t / t, y).softmax(1)
    rest = (soft * others(z_s / t, y).log_softmax(1)).sum(1)
    value: Tensor = -options.alpha * label - options.beta * t**2 * rest
    return value


INNER: dict[Inner, Callable[[Tensor, Tensor, Tensor, Any], Tensor]] = {
    "logit_kl": logit_kl,
    "dkd": dkd,
    "nkd": nkd,
}


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) of each row."""
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [ScaleDecoupled]
