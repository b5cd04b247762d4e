"""Wasserstein distillation of logits (WKD-L): probability moves from the student's classes to
the teacher's, cheaply between like ones.

Lv, Yang, Li, "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation",
NeurIPS 2024, arXiv:2412.08139. As in the released code, the label has a term of its own and
transport is among the other classes, by a fixed number of Sinkhorn steps that the gradient passes
through. That code adds 1e-8 to every Sinkhorn divisor and to the costs and still is lost where
probabilities vanish; here logarithms keep all of it. The last step, which fits the student's side,
is put in closed form.

How alike classes are comes from the teacher's classifier, that code's `fc` variant, or with `cost:
cka`, the published one, from its answers to training images of each class. That code takes the
logits of all images of a class, in the order of its loader; here that order is the images' place in
the data, which CKA depends on, as it pairs the n-th image of one class with that of another. For
CIFAR-100: `cost: cka`, images 500, temperature 8, weight 1 with `gamma` 600 to 800 that falls to 0
by half a cosine from epoch 150 to 240, beside cross-entropy.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor
from torch.autograd.function import once_differentiable

import kdkit

BLOCK = 512  # columns of the cost that are made at a time


class WassersteinLogits(kdkit.Loss):
    """Cost of moving the student's distribution over the non-target classes to the teacher's,
    with a cross-entropy on the target.

    Formula: -q_y log p_y + gamma * sum_ij F_ij c_ij, mean over the batch; the first part in nats,
    the second in units of cost

    p = softmax(z_s), q = softmax(z_t), y is the label (of a mixed sample, the class with the
    largest share). F is the entropic transport plan, after `iterations` Sinkhorn steps, between
    softmaxes at T over the K - 1 other classes, student's i and teacher's j. The cost is c_ij = 1 -
    exp(-sharpness * (1 - cos_ij)), cos_ij being the cosine of rows i and j of the teacher's last
    linear layer; with sharpness 0 it is 1 - cos_ij itself. c_ii = 0. Logits (B, K) on both sides, K
    >= 2.

    With `cost: cka`, cos_ij is the linear CKA of classes i and j: <X_i X_i', X_j X_j'> / (norm X_i
    X_i' * norm X_j X_j'), where X_c has the teacher's values for the first training images of class
    c, a row each, less their mean. A class that has fewer has zeros in their place; one with a
    single image is unlike all others.
    """

    name = "wkd_logit"
    knowledge = "response"
    # the cost is made of the teacher's classifier
    needs_networks = True

    class Options(kdkit.ResponseOptions):
        gamma: kdkit.Rampable = Field(
            default=1.0, ge=0, description="Factor of the transport cost."
        )
        temperature: kdkit.Rampable = Field(
            default=4.0, gt=0, description="T: softens the distributions that transport is between."
        )
        sharpness: float = Field(
            default=1.0,
            ge=0,
            le=100,
            description="How fast the cost rises with unlikeness; 0: the cost is 1 - cosine.",
        )
        regularization: float = Field(
            default=0.05,
            # a cost is 2 at most, and exp(-2 / 0.025) is still a normal number in fp32
            ge=0.025,
            description=(
                "Weight of the plan's entropy: a smaller one is nearer to exact transport, and"
                " slower to settle."
            ),
        )
        iterations: int = Field(default=10, ge=1, le=1000, description="Sinkhorn steps.")
        cost: Literal["classifier", "cka"] = Field(
            default="classifier",
            description=(
                "How alike classes are: `classifier`, by the rows of the teacher's classifier, or"
                " `cka`, by its answers to training images."
            ),
            json_schema_extra={"later": True},
        )
        images: int = Field(
            default=100,
            ge=2,
            le=1000,
            description="Most training images of a class that `cost: cka` looks at.",
            json_schema_extra={"later": True},
        )
        layer: str = Field(
            default="logits",
            description="Teacher layer that `cost: cka` compares, such as `penultimate`.",
            json_schema_extra={"later": True},
        )

        @model_validator(mode="after")
        def _read(self) -> "WassersteinLogits.Options":
            fields = type(self).model_fields
            for name in ("images", "layer"):
                if self.cost != "cka" and getattr(self, name) != fields[name].default:
                    raise ValueError(f"{name} is read with `cost: cka` only")
            return self

    options: Options
    kernel: Tensor

    @property
    def cost(self) -> Tensor:
        """What moving from one class to another costs, (K, K)."""
        return costs(self.kernel, self.options.regularization)

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        super().setup(student, teacher, context)
        if context is None:
            raise kdkit.ShapeError(
                "the cost is made of the teacher's classifier, or its answers; give setup a"
                " kdkit.Context with the teacher network"
            )
        rows = (
            self.of_classes(context)
            if self.options.cost == "cka"
            else context.teacher_classifier().get_parameter("weight").detach().flatten(1)
        )
        if len(rows) != teacher.logits.shape[1] or len(rows) < 2:
            raise kdkit.ShapeError(
                f"the teacher's classifier {tuple(rows.shape)} must have a row for each class of"
                f" its logits {tuple(teacher.logits.shape)}, and two at least"
            )
        # Of K x K numbers, the one thing that is kept: with 21,841 classes it takes 1.9 GB. It
        # follows from the frozen teacher.
        self.register_buffer(
            "kernel", self.kernel_of(F.normalize(rows.to(student.logits), dim=1)), persistent=False
        )

    def of_classes(self, context: kdkit.Context) -> Tensor:
        """Return a row for each class, (K, M), whose cosine with another one is their CKA."""
        if context.labels.ndim != 1 or not len(context.labels):
            raise kdkit.ShapeError(
                "`cost: cka` compares training images of each class, and these have no single class"
                " that is known before they are read; use `cost: classifier`"
            )
        chosen = first_of_each(context.labels.cpu(), context.outputs, self.options.images)
        images = chosen[chosen >= 0].sort().values
        found = context.teacher_statistics(values_of, [self.options.layer], images, places=images)
        # the last row stands for the images that a class lacks
        table = F.pad(found["values"].double(), (0, 0, 0, 1))
        rows = torch.where(chosen < 0, len(images), torch.searchsorted(images, chosen))
        return centred_grams(table[rows], chosen >= 0).flatten(1)

    def kernel_of(self, rows: Tensor) -> Tensor:
        """exp(-cost / regularization) (K, K), symmetric and nowhere 0, by the bound on
        `regularization`; made in place.
        """
        # rounding takes a cosine above 1, and that of a row with itself off 1
        kernel = (rows @ rows.T).neg_().add_(1).clamp_min_(0).fill_diagonal_(0)
        if sharpness := self.options.sharpness:
            # expm1 keeps the digits of small costs, which 1 - exp loses
            kernel.mul_(-sharpness).expm1_().neg_()
        return kernel.div_(-self.options.regularization).exp_()

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *arguments: Any) -> None:
        state.pop(f"{prefix}cost", None)  # of a checkpoint that still holds it
        super()._load_from_state_dict(state, prefix, *arguments)

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        z_s = student.logits
        z_t = teacher.logits
        t = self.options.temperature
        y = batch.classes[:, None]
        label = z_t.softmax(1).gather(1, y) * z_s.log_softmax(1).gather(1, y)
        target = torch.zeros_like(z_s, dtype=torch.bool).scatter(1, y, True)
        # -inf: the label has no share at all, and no gradient from here
        log_p, log_q = ((z / t).masked_fill(target, -torch.inf).log_softmax(1) for z in (z_s, z_t))
        return -label.mean() + self.options.gamma * self.transport(log_p, log_q).mean()

    def transport(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Cost (B,) of moving p to q, whose logarithms (B, K) may be -inf."""
        kernel = self.kernel.to(log_p)
        # the label stays out on the student's side too, also before the first step
        log_u = torch.zeros_like(log_p).masked_fill(log_p.isneginf(), -torch.inf)
        log_v = log_q - log_product(log_u, kernel)
        # one fewer: the last step is in the quotient below
        for _ in range(self.options.iterations - 1):
            log_u = log_p - log_product(log_v, kernel)
            log_v = log_q - log_product(log_u, kernel)
        # v stands above and below the fraction, so that a common factor goes away
        v = torch.exp(log_v - log_v.detach().amax(1, keepdim=True))
        moved: Tensor = CostProduct.apply(v, kernel, self.options.regularization)
        return (log_p.exp() * moved / (v @ kernel)).sum(1)


def first_of_each(labels: Tensor, classes: int, count: int) -> Tensor:
    """Return the places of the first images of each class, (K, count); -1 where there are fewer."""
    order = labels.argsort(stable=True)
    order = order[labels[order] >= 0]  # -1: an image that is not trained on
    own = labels[order]
    # how many images of its class come before each
    before = torch.arange(len(own)) - torch.searchsorted(own, own)
    chosen = torch.full((classes, count), -1)
    early = before < count
    chosen[own[early], before[early]] = order[early]
    return chosen


def values_of(answers: kdkit.Answers, places: Tensor) -> dict[str, Tensor]:
    """Return the teacher's values for each image, (N, D), in the order of their places."""
    table = None
    for outputs, batch in answers:
        (f,) = outputs.features.values()
        values = kdkit.as_vectors(f, outputs.mask).float()
        table = values.new_zeros(len(places), values.shape[1]) if table is None else table
        table[torch.searchsorted(places.to(batch.index), batch.index)] = values
    return {} if table is None else {"values": table}


def centred_grams(values: Tensor, known: Tensor) -> Tensor:
    """Return X X' of each class, (K, m, m), of its values (K, m, D) less their mean."""
    known = known[:, :, None].to(values)
    mean = values.sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp_min(1)
    centred = (values - mean) * known
    return centred @ centred.mT


def costs(kernel: Tensor, regularization: float) -> Tensor:
    return kernel.log().mul_(-regularization)


class CostProduct(torch.autograd.Function):
    """v @ (kernel * cost), for v (B, K) and the symmetric kernel (K, K), whose product with the
    cost is never there as a whole.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, kernel: Tensor, regularization: float) -> Tensor:
        ctx.save_for_backward(kernel)
        ctx.regularization = regularization
        return in_blocks(v, kernel, regularization)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (kernel,) = ctx.saved_tensors
        # kernel and cost are symmetric, so that the transposed product is the same one
        return in_blocks(grad, kernel, ctx.regularization), None, None


def in_blocks(v: Tensor, kernel: Tensor, regularization: float) -> Tensor:
    """v @ (kernel * cost), some columns at a time."""
    blocks = torch.split(kernel, BLOCK, dim=1)
    return torch.cat([v @ costs(block, regularization).mul_(block) for block in blocks], 1)


def log_product(log_x: Tensor, kernel: Tensor) -> Tensor:
    """log(exp(log_x) @ kernel), without the exponentials' size."""
    # the shift changes no value, and needs no gradient
    largest = log_x.detach().amax(1, keepdim=True)
    return largest + torch.log(torch.exp(log_x - largest) @ kernel)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [WassersteinLogits]
