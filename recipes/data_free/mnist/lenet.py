"""LeNet-5 (LeCun et al. 1998) with batch norm, of whose channels a share is kept."""

from torch import nn


class LeNet(nn.Sequential):
    """Images (B, 1, 28, 28) to logits; `share: 0.5` is the LeNet-5-half that the papers teach."""

    def __init__(self, num_classes: int, share: float = 1.0) -> None:
        first, second, third, hidden = (int(share * width) for width in (6, 16, 120, 84))
        super().__init__(
            nn.Conv2d(1, first, 5, padding=2),
            nn.BatchNorm2d(first),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 5),
            nn.BatchNorm2d(second),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(second, third, 5),
            nn.BatchNorm2d(third),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(third, hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )
