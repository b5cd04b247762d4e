"""Residual networks for 32-pixel images.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385, section 4.2:
a 3x3 stem, three stages of n basic blocks, 6n + 2 layers. The distillation tables put a 1x1
convolution into shortcuts that change shape (the paper: zero padding), widen some networks (`x4`),
and add ImageNet's ResNet-50 behind the same stem.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from .network import CifarNetwork, conv1x1, conv3x3, initialize


class ResNet(CifarNetwork):
    """Stages `layer1`, `layer2`, ... of blocks; each block ends in a sum and an activation
    (`layer1.0.act2`, of bottlenecks `act3`).

    Weights have the names that RepDistiller, mdistiller and chenyaofo's CIFAR models give them.
    """

    other_names = {"linear": "fc", "shortcut": "downsample"}

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        stem: int,
        block: Literal["basic", "bottleneck"] = "basic",
        shortcut: Literal["conv", "pad"] = "conv",
        num_classes: int = 100,
        in_chans: int = 3,
    ) -> None:
        super().__init__(num_classes)
        self.conv1 = conv3x3(in_chans, stem)
        self.bn1 = nn.BatchNorm2d(stem)
        self.act1 = nn.ReLU()
        inside, stages = stem, []
        kind = BasicBlock if block == "basic" else Bottleneck
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            outside = width * kind.expansion
            strides = [2 if number else 1] + [1] * (depth - 1)
            blocks = [
                kind(outside if i else inside, width, stride, shortcut)
                for i, stride in enumerate(strides)
            ]
            self.add_module(f"layer{number + 1}", nn.Sequential(*blocks))
            # the stem is no stage: the tables compare the others
            stages.append((f"layer{number + 1}", outside, 2**number))
            inside = outside
        self.finish(inside, stages)
        initialize(self)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        for stage in self.feature_info:
            x = self.get_submodule(str(stage["module"]))(x)
        return x


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(
        self, inside: int, width: int, stride: int, shortcut: Literal["conv", "pad"]
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(inside, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        self.conv2, self.bn2 = conv3x3(width, width), nn.BatchNorm2d(width)
        self.downsample = _shortcut(inside, width, stride, shortcut)
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        summed: Tensor = self.act2(y + self.downsample(x))
        return summed


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, beside a shortcut."""

    expansion = 4

    def __init__(
        self, inside: int, width: int, stride: int, shortcut: Literal["conv", "pad"]
    ) -> None:
        super().__init__()
        self.conv1 = conv1x1(inside, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        # the stride is here, not in the first 1x1, as in the tables' code bases
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU()
        self.conv3, self.bn3 = conv1x1(width, 4 * width), nn.BatchNorm2d(4 * width)
        self.downsample = _shortcut(inside, 4 * width, stride, shortcut)
        self.act3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.act2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        summed: Tensor = self.act3(y + self.downsample(x))
        return summed


class PaddedShortcut(nn.Module):
    """Every `stride`-th pixel, and as many channels of zeros before as behind: shortcut A of the
    paper, without parameters.
    """

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.each_side, self.stride = new_channels // 2, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(
            x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.each_side, self.each_side)
        )


def _shortcut(inside: int, outside: int, stride: int, kind: Literal["conv", "pad"]) -> nn.Module:
    if stride == 1 and inside == outside:
        return nn.Identity()
    if kind == "pad":
        return PaddedShortcut(outside - inside, stride)
    return nn.Sequential(conv1x1(inside, outside, stride), nn.BatchNorm2d(outside))
