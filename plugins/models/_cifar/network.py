"""What the CIFAR networks share: features, global average pooling, one linear classifier; and
timm's ways to ask for them.
"""

import abc
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F


class CifarNetwork(nn.Module, abc.ABC):
    """A classifier of small images with timm's interface. `feature_info` lists the stages that
    the tables compare, without the stem.

    No activation works in place, so that every layer can be tapped.
    """

    head: ClassVar[str] = "fc"
    """Name of the classifier."""
    other_names: ClassVar[Mapping[str, str]] = {}
    """Steps of a weight's path as other public code bases call them, and as they are called
    here.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        # timm reads both names; `finish` sets them once the layers are known
        self.num_features = self.head_hidden_size = 0
        self.feature_info: list[dict[str, str | int]] = []

    def finish(self, num_features: int, stages: Sequence[tuple[str, int, int]]) -> None:
        """Add the classifier, and tell the stages: path, channels, by how much the image has
        become smaller.
        """
        self.num_features = self.head_hidden_size = num_features
        self.feature_info = [
            {"module": path, "num_chs": channels, "reduction": reduction}
            for path, channels, reduction in stages
        ]
        self.reset_classifier(self.num_classes)

    @abc.abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map (B, C, H, W) of images (B, 3, H, W)."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K), or with `pre_logits` the embedding (B, C), of the last feature map."""
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of images (B, 3, H, W)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The layer from embedding to logits."""
        return self.get_submodule(self.head)

    # `global_pool` is timm's to give; these networks know one pooling
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put in a new classifier; for 0 classes, none."""
        self.num_classes = num_classes
        self.set_submodule(
            self.head, nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        )


def initialize(
    network: nn.Module, linear_std: float | None = None, *, zero_linear_bias: bool = False
) -> None:
    """Draw convolutions as He et al. do (fan-out); linear layers with deviation `linear_std` and
    bias 0, or else as torch does.

    Batch norms have weight 1 and bias 0 from the start.
    """
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        if isinstance(part, nn.Linear) and linear_std is not None:
            nn.init.normal_(part.weight, std=linear_std)
        if isinstance(part, nn.Linear) and (zero_linear_bias or linear_std is not None):
            nn.init.zeros_(part.bias)


def conv3x3(inside: int, outside: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(inside: int, outside: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 1, stride, groups=groups, bias=False)
