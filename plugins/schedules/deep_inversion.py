"""DeepInversion: pixels are optimised until the teacher's batch norms see what they know.

Yin, Molchanov, Alvarez, Li, Mallya, Hoiem, Jha, Kautz, "Dreaming to Distill: Data-free Knowledge
Transfer via DeepInversion", CVPR 2020, arXiv:1912.08795, section 3. A round of images x for classes
y minimises

    a H(t, y) + b sum_l (|mean_l - running mean_l| + |variance_l - running variance_l|)
    + c (1 - JS(t, s)) + d TV

by Adam on a random shift and flip of x at each iteration; l goes over the inputs of the teacher's
batch norms, and JS makes images on which the student s still differs (adaptive competition). The
paper has no bank of several rounds for one student; here rounds go on while it learns. Pixels are
in [0, 1] and clamped to it (the release: in the normalised range, so that its learning rate of 0.1
is about 0.025 here).
"""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

import kdkit

from ._image_bank import BankOptions, BankSchedule
from ._synthesis import Networks, competition, descend, finite, moved, total_variation


class DeepInversion(BankSchedule):
    """One stage without training images: the student learns from a bank of images whose pixels are
    optimised on the frozen teacher's batch norms.

    A round costs a forward and backward of the teacher (and the student) for each iteration.
    """

    name = "deep_inversion"

    class Options(BankOptions):
        """How the pixels are optimised."""

        iterations: int = Field(default=1000, ge=1, description="Adam steps of a round.")
        lr: float = Field(default=0.05, gt=0, description="Learning rate of the pixels in [0, 1].")
        batch_norm: float = Field(
            default=10.0,
            ge=0,
            description="Weight of the distance of the images' statistics from the batch norms'.",
        )
        competition: float = Field(
            default=1.0,
            ge=0,
            description="Weight of 1 - JS(teacher, student), after the warm-up rounds.",
        )
        temperature: float = Field(
            default=3.0, gt=0, description="T of the predictions in that term."
        )
        total_variation: float = Field(
            default=0.0, ge=0, description="Weight of the mean squared difference of neighbours."
        )

    options: Options

    def synthesis(self, networks: Networks) -> "Inversion":
        """Optimise pixels."""
        return Inversion(networks, self.options)


class Inversion:
    """Optimises noise into a round of images; nothing is kept from round to round."""

    def __init__(self, networks: Networks, options: DeepInversion.Options) -> None:
        self.networks, self.options = networks, options
        self.keeps: dict[str, kdkit.Stateful] = {}

    def __call__(self, *, competing: bool) -> Tensor:
        o = self.options
        labels = self.networks.labels(o.round_size)
        images = self.networks.noise(o.round_size, *self.networks.shape) / 4 + 0.5
        images = images.clamp_(0, 1).requires_grad_(True)
        optimizer = torch.optim.Adam([images], lr=o.lr, betas=(0.5, 0.9))
        for _ in range(o.iterations):
            loss = self.loss(images, labels, competing=competing)
            descend(loss, optimizer)
            with torch.no_grad():
                images.clamp_(0, 1)
        finite(loss)  # a pixel that is NaN remains so
        return images

    def loss(self, images: Tensor, labels: Tensor, *, competing: bool) -> Tensor:
        """Value a random view of the images."""
        o, networks = self.options, self.networks
        shown = moved(images, shift=o.shift, flip=o.flip)
        answer = networks.answer(shown)
        total = o.one_hot * F.cross_entropy(answer.logits, labels)
        if o.batch_norm:
            total = total + o.batch_norm * networks.statistics.distance(answer.features)
        if o.competition and competing:
            student = networks.student_logits(shown)
            total = total + o.competition * competition(answer.logits, student, o.temperature)
        if o.total_variation:
            total = total + o.total_variation * total_variation(images)
        return total


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [DeepInversion]
