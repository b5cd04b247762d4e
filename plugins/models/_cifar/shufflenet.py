"""ShuffleNet V1 and V2 for 32-pixel images.

Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices",
CVPR 2018, arXiv:1707.01083, with 3 groups; Ma et al., "ShuffleNet V2: Practical Guidelines for
Efficient CNN Architecture Design", ECCV 2018, arXiv:1807.11164, width 1. As the distillation tables
have them: a 1x1 stem without pooling; in V1 an activation behind the depthwise convolution too, and
in blocks of stride 2 an inner width that is a quarter of the channels that the block adds.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .network import CifarNetwork, conv1x1, conv3x3

STEM = 24
GROUPS = 3
V1_WIDTHS, V1_DEPTHS = (240, 480, 960), (4, 8, 4)
V2_WIDTHS = (116, 232, 464)
V2_DEPTHS = (4, 8, 4)
V2_LAST = 1024


class ShuffleNet(CifarNetwork):
    """What both versions share: stem, stages `layer1` to `layer3`, classifier. Weights are drawn
    as torch does.

    They have the names that RepDistiller and mdistiller give them.
    """

    head = "linear"

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__(num_classes)
        self.conv1 = conv1x1(in_chans, STEM)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.act1 = nn.ReLU()

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        for stage in self.feature_info:
            x = self.get_submodule(str(stage["module"]))(x)
        return x


class ShuffleNetV1(ShuffleNet):
    """Version 1: grouped bottlenecks; each ends in a sum (or concatenation) and an activation
    (`layer1.0.act3`).
    """

    def __init__(self, num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__(num_classes, in_chans)
        inside = STEM
        for number, (width, depth) in enumerate(zip(V1_WIDTHS, V1_DEPTHS, strict=True), 1):
            blocks = [
                GroupedBottleneck(width if i else inside, width, 1 if i else 2)
                for i in range(depth)
            ]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            inside = width
        self.finish(inside, [(f"layer{i}", width, 2**i) for i, width in enumerate(V1_WIDTHS, 1)])


class ShuffleNetV2(ShuffleNet):
    """Version 2: half of the channels pass by; a block ends in an activation (`layer1.1.act3`)
    and a shuffle.
    """

    def __init__(self, num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__(num_classes, in_chans)
        inside = STEM
        for number, (width, depth) in enumerate(zip(V2_WIDTHS, V2_DEPTHS, strict=True), 1):
            rest = [SplitBlock(width // 2) for _ in range(depth - 1)]
            self.add_module(f"layer{number}", nn.Sequential(DownBlock(inside, width // 2), *rest))
            inside = width
        self.conv2 = conv1x1(inside, V2_LAST)
        self.bn2 = nn.BatchNorm2d(V2_LAST)
        self.act2 = nn.ReLU()
        self.finish(V2_LAST, [(f"layer{i}", width, 2**i) for i, width in enumerate(V2_WIDTHS, 1)])

    def forward_features(self, x: Tensor) -> Tensor:
        last: Tensor = self.act2(self.bn2(self.conv2(super().forward_features(x))))
        return last


class GroupedBottleneck(nn.Module):
    """1x1 in groups, shuffle, 3x3 depthwise, 1x1 in groups; added to the input, or with stride 2
    put beside the pooled input.
    """

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        added = outside - inside if stride == 2 else outside
        # the stem's few channels are not split into groups, as in the paper
        width, self.groups = added // 4, 1 if inside == STEM else GROUPS
        self.conv1 = conv1x1(inside, width, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        self.conv2 = conv3x3(width, width, stride, groups=width)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU()
        self.conv3, self.bn3 = conv1x1(width, added, groups=GROUPS), nn.BatchNorm2d(added)
        self.act3, self.stride = nn.ReLU(), stride

    def forward(self, x: Tensor) -> Tensor:
        y = F.channel_shuffle(self.act1(self.bn1(self.conv1(x))), self.groups)
        y = self.bn3(self.conv3(self.act2(self.bn2(self.conv2(y)))))
        joined = y + x if self.stride == 1 else torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1)
        activated: Tensor = self.act3(joined)
        return activated


class DownBlock(nn.Module):
    """Two branches of stride 2, put beside each other and shuffled."""

    def __init__(self, inside: int, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inside, inside, 2, groups=inside), nn.BatchNorm2d(inside)
        self.conv2 = conv1x1(inside, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU()
        self.conv3 = conv1x1(inside, width)
        self.bn3 = nn.BatchNorm2d(width)
        self.act3 = nn.ReLU()
        self.conv4, self.bn4 = conv3x3(width, width, 2, groups=width), nn.BatchNorm2d(width)
        self.conv5 = conv1x1(width, width)
        self.bn5 = nn.BatchNorm2d(width)
        self.act5 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        short = self.act2(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        long = self.bn4(self.conv4(self.act3(self.bn3(self.conv3(x)))))
        long = self.act5(self.bn5(self.conv5(long)))
        return F.channel_shuffle(torch.cat([short, long], 1), 2)


class SplitBlock(nn.Module):
    """One half of the channels is convolved, the other passes by."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = conv1x1(width, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        self.conv2, self.bn2 = conv3x3(width, width, groups=width), nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, width)
        self.bn3 = nn.BatchNorm2d(width)
        self.act3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        passing, half = x.chunk(2, 1)
        half = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(half)))))
        half = self.bn3(self.conv3(half))
        # What passes by is positive: activating it too changes nothing, and makes the whole
        # pre-activation one tensor to tap.
        return F.channel_shuffle(self.act3(torch.cat([passing, half], 1)), 2)
