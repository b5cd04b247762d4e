"""Building blocks of losses: adapters between widths, frozen copies, standardised logits."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkit.contracts.features import as_vectors
from kdkit.errors import ShapeError

M = TypeVar("M", bound=nn.Module)
# relative to the largest logit: far above mixed-precision rounding, far below another head's
# difference
HEAD_TOLERANCE = 0.05


class AnyBatchNorm(nn.BatchNorm2d):
    """Batch normalisation that takes its running statistics where a channel has a single value."""

    def forward(self, input: Tensor) -> Tensor:
        # torch raises: a single value has no variance
        if self.training and input.numel() == input.shape[1]:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(input)


def aligned(f_s: Tensor, f_t: Tensor, *, bias: bool = True) -> nn.Module:
    """Map the student's channels to the teacher's: a 1x1 convolution, or the identity if equal."""
    same = f_s.shape[1] == f_t.shape[1]
    return nn.Identity() if same else nn.Conv2d(f_s.shape[1], f_t.shape[1], 1, bias=bias)


def frozen_copy(module: M) -> M:
    """Return a copy in eval mode that does not learn."""
    return copy.deepcopy(module).eval().requires_grad_(False)


def pooled_head(classifier: nn.Module, f: Tensor, logits: Tensor, whose: str) -> nn.Linear:
    """Return a network's classifier if it is linear and applied to the mean over a layer.

    Args:
        classifier: the layer that gives the logits.
        f: output of the layer in question: a map, tokens or a vector.
        logits: of the same samples.
        whose: begins the message: "teacher 'stage3'".

    Raises:
        ShapeError: the logits come about in another way.
    """
    v = as_vectors(f)
    # equal widths are no evidence: a norm or an activation may stand before the classifier, so the
    # logits are computed and compared
    if (
        isinstance(classifier, nn.Linear)
        and classifier.in_features == v.shape[1]
        and classifier.out_features == logits.shape[1]
    ):
        with torch.no_grad():
            gap = (classifier(v.to(classifier.weight.dtype)) - logits).abs().max()
        if gap <= HEAD_TOLERANCE * logits.abs().max():
            return classifier
    raise ShapeError(
        f"{whose} {tuple(f.shape)} does not give the logits {tuple(logits.shape)} by pooling and a"
        " linear classifier: its head is more than that behind the tapped layer; tap the last"
        " layer before the pooling, norm and activation included (`kdkit layers`), or, where a"
        " vector will do, 'penultimate'"
    )


def standardized(z: Tensor) -> Tensor:
    """Logits (R, K), standardised by row; rows of a deviation below 1e-5 become zeros.

    Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv:2403.01427,
    algorithm 1.
    """
    centred = z - z.mean(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / max(z.shape[1] - 1, 1)
    # clamp before the root: its gradient at 0 is infinite, and `where` would turn it into NaN
    return torch.where(variance > 1e-10, centred / (1e-7 + variance.clamp_min(1e-10).sqrt()), 0.0)
