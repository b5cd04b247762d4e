"""MobileNetV2 for 32-pixel images.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018,
arXiv:1801.04381, as the distillation tables have it: half as wide (each width is cut down to a
whole number, the last of 1280 channels stays), plain ReLU, an expanding convolution in the first
block too.
"""

from torch import Tensor, nn

from .network import CifarNetwork, conv1x1, conv3x3, initialize

SETTING = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, width, blocks and first stride of each row of blocks."""
LAST = 1280
STAGES = {1: 2, 2: 4, 4: 8, 6: 16}
"""Rows that the tables compare, and by how much the image has become smaller there."""


class MobileNetV2(CifarNetwork):
    """Rows `blocks.0` to `blocks.6` of linear bottlenecks: their outputs have no activation. The
    stages are rows 1, 2, 4 and 6.

    Weights have the names that RepDistiller and mdistiller give them.
    """

    head = "classifier.0"

    def __init__(self, factor: float, num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__(num_classes)
        inside = int(32 * factor)
        self.conv1 = nn.Sequential(conv3x3(in_chans, inside, 2), nn.BatchNorm2d(inside), nn.ReLU())
        self.blocks = nn.ModuleList()
        for expansion, width, depth, stride in SETTING:
            outside = int(width * factor)
            row = [
                LinearBottleneck(outside if i else inside, outside, 1 if i else stride, expansion)
                for i in range(depth)
            ]
            self.blocks.append(nn.Sequential(*row))
            inside = outside
        self.conv2 = nn.Sequential(conv1x1(inside, LAST), nn.BatchNorm2d(LAST), nn.ReLU())
        # a sequence of one, as the tables' code bases have it: the weight is `classifier.0.weight`
        self.classifier = nn.Sequential(nn.Identity())
        self.finish(
            LAST,
            [
                (f"blocks.{row}", int(SETTING[row][1] * factor), reduction)
                for row, reduction in STAGES.items()
            ],
        )
        initialize(self, linear_std=0.01)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for row in self.blocks:
            x = row(x)
        last: Tensor = self.conv2(x)
        return last


class LinearBottleneck(nn.Module):
    """Expand, convolve each channel, project; beside an identity where the shape stays."""

    def __init__(self, inside: int, outside: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inside * expansion
        expand = conv1x1(inside, width), nn.BatchNorm2d(width), nn.ReLU()
        depthwise = conv3x3(width, width, stride, groups=width), nn.BatchNorm2d(width), nn.ReLU()
        self.conv = nn.Sequential(
            *expand, *depthwise, conv1x1(width, outside), nn.BatchNorm2d(outside)
        )
        self.residual = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.residual else y
