"""Knowledge correction (RC): the student's own prediction, with the label's logit raised by the
largest one, is its target.

Cao, Zhang, He, Shen, "Be an Excellent Student: Review, Preview, and Correction", IEEE Signal
Processing Letters 2023, https://ieeexplore.ieee.org/document/10319075, the correction. The formula
is that of the re-implementation beside "Knowledge Distillation with Refined Logits"
(arXiv:2408.07703), which adds it with weight 0.1 to the cross-entropy and to `logit_kl`, both with
weight 1. Where every logit is negative, that code lowers the label's; here it stays as it is.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit


class Correction(kdkit.Loss):
    """KL divergence between the student's softened prediction, its label raised, and the prediction
    itself.

    Formula: T^2 * KL(softmax(c / T) || softmax(z_s / T)) with c_k = z_k + y_k max(max_j z_j, 0),
    mean over the batch, in nats

    z = z_s, but c is a constant: no gradient passes through it. y is the one-hot label, or the
    labels' own shares (B, K) when inputs are mixed. Adding a constant to all logits changes the
    value. Student logits (B, K); there is no teacher to run, so it costs nothing.
    """

    name = "rc"
    knowledge = "labels"
    exceptions = {
        "check_the_gradient_is_that_of_the_value": "the corrected prediction is a constant target",
    }

    class Options(kdkit.LossOptions):
        temperature: kdkit.Rampable = Field(
            default=4.0,
            gt=0,
            description="T: softens both distributions; 1 leaves them as they are.",
        )

    options: Options

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        z_s = student.logits
        if z_s.ndim != 2 or (context is not None and z_s.shape[1] != context.outputs):
            wanted = f"(B, {context.outputs})" if context is not None else "(B, K)"
            raise kdkit.ShapeError(
                f"{self.name}: student logits {tuple(z_s.shape)} do not fit the labels, which need"
                f" {wanted}; give the student one logit per class of the dataset"
            )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        z = student.logits
        t = self.options.temperature
        own = z.detach()
        shares = F.one_hot(batch.labels, z.shape[1]) if batch.labels.ndim == 1 else batch.labels
        corrected = own + shares.to(z) * own.amax(1, keepdim=True).clamp_min(0)
        log_p, log_q = F.log_softmax(z / t, dim=1), F.log_softmax(corrected / t, dim=1)
        return t**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [Correction]
