"""Relation matching for features too (DIST+): probabilities correlate with the teacher's, and so do
channels and positions of a map.

Huang et al., "DIST+: Knowledge Distillation From a Stronger Adaptive Teacher", IEEE Transactions on
Pattern Analysis and Machine Intelligence 2025, doi:10.1109/TPAMI.2025.3554235: the loss on
features, beside that on predictions, which is `dist`. The paper's acclimated teacher is a schedule
of its own. torchdistill adds the mean correlation over channels where it should subtract it.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

import kdkit

from ..response._correlation import correlation


class FeatureRelations(kdkit.Loss):
    """Lack of correlation between the two models' probabilities, over classes and over samples, and
    between their maps, over channels and over samples.

    Formula: tau^2 * (beta * (1 - mean_n r(p_n, q_n)) + gamma * (1 - mean_c r(p_c, q_c))) + iota *
    (1 - mean_nx r(s_nx, t_nx)) + kappa * (1 - mean_x r(S_x, T_x)), no unit, the last two mean over
    the layer pairs

    The first two parts are `dist`. s_nx are the channels of the student's map at position x of
    sample n, S_x their sum over channels at x in all samples; r is Pearson's correlation, with 1e-8
    added to the product of norms. Maps (B, C, H, W), or tokens of a square grid; a 1x1 convolution
    where the channels differ, and the larger map is average-pooled. In a batch of one, nothing
    varies over samples: the parts gamma and kappa are constant.
    """

    name = "dist_plus"
    knowledge = "feature"
    needs_teacher_logits = True

    class Options(kdkit.MapOptions):
        beta: kdkit.Rampable = Field(
            default=1.0, ge=0, description="Weight of the correlation over a sample's classes."
        )
        gamma: kdkit.Rampable = Field(
            default=1.0, ge=0, description="Weight of the correlation over samples, by class."
        )
        iota: kdkit.Rampable = Field(
            default=1.0, ge=0, description="Weight of the correlation over a position's channels."
        )
        kappa: kdkit.Rampable = Field(
            default=1.0, ge=0, description="Weight of the correlation over samples, by position."
        )
        temperature: kdkit.Rampable = Field(
            default=1.0,
            gt=0,
            description="tau: softens both predictions; 1 leaves them as they are.",
        )
        gather: bool = Field(
            default=False,
            description="Relate the samples of all processes, not of each process alone.",
        )

        def check(self, student: kdkit.Outputs, teacher: kdkit.Outputs) -> None:
            super().check(student, teacher)
            kdkit.ResponseOptions().check(student, teacher)

    options: Options
    adapters: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        super().setup(student, teacher, context)
        self.adapters = nn.ModuleList(
            kdkit.aligned(f_s, f_t) for f_s, f_t in self.options.pairs(student, teacher)
        )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        pairs = zip(self.adapters, self.options.pairs(student, teacher), strict=True)
        of_maps = [self.of_maps(adapter(f_s), f_t) for adapter, (f_s, f_t) in pairs]
        return self.of_logits(student.logits, teacher.logits) + torch.stack(of_maps).mean()

    def of_logits(self, z_s: Tensor, z_t: Tensor) -> Tensor:
        """Return the parts beta and gamma for logits (B, K)."""
        o = self.options
        p, q = (self.everyone((z / o.temperature).softmax(1)) for z in (z_s, z_t))
        inter, intra = 1 - correlation(p, q).mean(), 1 - correlation(p.T, q.T).mean()
        return o.temperature**2 * (o.beta * inter + o.gamma * intra)

    def of_maps(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """Return the parts iota and kappa for maps of equally many channels."""
        f_s, f_t = kdkit.pooled_alike(f_s, f_t)
        s, t = (kdkit.as_tokens(f).flatten(0, 1) for f in (f_s, f_t))
        # by sample first: whole maps need not be gathered
        channels = correlation(s, t).view(len(f_s), -1).mean(1)
        sums_s, sums_t = (self.everyone(f.sum(1).flatten(1)) for f in (f_s, f_t))
        positions = correlation(sums_s.T, sums_t.T)
        of_channels = self.options.iota * (1 - self.everyone(channels).mean())
        return of_channels + self.options.kappa * (1 - positions.mean())

    def everyone(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, or of this one."""
        return kdkit.gather(rows) if self.options.gather else rows


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [FeatureRelations]
