"""Simple recipe: the log of a high power of the difference between normalised features, through
a linear projector.

Miles, Mikolajczyk, "Understanding the Role of the Projector in Knowledge Distillation", AAAI 2024,
arXiv:2303.11098, section 3; the factor of 2 as in the released code for ImageNet, the 1e-5 inside
the logarithm as in that for transformers. The paper adds the KL divergence of the logits, which is
`logit_kl` with temperature 1 in the same recipe. The projector has no bias, which batch
normalisation would take away.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

import kdkit


class SimpleRecipe(kdkit.Loss):
    """Log-sum distance of batch-normalised vectors, the student's projected to the teacher's
    width.

    Formula: 2 * log(sum of abs(N(W f_s) - N(f_t))^exponent + 1e-5), sum over the batch and the
    channels, mean over the layer pairs

    N is batch normalisation without scale and shift, W a learnt linear map. Vectors (B, D); maps
    are averaged over their positions, tokens over the sequence. The value falls below zero where
    the vectors are close. A batch of one is normalised by running statistics.
    """

    name = "srd"
    knowledge = "feature"
    exceptions = {
        "check_averages_over_the_batch": "the paper's logarithm is of a sum over the batch",
    }

    class Options(kdkit.VectorOptions):
        exponent: float = Field(
            default=4.0,
            ge=1,
            le=8,
            description="Power of the differences; a larger one looks more at the largest.",
        )

    options: Options
    projectors: nn.ModuleList
    norms: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.projectors, self.norms = nn.ModuleList(), nn.ModuleList()
        for v_s, v_t in self.options.pairs(student, teacher):
            width = v_t.shape[1]
            # a norm for each side, as each keeps running statistics of its own
            norm = kdkit.AnyBatchNorm(width, affine=False)
            self.projectors.append(
                nn.Sequential(nn.Conv2d(v_s.shape[1], width, 1, bias=False), norm)
            )
            self.norms.append(kdkit.AnyBatchNorm(width, affine=False))

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        distances = []
        for project, norm, (v_s, v_t) in zip(
            self.projectors, self.norms, self.options.pairs(student, teacher), strict=True
        ):
            # as maps of one position, which `AnyBatchNorm` takes
            difference = (project(v_s[:, :, None, None]) - norm(v_t[:, :, None, None])).abs()
            # one logarithm of the whole batch's sum, as in the paper: the value depends on the
            # batch's size
            distances.append(2 * (difference.pow(self.options.exponent).sum() + 1e-5).log())
        return torch.stack(distances).mean()


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [SimpleRecipe]
