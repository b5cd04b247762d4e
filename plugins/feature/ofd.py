"""Overhaul of feature distillation: values before the ReLU, of which the teacher's negative ones
only count as "off".

Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019, arXiv:1904.01866, section
3. As in the released code, a margin is the mean of a Gaussian's negative part, with the batch
norm's bias and the absolute value of its scale, or -3 scales where at most 0.001 is negative. That
code sums over layers, each earlier one at half the weight of the next; here layers are averaged
(give each an entry of its own to weigh them). Margins are computed in fp64; a scale of 0, which
fails there, gives min(bias, 0).
"""

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

import kdkit


class Overhaul(kdkit.Loss):
    """Squared error to the teacher's values, where these are positive or the student's lie above
    them (partial L2).

    Formula: (s - u)^2 [s > u or u > 0] with u = max(t, margin_c), summed over channels and
    positions, mean over the batch, then over the layer pairs; s = r(f_s) and t = f_t

    Reads values before the activation: name what an activation takes, such as
    `layer1.2.act2@input`, or a batch norm. margin_c is E[x | x < 0] for x as the teacher's batch
    norm gives it, normally distributed with its bias and scale. Maps (B, C, H, W), or tokens of a
    square grid. r is a 1x1 convolution and batch normalisation, then a bilinear resize to the
    teacher's size where that differs.
    """

    name = "ofd"
    knowledge = "feature"
    # margins come from the teacher's batch norms
    needs_networks = True

    class Options(kdkit.MapOptions):
        norms: tuple[str, ...] | None = Field(
            default=None,
            description=(
                "The teacher's batch norm before each layer's activation, one per layer pair; none:"
                " the one in front of the activation whose `@input` is read, or the layer itself."
            ),
        )

    options: Options
    connectors: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.connectors = nn.ModuleList()
        layers, norms = self.options.taps(), self._norms()
        for i, (layer, norm, (f_s, f_t)) in enumerate(
            zip(layers, norms, self.options.pairs(student, teacher), strict=True)
        ):
            shapes = (
                f"student '{layer.student}' {tuple(f_s.shape)} and teacher '{layer.teacher}'"
                f" {tuple(f_t.shape)}"
            )
            if context is None or context.teacher is None:
                raise kdkit.ShapeError(
                    f"{shapes} need margins from the teacher's batch norms: set up with a context"
                    " that has its network"
                )
            margins = margins_of(context.teacher_norm(norm))
            c_s, c_t = f_s.shape[1], f_t.shape[1]
            if len(margins) != c_t:
                raise kdkit.ShapeError(
                    f"{shapes}: the batch norm of '{norm}' has {len(margins)} channels; name the"
                    " right one in `norms`"
                )
            # no bias: batch normalisation would take it away
            self.connectors.append(
                nn.Sequential(nn.Conv2d(c_s, c_t, 1, bias=False), kdkit.AnyBatchNorm(c_t))
            )
            # buffers, not parameters: margins follow from the teacher and do not learn
            self.register_buffer(f"margins{i}", margins.to(f_t)[:, None, None])

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        errors = []
        for i, (connector, (f_s, f_t)) in enumerate(
            zip(self.connectors, self.options.pairs(student, teacher), strict=True)
        ):
            s, target = (
                kdkit.resized(connector(f_s), f_t.shape[2:]),
                torch.maximum(f_t, self.get_buffer(f"margins{i}")),
            )
            counts = (s > target) | (target > 0)
            # a sum over the map, as in the released code, which is why usual weights are small
            errors.append(torch.where(counts, s - target, 0.0).square().sum() / len(s))
        return torch.stack(errors).mean()

    def _norms(self) -> Sequence[str]:
        layers, norms = self.options.taps(), self.options.norms
        if norms is None:
            return [layer.teacher for layer in layers]
        if len(norms) != len(layers):
            raise kdkit.ShapeError(
                f"`norms` names {len(norms)} batch norms for {len(layers)} layer pairs; name one"
                " for each"
            )
        return norms


def margins_of(norm: nn.Module) -> Tensor:
    """Mean of the negative part of what a batch norm gives, for each channel, (C,) in fp64."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    with torch.no_grad():
        ones = torch.ones(norm.num_features, dtype=torch.float64)
        bias = ones * 0 if norm.bias is None else norm.bias.to(ones)
        scale = ones if norm.weight is None else norm.weight.to(ones).abs()
        # at a scale of 0 the ratio then has the bias's sign, and the limit min(bias, 0) comes out
        ratio = bias / scale.clamp_min(1e-12)
        density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
        negative = torch.special.ndtr(-ratio)  # share of the values
        # `where` computes both sides: the divisor must not vanish on the one that is not taken
        return torch.where(
            negative > 0.001, bias - scale * density / negative.clamp_min(0.001), -3 * scale
        )


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [Overhaul]
