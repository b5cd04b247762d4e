"""Fast data-free distillation: a generator that needs few steps for new images, by meta-learning.

Fang, Mo, Wang, Song, Bei, Zhang, Song, "Up to 100x Faster Data-Free Knowledge Distillation", AAAI
2022, arXiv:2112.06253, section 3. A round of images for classes y begins with a copy of the
meta-generator and new noise z, both of which are learnt for k iterations of Adam on

    a H(t, y) + b (distance of batch norms' statistics) - c mean [t, s agree] KL(t || s)

The best batch of the round goes into the bank. The meta-generator then follows the sum of the
copy's gradients (first-order MAML; Adam at k times the learning rate, as in the release).
Statistics are moving means over the rounds (`keep`), as a few images have not those of all. The
release starts the first layer anew once after the warm-up, which is left out here.
"""

import copy
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

import kdkit

from ._image_bank import BankOptions, BankSchedule
from ._synthesis import BatchNorms, Generator, Networks, disagreement, finite, gradients, moved


class Fast(BankSchedule):
    """One stage without training images: the student learns from a bank of images that a
    meta-generator makes in a few iterations a round.

    A round costs a forward and backward of generator, teacher and student for each iteration.
    """

    name = "fast"

    class Options(BankOptions):
        """How a round of images is made."""

        latent: int = Field(
            default=256, ge=1, le=65_536, description="Length of the generator's noise."
        )
        width: int = Field(
            default=64, ge=1, le=4096, description="Channels of the generator's last hidden layer."
        )
        iterations: int = Field(default=10, ge=1, description="k: Adam steps of a round.")
        lr: float = Field(default=5e-3, gt=0, description="Learning rate of the generator.")
        lr_noise: float = Field(default=0.015, gt=0, description="Learning rate of the noise.")
        batch_norm: float = Field(
            default=10.0,
            ge=0,
            description="Weight of the distance of the images' statistics from the batch norms'.",
        )
        one_hot: float = Field(
            default=0.5,
            ge=0,
            description="Weight of the teacher's cross-entropy on the classes that are asked for.",
        )
        disagreement: float = Field(
            default=1.33,
            ge=0,
            description="Weight of KL(teacher || student), which grows, after the warm-up rounds.",
        )
        keep: float = Field(
            default=0.9,
            ge=0,
            lt=1,
            description="Share of earlier rounds in the images' statistics.",
        )

    options: Options

    def synthesis(self, networks: Networks) -> "Meta":
        """Generate images from a common beginning."""
        return Meta(networks, self.options)


class Meta:
    """Makes rounds of images by copies of a meta-generator, which learns from them."""

    def __init__(self, networks: Networks, options: Fast.Options) -> None:
        self.networks, self.options, o = networks, options, options
        self.generator = Generator(o.latent, o.width, networks.shape).to(networks.device)
        self.optimizer = torch.optim.Adam(
            self.generator.parameters(), lr=o.lr * o.iterations, betas=(0.5, 0.999)
        )
        self.statistics = BatchNorms(networks.teacher.module, o.keep)
        self.keeps: dict[str, kdkit.Stateful] = {
            "generator": self.generator,
            "optimizer": self.optimizer,
            "statistics": self.statistics,
        }

    def __call__(self, *, competing: bool) -> Tensor:
        o, networks = self.options, self.networks
        labels = networks.labels(o.round_size)
        noise = networks.noise(o.round_size, o.latent).requires_grad_(True)
        generator = copy.deepcopy(self.generator)
        own = [*generator.parameters()]
        groups: list[dict[str, Any]] = [{"params": own}, {"params": [noise], "lr": o.lr_noise}]
        learnt = torch.optim.Adam(groups, lr=o.lr, betas=(0.5, 0.999))
        summed = [torch.zeros_like(parameter) for parameter in own]
        lowest, best = float("inf"), noise
        for _ in range(o.iterations):
            images = generator(noise)
            loss, answer = self.loss(images, labels, competing=competing)
            if (value := finite(loss)) < lowest:
                lowest, best = value, images.detach()
            for parameter, gradient in gradients(loss, learnt):
                parameter.grad = gradient
            for total, parameter in zip(summed, own, strict=True):
                assert parameter.grad is not None
                total += parameter.grad
            learnt.step()
        for parameter, total in zip(self.generator.parameters(), summed, strict=True):
            parameter.grad = total
        self.optimizer.step()
        if o.batch_norm:
            self.statistics.remember(answer.features)
        return best

    def loss(
        self, images: Tensor, labels: Tensor, *, competing: bool
    ) -> tuple[Tensor, kdkit.Outputs]:
        """Value a random view of the images; also return the teacher's answer to it."""
        o, networks = self.options, self.networks
        shown = moved(images, shift=o.shift, flip=o.flip)
        answer = networks.answer(shown)
        total = o.one_hot * F.cross_entropy(answer.logits, labels)
        if o.batch_norm:
            total = total + o.batch_norm * self.statistics.distance(answer.features)
        if o.disagreement and competing:
            student = networks.student_logits(shown)
            total = total + o.disagreement * disagreement(answer.logits, student)
        return total, answer


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [Fast]
