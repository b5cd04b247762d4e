"""Data-free learning of student networks (DAFL): a generator makes images that the teacher is sure
of, and the student learns from them.

Chen, Wang, Xu, Yang, Liu, Shi, Xu, Xu, Tian, "Data-Free Learning of Student Networks", ICCV 2019,
arXiv:1904.01186, section 3. The generator G minimises, on the teacher's answers t to images G(z),

    a H(t, argmax t) - b mean |f| + c sum p ln p

cross-entropy to the teacher's own choice, the activation of its embedding f, and the balance of
the mean prediction p over the classes. The paper trains with a = 1, b = 0.1, c = 5 and base-10
logarithms (c = 2.17 here); the defaults are those that Fang et al. (arXiv:2105.08584) compare with.
Its one-hot term alone does not tell one image of a class from another.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

import kdkit

from ._image_bank import SHOWN
from ._synthesis import Every, Generator, Networks, balance, descend


class Dafl(kdkit.Schedule):
    """One stage without training images: a generator learns what the frozen teacher is sure of,
    and the student from the teacher's answers to what it generates.

    A step costs, beside the usual one, a forward of the generator; every n-th a forward and
    backward of generator and teacher.
    """

    name = "dafl"
    scheme = "offline"
    needs_teacher = True
    needs_images = False
    tasks = frozenset({"classes"})

    class Options(kdkit.ScheduleOptions):
        """The generator and its losses."""

        latent: int = Field(
            default=512, ge=1, le=65_536, description="Length of the generator's noise."
        )
        width: int = Field(
            default=64, ge=1, le=4096, description="Channels of the generator's last hidden layer."
        )
        lr: float = Field(
            default=1e-3, gt=0, description="Learning rate of the generator, by Adam."
        )
        one_hot: float = Field(
            default=1.0,
            ge=0,
            description="Weight of the teacher's cross-entropy to its own choice.",
        )
        activation: float = Field(
            default=0.001, ge=0, description="Weight of the mean |embedding| of the teacher."
        )
        balance: float = Field(
            default=20.0, ge=0, description="Weight of the balance over the classes."
        )
        batch_norm: float = Field(
            default=0.0,
            ge=0,
            description=(
                "Weight of the distance of the images' statistics from those of the teacher's batch"
                " norms, which the paper does without."
            ),
        )
        every: int = Field(
            default=5, ge=1, description="Steps of the student for one of the generator."
        )

    options: Options

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        o = self.options
        taps = ["penultimate"] if o.activation else []
        networks = Networks(models, taps, batch_norm=o.batch_norm > 0)
        generator = Generator(o.latent, o.width, networks.shape).to(networks.device)
        optimizer = torch.optim.Adam(generator.parameters(), lr=o.lr, betas=(0.5, 0.999))
        shown: dict[str, Tensor] = {}
        due = Every(o.every)

        def loss(images: Tensor) -> Tensor:
            answer = networks.answer(images)
            total = o.one_hot * F.cross_entropy(answer.logits, answer.logits.argmax(1))
            total = total + o.balance * balance(answer.logits)
            if o.activation:
                total = total - o.activation * answer.features["penultimate"].abs().mean()
            if o.batch_norm:
                total = total + o.batch_norm * networks.statistics.distance(answer.features)
            return total

        def prepare(batch: kdkit.Batch, moment: kdkit.Moment) -> kdkit.Batch:
            count = len(batch.index)
            if due(moment.step):
                descend(loss(generator(networks.noise(count, o.latent))), optimizer)
            with torch.no_grad():
                images = generator(networks.noise(count, o.latent))
            shown["generated"] = images[:SHOWN]
            return replace(batch, inputs=images)

        yield kdkit.Stage(
            "train",
            [networks.student],
            kdkit.teach(networks.student, [networks.teacher]),
            prepare=prepare,
            keeps={"generator": generator, "optimizer": optimizer},
            pictures=lambda: shown,
        )


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [Dafl]
