"""Adversarial features: a discriminator learns to tell the teacher's features from the student's,
and the student learns to be taken for the teacher.

Belagiannis, Farshad, Galasso, "Adversarial Network Compression", ECCV Workshops 2018,
arXiv:1803.10750: features before the classifier, and a discriminator of three layers of 128, 256
and 128 units with ReLU; its usual partner is the squared difference of the logits, `logit_mse`.

There the two take turns, each with an optimizer of its own. Here one backward pass serves both by a
gradient reversal (Ganin, Lempitsky, ICML 2015, arXiv:1409.7495): the same min-max objective with
simultaneous steps. `train.adapters` sets the discriminator's learning rate and decay. Not here: the
paper's regularisation, which now and then labels the student's features as the teacher's. Where
widths differ, a linear layer of the student's side maps its features to the teacher's.
"""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit


class AdversarialFeatures(kdkit.Loss):
    """Cross-entropy of a discriminator D that tells the teacher's features from the student's; D
    descends it, the student ascends it.

    Formula: -log D(f_t) - log(1 - D(r(f_s))), mean over the batch, in nats, mean over the layer
    pairs; 2 log 2 where D cannot tell them

    Vectors (B, D): maps are averaged over positions, sequences over tokens. r is the identity where
    the widths are the same, a learnt linear layer where they differ. What reaches student and r is
    -`reversal` times the gradient.
    """

    name = "adversarial"
    knowledge = "feature"
    exceptions = {
        "check_the_gradient_is_that_of_the_value": "the student's gradient is reversed",
    }

    class Options(kdkit.VectorOptions):
        widths: tuple[Annotated[int, Field(ge=1)], ...] = Field(
            default=(128, 256, 128), description="Units of the discriminator's hidden layers."
        )
        reversal: kdkit.Rampable = Field(
            default=1.0,
            ge=0,
            description="Factor of the student's reversed gradient; 0: only D learns.",
        )

    options: Options
    discriminators: nn.ModuleList
    adapters: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.discriminators, self.adapters = nn.ModuleList(), nn.ModuleList()
        for f_s, f_t in self.options.pairs(student, teacher):
            own, other = f_s.shape[1], f_t.shape[1]
            self.adapters.append(nn.Identity() if own == other else nn.Linear(own, other))
            self.discriminators.append(discriminator(other, self.options.widths))

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        values = []
        for judge, adapter, (f_s, f_t) in zip(
            self.discriminators, self.adapters, self.options.pairs(student, teacher), strict=True
        ):
            false: Tensor = _Reversal.apply(adapter(f_s), self.options.reversal)
            # -log D = softplus(-x) and -log(1 - D) = softplus(x), of D's logit x
            values.append(F.softplus(-judge(f_t)).mean() + F.softplus(judge(false)).mean())
        return torch.stack(values).mean()


def discriminator(width: int, hidden: tuple[int, ...]) -> nn.Sequential:
    """From features (B, D) to a logit (B, 1), above 0 for the teacher's."""
    layers: list[nn.Module] = []
    for units in hidden:
        layers += [nn.Linear(width, units), nn.ReLU()]
        width = units
    return nn.Sequential(*layers, nn.Linear(width, 1))


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * grad, None


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [AdversarialFeatures]
