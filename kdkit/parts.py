"""Small parts that losses are built of: adapters between widths, frozen copies, logits of one scale."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class AnyBatchNorm(nn.BatchNorm2d):
    """Batch normalisation that falls back on its running statistics for a single value per channel, where torch raises."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.numel() == input.shape[1]:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


def aligned(f_s: Tensor, f_t: Tensor) -> nn.Module:
    """From the student's channels to the teacher's: a 1x1 convolution of maps where they differ, nothing where they agree."""
    same = f_s.shape[1] == f_t.shape[1]
    return nn.Identity() if same else nn.Conv2d(f_s.shape[1], f_t.shape[1], 1)


def frozen_copy(module: M) -> M:
    """A copy in eval mode that does not learn."""
    return copy.deepcopy(module).eval().requires_grad_(False)


def standardized(z: Tensor) -> Tensor:
    """Logits (B, K) with mean 0 and (unbiased) deviation 1 in each row; rows whose deviation is below 1e-5 become zeros without gradient.

    Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv:2403.01427, algorithm 1.
    """
    centred = z - z.mean(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / max(z.shape[1] - 1, 1)
    return torch.where(variance > 1e-10, centred / (1e-7 + variance.clamp_min(1e-10).sqrt()), 0.0)
