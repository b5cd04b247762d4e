"""Improved and generalised KL divergence (IKL, GKL): differences between pairs of logits, weighted
by how likely the teacher holds the two classes, beside a cross-entropy with its soft targets.

Cui et al., "Decoupled Kullback-Leibler Divergence Loss", NeurIPS 2024, arXiv:2305.13948 (IKL), and
"Generalized Kullback-Leibler Divergence Loss", 2025, arXiv:2503.08038 (GKL). The defaults are IKL
for CIFAR-100; GKL there is `beta: 16, prior_temperature: 4, power: 0.05, normalize: true`. Both
stand beside the cross-entropy, with weight 1, ramped up over 20 epochs.

The released code sums over all pairs of classes; here the same sum takes K terms a sample. It makes
the class prior anew after each epoch, from that epoch, and takes 1 / K in the first. Here it is the
mean over all samples of the class that were trained on before this batch, and 1 / K for a class
that has not been seen: with a frozen teacher the same mean over more samples, and no epochs need be
counted.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit


class PairwiseLogits(kdkit.Loss):
    """Weighted squared differences between the two models' margins of all pairs of classes, and
    cross-entropy with the teacher's softened prediction.

    Formula: beta / 4 * sum_j sum_k w_j w_k (d_j - d_k)^2 - alpha * sum_k q_k log p_k, mean over the
    batch

    d = z_t - z_s, p = softmax(z_s / T), q = softmax(z_t / T), without a factor T^2; the second part
    is in nats, and not 0 for equal answers but the entropy of q. w is a constant: the teacher's
    softmax(z_t / T_w) raised to `power`, or with `prior: class` the mean of those softmaxes over
    the samples of the same label, raised to `power`. With `normalize` the first part is divided by
    the mean over the batch of sum_j sum_k w_j w_k, so that it is a weighted mean over the pairs.
    Logits (B, K) on both sides.

    The table of `prior: class` has K^2 numbers. It is that of all processes, and of the samples
    trained on before this batch; in eval mode it does not change. Of a mixed sample, the label is
    the class with the largest share.
    """

    name = "ikl"
    knowledge = "response"

    class Options(kdkit.ResponseOptions):
        alpha: kdkit.Rampable = Field(
            default=1.0, ge=0, description="Factor of the cross-entropy with the soft targets."
        )
        beta: kdkit.Rampable = Field(
            default=8.0, ge=0, description="Factor of the differences between pairs of logits."
        )
        temperature: kdkit.Rampable = Field(
            default=4.0, gt=0, description="T: softens both distributions of the cross-entropy."
        )
        prior: Literal["sample", "class"] = Field(
            default="sample",
            description=(
                "Where the weights of classes come from: the teacher's answer to the `sample`, or"
                " its mean answer to samples of the same `class`."
            ),
        )
        prior_temperature: kdkit.Rampable = Field(
            default=100.0, gt=0, description="T_w: softens the weights of the classes."
        )
        power: kdkit.Rampable = Field(
            default=1.0,
            ge=0,
            le=4,
            description="Power of the weights; at 0 every class counts alike.",
        )
        normalize: bool = Field(
            default=False,
            description="Divide the first part by the sum of its weights, as GKL does.",
        )

    options: Options
    means: Tensor | None
    counts: Tensor | None

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.register_buffer("means", None)
        self.register_buffer("counts", None)

    @classmethod
    def for_tasks(cls, options: Any = None) -> frozenset[str]:
        """The means are of samples: a process may have another number of pixels."""
        of_class = options is not None and options.prior == "class"
        return frozenset({"classes of samples" if of_class else "classes"})

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        super().setup(student, teacher, context)
        if self.options.prior == "class":
            z, k = teacher.logits, teacher.logits.shape[1]
            self.means = z.new_full((k, k), 1 / k)
            self.counts = z.new_zeros(k)

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        o = self.options
        z_s, z_t = student.logits, teacher.logits
        w = self.weights(z_t, batch)
        total = w.sum(1, keepdim=True)
        d = z_t - z_s
        # sum_jk w_j w_k (d_j - d_k)^2 = 2 W sum_j w_j (d_j - m)^2, with W = sum_j w_j and m the
        # weighted mean of d: no difference of two large numbers
        gap = d - (w * d).sum(1, keepdim=True) / total
        pairs = 2 * total[:, 0] * (w * gap.square()).sum(1)
        first = pairs.sum() / total.square().sum() if o.normalize else pairs.mean()
        log_p = F.log_softmax(z_s / o.temperature, dim=1)
        soft = -((z_t / o.temperature).softmax(1) * log_p).sum(1).mean()
        return o.beta / 4 * first + o.alpha * soft

    def weights(self, z_t: Tensor, batch: kdkit.Batch) -> Tensor:
        """Weights of the classes for each sample, (B, K)."""
        log_q = F.log_softmax(z_t / self.options.prior_temperature, dim=1)
        if self.means is None or self.counts is None:
            return torch.exp(self.options.power * log_q)
        # a copy: the table changes before this batch's loss is computed
        prior = self.means.index_select(0, batch.classes).to(z_t)
        # only in training: a validation or a probe must leave no trace
        if self.training:
            self.remember(kdkit.gather(log_q.exp()), kdkit.gather(batch.classes))
        return prior.pow(self.options.power)

    def remember(self, q: Tensor, classes: Tensor) -> None:
        """Take probabilities (N, K) of samples of these classes (N,) into the means."""
        assert self.means is not None and self.counts is not None
        members = F.one_hot(classes, len(self.counts)).to(self.means)
        new = members.sum(0)
        # in place: a recorded step goes on with the same tensors
        self.counts += new
        sums = members.T @ q.to(self.means)
        self.means += (sums - new[:, None] * self.means) / self.counts.clamp_min(1)[:, None]


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [PairwiseLogits]
