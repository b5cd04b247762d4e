"""Wide residual networks.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, arXiv:1605.07146: normalisation and
activation come before each convolution, so a stage's output is a sum without activation; the next
stage's first batch norm begins its pre-activation.
"""

from collections import OrderedDict

from torch import Tensor, nn

from .network import CifarNetwork, conv1x1, conv3x3, initialize


class WideResNet(CifarNetwork):
    """Stages `block1` to `block3`; the pre-activations behind them are `block2.layer.0.bn1`,
    `block3.layer.0.bn1` and `bn1`.

    Weights have the names that RepDistiller and mdistiller give them.
    """

    def __init__(self, depth: int, factor: int, num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__(num_classes)
        widths = [16, 16 * factor, 32 * factor, 64 * factor]
        self.conv1 = conv3x3(in_chans, widths[0])
        self.block1 = _stage(widths[0], widths[1], 1, (depth - 4) // 6)
        self.block2 = _stage(widths[1], widths[2], 2, (depth - 4) // 6)
        self.block3 = _stage(widths[2], widths[3], 2, (depth - 4) // 6)
        self.bn1, self.act1 = nn.BatchNorm2d(widths[3]), nn.ReLU()
        self.finish(widths[3], [(f"block{i}", widths[i], 2 ** (i - 1)) for i in (1, 2, 3)])
        initialize(self, zero_linear_bias=True)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        activated: Tensor = self.act1(self.bn1(x))
        return activated


class PreactivatedBlock(nn.Module):
    """Two times normalisation, activation and a 3x3 convolution, beside a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.act1 = nn.ReLU()
        self.conv1 = conv3x3(inside, outside, stride)
        self.bn2 = nn.BatchNorm2d(outside)
        self.act2 = nn.ReLU()
        self.conv2 = conv3x3(outside, outside)
        # spelt as in the tables' code bases, whose weights load by name
        self.convShortcut = conv1x1(inside, outside, stride) if inside != outside else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.act1(self.bn1(x))
        y: Tensor = self.conv2(self.act2(self.bn2(self.conv1(activated))))
        # a convolution takes the activated input, an identity the input itself, as in the paper
        return y + (x if self.convShortcut is None else self.convShortcut(activated))


def _stage(inside: int, outside: int, stride: int, depth: int) -> nn.Sequential:
    blocks = [
        PreactivatedBlock(outside if i else inside, outside, 1 if i else stride)
        for i in range(depth)
    ]
    # `layer`, as in the tables' code bases
    return nn.Sequential(OrderedDict(layer=nn.Sequential(*blocks)))
