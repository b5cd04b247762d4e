"""Multi-layer perceptrons, as in the first distillation experiments on MNIST (Hinton et al.,
arXiv:1503.02531, section 3).
"""

import re
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

import kdkit

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


class MLP(nn.Module):
    """Fully connected layers `layer1`, `layer2`, ... and a classifier `fc`, on the flattened
    image.
    """

    def __init__(
        self,
        inputs: int,
        hidden: list[int],
        num_classes: int,
        activation: str,
        dropout: float,
        input_dropout: float,
    ) -> None:
        super().__init__()
        self.input_dropout = nn.Dropout(input_dropout)
        self.depth = len(hidden)
        for number, (before, after) in enumerate(zip([inputs, *hidden], hidden, strict=False), 1):
            self.add_module(
                f"layer{number}",
                nn.Sequential(
                    nn.Linear(before, after), ACTIVATIONS[activation](), nn.Dropout(dropout)
                ),
            )
        self.fc = nn.Linear(hidden[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        x = self.input_dropout(images.flatten(1))
        for number in range(1, self.depth + 1):
            x = self.get_submodule(f"layer{number}")(x)
        logits: Tensor = self.fc(x)
        return logits


class MLPSource(kdkit.ModelSource):
    """Multi-layer perceptrons: `model: mlp/1200-1200` has two hidden layers of 1200 units."""

    name = "mlp"

    class Options(kdkit.ModelOptions):
        """How its layers work; their sizes are the model's name."""

        activation: Literal["relu", "gelu", "tanh"] = Field(
            default="relu", description="What follows each hidden layer."
        )
        dropout: float = Field(
            default=0.0, ge=0, lt=1, description="Share of the hidden units dropped while training."
        )
        input_dropout: float = Field(
            default=0.0, ge=0, lt=1, description="Share of the pixels dropped while training."
        )

    options: Options

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """A perceptron for flattened images."""
        # sizes have a bound, so that a slip is refused instead of filling the memory
        if not re.fullmatch(r"[1-9]\d{0,5}(-[1-9]\d{0,5}){0,99}", self.model_name):
            raise kdkit.ModelError(
                f"'{self.model_name}' is no list of hidden sizes, each below a million; write"
                " mlp/800-800 for two layers of 800 units"
            )
        channels, height, width = image_shape
        hidden = [int(size) for size in self.model_name.split("-")]
        options = self.options
        return MLP(
            channels * height * width,
            hidden,
            num_classes,
            options.activation,
            options.dropout,
            options.input_dropout,
        )


@kdkit.hookimpl
def kdkit_models() -> list[type[kdkit.ModelSource]]:
    return [MLPSource]
