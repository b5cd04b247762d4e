"""Distribution matching: images whose mean embedding is that of the real ones, in many random
networks.

Zhao, Bilen, "Dataset Condensation with Distribution Matching", WACV 2023, arXiv:2110.04181,
equation 4: a network with new random weights in each step, the squared distance of each class's
mean embeddings summed over the classes, one augmentation for the real and the learnt images of a
class, SGD with a learning rate of 1 and a momentum of 0.5 from real images.

The augmentation is a turn, a resizing and a shift, drawn once for each class and step; the paper's
also changes colours and cuts out squares (its flip is an option here).
"""

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit

from ._random import chosen


class DistributionMatching(kdkit.DataDistiller):
    """Images that are learnt so that random networks of the recipe's student embed each class as
    they embed the real images: their means agree.
    """

    name = "dm"

    class Options(kdkit.DataDistillerOptions):
        steps: int = Field(default=1000, ge=1, description="Steps of SGD; the paper has 20,000.")
        lr: float = Field(default=1.0, gt=0, description="Learning rate of the images.")
        momentum: float = Field(default=0.5, ge=0, lt=1, description="Momentum of SGD.")
        real: int = Field(
            default=256, gt=0, description="Real images of each class in a step, drawn at random."
        )
        turn: float = Field(default=15.0, ge=0, le=180, description="Largest turn, degrees.")
        resize: float = Field(
            default=1.2, ge=1, le=4, description="Largest factor of the size, and 1 over it."
        )
        shift: float = Field(
            default=0.125, ge=0, le=1, description="Largest shift, in parts of the side."
        )
        flip: bool = Field(default=False, description="Also flip, where left may be right.")

    options: Options

    def distill(self, material: kdkit.Material) -> kdkit.DistilledData:
        options, count = self.options, self.options.images_per_class
        first = chosen(material, count)
        images = (first.images.float() / 255).requires_grad_()
        optimizer = torch.optim.SGD([images], options.lr, options.momentum)
        for step in range(1, options.steps + 1):
            network = material.student()
            network.module.requires_grad_(False)
            real, total = material.drawn(options.real), 0.0
            optimizer.zero_grad()
            for number in range(material.classes):
                places = real[number * options.real : (number + 1) * options.real]
                learnt = images[number * count : (number + 1) * count]
                move = self.drawn(images)
                with torch.no_grad():
                    aim = embedded(network, moved(material.images[places].float() / 255, move))
                distance = (embedded(network, moved(learnt, move)) - aim).square().sum()
                # class by class: gradients add up, and memory holds one class
                distance.backward()  # type: ignore[no-untyped-call]
                total += distance.item()
            optimizer.step()
            material.tell(step, options.steps, f"distance {total:.4f}")
        return kdkit.DistilledData(images.detach(), first.labels)

    def drawn(self, like: Tensor) -> Tensor:
        """Draw an affine map (2, 3) of image coordinates in [-1, 1]."""
        turn, size, right, down, side = (2 * torch.rand(5, device=like.device) - 1).unbind()
        angle = turn * self.options.turn * math.pi / 180
        factor = self.options.resize**size
        sign = side.sign() if self.options.flip else torch.ones_like(side)
        shifts = 2 * self.options.shift * torch.stack([right, down])
        rows = torch.stack([angle.cos() * sign, -angle.sin(), angle.sin() * sign, angle.cos()])
        return torch.cat([rows.view(2, 2) * factor, shifts[:, None]], 1)


def moved(images: Tensor, move: Tensor) -> Tensor:
    """Move all images (N, C, H, W) alike; what comes in from outside is 0."""
    grid = F.affine_grid(move.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def embedded(network: kdkit.Model, images: Tensor) -> Tensor:
    """Mean embedding of the images, (D,).

    Raises:
        DataError: a batch norm cannot normalise so few values.
    """
    try:
        answer = network(images)
    except ValueError as error:
        raise kdkit.DataError(f"the student cannot embed {len(images)} images: {error}") from error
    return answer.features["penultimate"].flatten(1).mean(0)


@kdkit.hookimpl
def kdkit_distillers() -> list[type[kdkit.DataDistiller]]:
    return [DistributionMatching]
