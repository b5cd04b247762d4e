"""Inter-channel correlation: the student's channels resemble each other as the teacher's do.

Liu et al., "Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation", ICCV 2021, arXiv:2202.03680,
section 3 (the form for classification, without a grid); rows of unit length and the reduction as in the released code. That code puts
a batch norm behind the 1x1 convolution, here there is none. A silent channel's row, whose gradient reaches 1e12 there, has none here.
"""

import torch
from torch import Tensor, nn

import kdkit


class InterChannel(kdkit.Loss):
    """Squared difference of the matrices of inner products between an image's channels.

    Formula: |G(r(f_s)) - G(f_t)|^2 / C with G(f) the rows of f f^T divided by their L2 norms, mean over the batch, then the layer pairs

    f is one image's map as C rows of H * W values, |.|^2 the squared Frobenius norm. Maps (B, C, H, W), or tokens of a square grid; the
    two models' sizes need not agree. r is a 1x1 convolution where the channels differ, else nothing.
    """

    name = "ickd"
    knowledge = "feature"
    Options = kdkit.MapOptions
    options: kdkit.MapOptions
    adapters: nn.ModuleList

    def setup(self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None) -> None:
        self.adapters = nn.ModuleList(kdkit.aligned(f_s, f_t) for f_s, f_t in self.options.pairs(student, teacher))

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        errors = []
        for adapter, (f_s, f_t) in zip(self.adapters, self.options.pairs(student, teacher), strict=True):
            difference = correlations(adapter(f_s)) - correlations(f_t)
            errors.append(difference.square().sum((1, 2)).mean() / f_t.shape[1])
        return torch.stack(errors).mean()


def correlations(f: Tensor) -> Tensor:
    """Maps (B, C, H, W) to their channels' inner products (B, C, C), rows of unit length; 0 for channels whose norm is below 1e-6."""
    f = f.flatten(2)
    gram = f @ f.mT
    square = gram.square().sum(2, keepdim=True)
    alive = gram.diagonal(dim1=1, dim2=2)[..., None] > 1e-12
    return torch.where(alive, gram / torch.where(alive, square, 1.0).sqrt(), 0.0)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [InterChannel]
