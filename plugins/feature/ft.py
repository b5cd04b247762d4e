"""Factor transfer: a paraphraser condenses the teacher's features to factors, a translator makes
the student's like them.

Kim et al., "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018,
arXiv:1802.04977, section 3; layers (no batch norms) and the element mean as in the released code.
That code trains the paraphraser on absolute differences; here, as in the paper, on squares. Where
factors differ in size, the larger is average-pooled.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit


class FactorTransfer(kdkit.Loss):
    """Difference of the two models' factors, each of unit length; while the paraphraser learns,
    also its reconstruction error.

    Formula: abs(u(T(f_s)) - u(P(f_t)))^p + (D(P(f_t)) - f_t)^2 while P learns, each a mean over its
    elements, then over the layer pairs

    u divides each image's factors by their L2 norm. The paraphraser is an auto-encoder of the
    teacher's features: P, three 3x3 convolutions to k times the teacher's channels, and D, three
    transposed ones back; the translator T is like P, from the student's channels. A leaky ReLU
    (0.1) follows each. The first term sees P's factors as constants. Maps (B, C, H, W), or tokens
    of a square grid.

    The paper trains the paraphraser first. In the schedule `staged`, a stage with `train:
    [ft.paraphrasers]` does that: only the second term has a gradient there. In later stages, with
    `train: [student, ft.translators]`, the paraphraser rests and the value is the first term alone,
    exactly the paper's loss. Without stages all three learn at once.
    """

    name = "ft"
    knowledge = "feature"

    class Options(kdkit.MapOptions):
        rate: float = Field(
            default=0.5,
            gt=0,
            le=4,
            description="k: channels of the factors, as a multiple of the teacher's.",
        )
        p: Literal[1, 2] = Field(
            default=1, description="Power of the differences: 1 for absolute ones, 2 for squares."
        )

    options: Options
    paraphrasers: nn.ModuleList
    translators: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.paraphrasers, self.translators = nn.ModuleList(), nn.ModuleList()
        for f_s, f_t in self.options.pairs(student, teacher):
            c_s, c_t = f_s.shape[1], f_t.shape[1]
            # a small rate would leave a narrow teacher no factor
            width = max(1, round(self.options.rate * c_t))
            self.paraphrasers.append(Paraphraser(c_t, width))
            self.translators.append(condenser(c_s, width))

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        values, parts = (
            [],
            zip(
                self.paraphrasers,
                self.translators,
                self.options.pairs(student, teacher),
                strict=True,
            ),
        )
        for paraphraser, translator, (f_s, f_t) in parts:
            factors, reconstruction_error = paraphraser(f_t)
            # to one size first, so that the vectors that are compared have unit length
            wanted, got = (unit(f) for f in kdkit.pooled_alike(factors, translator(f_s)))
            difference = F.l1_loss(got, wanted) if self.options.p == 1 else F.mse_loss(got, wanted)
            values.append(difference + reconstruction_error)
        return torch.stack(values).mean()


class Paraphraser(nn.Module):
    """Auto-encoder of maps (B, C, H, W) with factors (B, width, H, W) in the middle."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.condense = condenser(channels, width)
        self.expand = stack(nn.ConvTranspose2d, (width, width, channels, channels))

    def forward(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Its factors, as constants, and its reconstruction error, 0 where it does not learn."""
        factors = self.condense(f)
        # while it rests, the value is the paper's, and the decoder costs nothing
        learns = any(weight.requires_grad for weight in self.parameters())
        # constants: the paraphraser learns to reconstruct, not to be easy to imitate
        return factors.detach(), F.mse_loss(self.expand(factors), f) if learns else f.new_zeros(())


def condenser(channels: int, width: int) -> nn.Sequential:
    return stack(nn.Conv2d, (channels, channels, width, width))


def stack(
    convolution: type[nn.Conv2d] | type[nn.ConvTranspose2d], widths: tuple[int, ...]
) -> nn.Sequential:
    """3x3 convolutions from each width to the next, each with a leaky ReLU."""
    pairs = zip(widths, widths[1:], strict=False)
    return nn.Sequential(
        *(layer for a, b in pairs for layer in (convolution(a, b, 3, padding=1), nn.LeakyReLU(0.1)))
    )


def unit(f: Tensor) -> Tensor:
    """Maps (B, C, H, W) as vectors of length 1, (B, C * H * W)."""
    # torch's own 1e-12 would let the gradient grow to 1e12 where factors vanish
    return F.normalize(f.flatten(1), eps=1e-5)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [FactorTransfer]
