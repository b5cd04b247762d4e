"""The convolutional network on which distilled datasets are made and compared.

Gidaris, Komodakis, CVPR 2018; in the form of Zhao, Mopuri, Bilen, "Dataset Condensation with
Gradient Matching", ICLR 2021, arXiv:2006.05929: blocks of a 3x3 convolution, instance
normalisation, ReLU and average pooling, then a linear classifier. Their network has three blocks of
128 channels, `convnet/128-128-128`.
"""

import re

from torch import Tensor, nn

import kdkit


class ConvNet(nn.Module):
    """Blocks `block1`, `block2`, ... and a classifier `fc` on the flattened map."""

    def __init__(self, shape: tuple[int, int, int], widths: list[int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.depth = len(widths)
        for number, own in enumerate(widths, 1):
            self.add_module(
                f"block{number}",
                nn.Sequential(
                    nn.Conv2d(channels, own, 3, padding=1),
                    # a group for each channel: instance normalisation with learnt scales
                    nn.GroupNorm(own, own),
                    nn.ReLU(),
                    nn.AvgPool2d(2),
                ),
            )
            channels, height, width = own, height // 2, width // 2
        self.fc = nn.Linear(channels * height * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        x = images
        for number in range(1, self.depth + 1):
            x = self.get_submodule(f"block{number}")(x)
        logits: Tensor = self.fc(x.flatten(1))
        return logits


class ConvNetSource(kdkit.ModelSource):
    """Plain convolutional networks: `model: convnet/128-128-128` has three blocks, each of half the
    size of the one before.
    """

    name = "convnet"

    class Options(kdkit.ModelOptions):
        """Its channels are the model's name."""

    options: Options

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """A network for images of this size, which must be halved by each block."""
        if not re.fullmatch(r"[1-9]\d{0,3}(-[1-9]\d{0,3}){0,9}", self.model_name):
            raise kdkit.ModelError(
                f"'{self.model_name}' is no list of channels, each below 10,000; write"
                " convnet/128-128-128 for three blocks of 128"
            )
        widths = [int(size) for size in self.model_name.split("-")]
        if min(image_shape[1:]) < 2 ** len(widths):
            raise kdkit.ModelError(
                f"convnet/{self.model_name} halves images {len(widths)} times, and these are"
                f" {image_shape[1]} x {image_shape[2]}"
            )
        return ConvNet(image_shape, widths, num_classes)


@kdkit.hookimpl
def kdkit_models() -> list[type[kdkit.ModelSource]]:
    return [ConvNetSource]
