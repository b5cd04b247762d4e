"""RDED: mosaics of the crops that a teacher finds most like their class.

Sun, Shi, Yu, Guan, "On the Diversity and Realism of Distilled Dataset: An Efficient Dataset
Distillation Paradigm", CVPR 2024, arXiv:2312.03526. Of each of some images of a class, `crops`
random crops of half the side are cut out, padded with zeros to the full size, and scored by the
teacher's cross-entropy on the label; of each image the best crop stays, of a class the best
`tiles`^2 * `images_per_class`. They are put together, `tiles` by `tiles` in an image.

The paper's labels are the teacher's answers to crops of the mosaics while a student is trained: a
recipe with this teacher and `logit_kl` on `data.distilled` does that.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit

ROWS = 250
"""Crops that the teacher is asked about at once."""


class Rded(kdkit.DataDistiller):
    """Mosaics of real crops: those that the teacher recognises best as their class."""

    name = "rded"
    needs_teacher = True

    class Options(kdkit.DataDistillerOptions):
        tiles: int = Field(default=2, ge=1, le=16, description="Crops along each side of an image.")
        crops: int = Field(default=5, ge=1, description="Random crops of an image to choose from.")
        from_images: int = Field(
            default=300, gt=0, description="Images of a class that are cropped, at most."
        )

    options: Options

    def distill(self, material: kdkit.Material) -> kdkit.DistilledData:
        tiles, count = self.options.tiles, self.options.images_per_class
        teacher, found = material.teacher(), []
        for number in range(material.classes):
            own = material.of_class(number)
            own = own[torch.randperm(len(own), device=own.device)[: self.options.from_images]]
            if len(own) < tiles**2 * count:
                raise kdkit.DataError(
                    f"class {number} has {len(own)} images to crop, and its mosaics take"
                    f" {tiles**2 * count}: raise `from_images`, or ask for fewer images"
                )
            best, score = self.best(teacher, material.images[own].float() / 255, number)
            chosen = best[score.argsort(stable=True)[: tiles**2 * count]]
            found.append(mosaics(chosen, tiles, material.images.shape[2:]))
            material.tell(number + 1, material.classes, "classes")
        labels = torch.arange(material.classes, device=material.device).repeat_interleave(count)
        return kdkit.DistilledData(torch.cat(found), labels)

    def best(self, teacher: kdkit.Model, images: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """The best crop of each image, (N, C, h, w), and its cross-entropy (N,)."""
        height, width = (max(1, side // self.options.tiles) for side in images.shape[2:])
        crops, scores = [], []
        for _ in range(self.options.crops):
            cut = cropped(images, height, width)
            crops.append(cut)
            scores.append(
                torch.cat([self.doubt(teacher, c, images, number) for c in torch.split(cut, ROWS)])
            )
        score, place = torch.stack(scores).min(0)
        return torch.stack(crops)[place, torch.arange(len(images), device=place.device)], score

    def doubt(self, teacher: kdkit.Model, crops: Tensor, images: Tensor, number: int) -> Tensor:
        """The teacher's cross-entropy on the class, of crops padded to the images' size."""
        down, right = (a - b for a, b in zip(images.shape[2:], crops.shape[2:], strict=True))
        sides = (right // 2, right - right // 2, down // 2, down - down // 2)
        with torch.no_grad():
            logits = teacher(F.pad(crops, sides)).logits.float()
        return -logits.log_softmax(1)[:, number]


def cropped(images: Tensor, height: int, width: int) -> Tensor:
    """A random crop of each image (N, C, H, W)."""

    def places(size: int, side: int) -> Tensor:
        first = torch.randint(size - side + 1, (len(images), 1), device=images.device)
        return first + torch.arange(side, device=images.device)

    rows, columns = places(images.shape[2], height), places(images.shape[3], width)
    number = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    # indices around the channels' slice put the channels last
    return images[number, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def mosaics(crops: Tensor, tiles: int, size: torch.Size) -> Tensor:
    """Put crops (M * tiles^2, C, h, w) together to images (M, C, *size)."""
    _, channels, height, width = crops.shape
    whole = crops.view(-1, tiles, tiles, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    return F.interpolate(
        whole.reshape(-1, channels, tiles * height, tiles * width), list(size), mode="nearest"
    )


@kdkit.hookimpl
def kdkit_distillers() -> list[type[kdkit.DataDistiller]]:
    return [Rded]
