"""Channel distillation: the student's channels are as strong, on the whole, as the teacher's.

Zhou et al., "Channel Distillation: Channel-Wise Attention for Knowledge Distillation",
arXiv:2006.01683, section 3.1. The paper compares equal widths; where they differ, a linear layer
comes after the pooling here, which is what a 1x1 convolution before it would be. Tokens are
averaged too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdkit


class ChannelGap(kdkit.Loss):
    """Mean squared difference of the features' means over all positions.

    Formula: (r(GAP(f_s)) - GAP(f_t))^2, mean over the batch and the channels, then over the layer
    pairs

    GAP is global average pooling: maps (B, C, H, W) of any size, or tokens (B, N, D), become
    vectors (B, C); vectors stay as they are. r is a linear layer where the widths differ, else
    nothing.
    """

    name = "channel_gap"
    knowledge = "feature"
    Options = kdkit.VectorOptions
    options: kdkit.VectorOptions
    adapters: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.adapters = nn.ModuleList()
        for v_s, v_t in self.options.pairs(student, teacher):
            width_s, width_t = v_s.shape[1], v_t.shape[1]
            self.adapters.append(
                nn.Identity() if width_s == width_t else nn.Linear(width_s, width_t)
            )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        pairs = zip(self.adapters, self.options.pairs(student, teacher), strict=True)
        return torch.stack([F.mse_loss(adapter(v_s), v_t) for adapter, (v_s, v_t) in pairs]).mean()


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [ChannelGap]
