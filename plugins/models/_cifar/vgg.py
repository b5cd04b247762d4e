"""VGG networks with batch norm and a single linear classifier.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR
2015, arXiv:1409.1556, as the distillation tables have them: global average pooling in place of the
fully connected layers, and no pooling before the last block of a 32-pixel image.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from .network import CifarNetwork, initialize

WIDTHS = (64, 128, 256, 512, 512)


class VGG(CifarNetwork):
    """Blocks `block0` to `block4`, each ending in its activation; the stages are `block1` to
    `block4`.

    The pre-activation of a block is the input of its last layer, such as `block1.2@input`. Weights
    have the names that RepDistiller and mdistiller give them.
    """

    head = "classifier"

    def __init__(self, depths: Sequence[int], num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__(num_classes)
        for number, (inside, width, depth) in enumerate(
            zip((in_chans, *WIDTHS), WIDTHS, depths, strict=False)
        ):
            layers: list[nn.Module] = []
            for i in range(depth):
                layers += [
                    nn.Conv2d(width if i else inside, width, 3, padding=1),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
            self.add_module(f"block{number}", nn.Sequential(*layers))
        self.pool = nn.MaxPool2d(2)
        # The last activation of a block is the block's output, and cannot be taken for a stem as a
        # single convolution might.
        self.finish(
            WIDTHS[-1],
            [(f"block{i}.{3 * depths[i] - 1}", WIDTHS[i], 2 ** min(i, 3)) for i in (1, 2, 3, 4)],
        )
        initialize(self, linear_std=0.01)

    def forward_features(self, x: Tensor) -> Tensor:
        # a 32-pixel image has 4 x 4 positions left there, which the tables compare
        large = x.shape[2] >= 64
        for number in range(len(WIDTHS)):
            if 1 <= number <= 3 or (number == 4 and large):
                x = self.pool(x)
            x = self.get_submodule(f"block{number}")(x)
        return x
