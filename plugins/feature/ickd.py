"""Inter-channel correlation: the student's channels resemble each other as the teacher's do.

Liu et al., "Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation",
ICCV 2021, arXiv:2202.03680, section 3 (the form for classification, without a grid); rows of unit
length and the reduction as in the released code. That code puts a batch norm behind the 1x1
convolution, here there is none. A silent channel's row, whose gradient reaches 1e12 there, has none
here.
"""

import torch
from torch import Tensor, nn

import kdkit


class InterChannel(kdkit.Loss):
    """Squared difference of the matrices of inner products between an image's channels.

    Formula: |G(r(f_s)) - G(f_t)|^2 / C with G(f) the rows of f f^T divided by their L2 norms, mean
    over the batch, then the layer pairs

    f is one image's map as C rows of H * W values, |.|^2 the squared Frobenius norm. Maps (B, C, H,
    W), or tokens of a square grid; the two models' sizes need not agree. r is a 1x1 convolution
    where the channels differ, else nothing.
    """

    name = "ickd"
    knowledge = "feature"
    Options = kdkit.MapOptions
    options: kdkit.MapOptions
    adapters: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.adapters = nn.ModuleList(
            kdkit.aligned(f_s, f_t) for f_s, f_t in self.options.pairs(student, teacher)
        )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        pairs = zip(self.adapters, self.options.pairs(student, teacher), strict=True)
        return torch.stack(
            [
                unlikeness(adapter(f_s).flatten(2), f_t.flatten(2)).mean()
                for adapter, (f_s, f_t) in pairs
            ]
        ).mean()


def unlikeness(s: Tensor, t: Tensor) -> Tensor:
    """Squared distance of the rows of unit length, (B, C), from channels at positions (B, C, P)
    and (B, C, Q).
    """
    heard_s, heard_t = (f.detach().square().sum(2, keepdim=True) > 1e-12 for f in (s, t))
    if max(s.shape[2], t.shape[2]) >= s.shape[1]:
        return (rows(s, heard_s) - rows(t, heard_t)).square().sum(2)
    # With fewer positions than channels, products between positions are fewer; the square is then 2
    # - 2 cos.
    both = heard_s & heard_t
    # 1 before the root, whose slope at 0 is infinite
    norms = [torch.where(both, row_products(f, f), 1.0).sqrt() for f in (s, t)]
    cosine = torch.where(both, row_products(s, t) / (norms[0] * norms[1]), 0.0)
    return (heard_s.to(s) + heard_t.to(s) - 2 * cosine)[..., 0]


def rows(f: Tensor, heard: Tensor) -> Tensor:
    """The channels' inner products (B, C, C), rows of unit length; 0 for channels that are not
    heard.
    """
    gram = f @ f.mT
    # a norm of 0 must not reach the division: `where` would turn its infinite slope into NaN
    norm = torch.linalg.vector_norm(gram, dim=2, keepdim=True).masked_fill(~heard, 1.0)
    return gram * torch.where(heard, 1 / norm, 0.0)


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each row of a a^T with that of b b^T, (B, C, 1)."""
    # in this order no (C, C) matrix is made
    return ((a @ (a.mT @ b)) * b).sum(2, keepdim=True)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [InterChannel]
