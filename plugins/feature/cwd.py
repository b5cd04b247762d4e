"""Channel-wise distillation: each channel is a distribution over positions, and the student's
follows the teacher's.

Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, arXiv:2011.13256,
section 3.2; temperature and reduction as in the released code. The 1x1 convolution has no bias
here: a softmax over positions does not see one.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit


class ChannelWise(kdkit.Loss):
    """KL divergence between softmaxes over the positions of each channel.

    Formula: T^2 * KL(softmax(f_t / T) || softmax(r(f_s) / T)), mean over the batch and the
    channels, then over the layer pairs, in nats

    Maps (B, C, H, W), or tokens of a square grid. r is a 1x1 convolution where the channels differ,
    and a bilinear resize to the teacher's size where that differs. It also compares logits of each
    pixel (B, K, H, W), for which the paper has it.
    """

    name = "cwd"
    knowledge = "feature"

    class Options(kdkit.MapOptions):
        temperature: kdkit.Rampable = Field(
            default=4.0,
            gt=0,
            description="T: how wide the look over positions is; 1 for sharp peaks.",
        )

    options: Options
    adapters: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.adapters = nn.ModuleList()
        for pair, (f_s, f_t) in zip(
            self.options.taps(), self.options.pairs(student, teacher), strict=True
        ):
            if f_t[0, 0].numel() < 2:
                raise kdkit.ShapeError(
                    f"teacher '{pair.teacher}' {tuple(f_t.shape)} has one position, so that a"
                    f" distribution over positions says nothing to student '{pair.student}'"
                    f" {tuple(f_s.shape)}; name a layer before the pooling, such as 'stage3'"
                )
            self.adapters.append(kdkit.aligned(f_s, f_t, bias=False))

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        t, divergences = self.options.temperature, []
        for adapter, (f_s, f_t) in zip(
            self.adapters, self.options.pairs(student, teacher), strict=True
        ):
            f_s = kdkit.resized(adapter(f_s), f_t.shape[2:])
            # the channels of all images are rows, so that `batchmean` divides by B * C
            log_p, log_q = (
                F.log_softmax(f.flatten(2).flatten(0, 1) / t, dim=1) for f in (f_s, f_t)
            )
            divergences.append(F.kl_div(log_p, log_q, reduction="batchmean", log_target=True))
        return t**2 * torch.stack(divergences).mean()


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [ChannelWise]
