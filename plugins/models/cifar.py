"""The backbones of the CIFAR-100 distillation tables, for images of 32 pixels.

Tian et al., "Contrastive Representation Distillation", ICLR 2020, arXiv:1910.10699, tables 1 and 2;
later papers compare on the same networks. Each has the parameters, the initial weights and the
names of weights of the tables' code bases (RepDistiller, mdistiller), so that their checkpoints
load as they are.
"""

import difflib
from typing import Any, Literal, cast

from pydantic import Field
from torch import nn

import kdkit


class CifarSource(kdkit.ModelSource):
    """Backbones of the CIFAR-100 tables: `model: cifar/resnet20`, wrn_40_2, vgg8,
    shufflenet_v2...; timm knows them as `cifar_resnet20`.
    """

    name = "cifar"

    class Options(kdkit.ModelOptions):
        """Which variant."""

        shortcut: Literal["conv", "pad"] = Field(
            default="conv",
            description=(
                "ResNets: what a shortcut is where the shape changes. conv: 1x1 convolution and"
                " batch norm; pad: every second pixel and channels of zeros, as in the first paper"
                " and akamaster's CIFAR-10 weights."
            ),
        )

    options: Options

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """The network by `timm.create_model`, with random weights."""
        # here: timm takes long to load, and `import kdkit` must not
        import timm

        from ._cifar.registration import ARCHITECTURES, PREFIX
        from ._cifar.resnet import ResNet

        if self.model_name not in ARCHITECTURES:
            close = difflib.get_close_matches(self.model_name, ARCHITECTURES, n=3, cutoff=0.4)
            raise kdkit.ModelError(
                f"there is no 'cifar/{self.model_name}'; did you mean one of:"
                f" {', '.join(close or ARCHITECTURES)}"
            )
        arguments: dict[str, Any] = {}
        if self.options.shortcut != "conv":
            if ARCHITECTURES[self.model_name][0] is not ResNet:
                raise kdkit.ModelError(
                    f"`shortcut: {self.options.shortcut}` is for the ResNets, not for"
                    f" '{self.model_name}'"
                )
            arguments["shortcut"] = self.options.shortcut
        return timm.create_model(
            PREFIX + self.model_name, num_classes=num_classes, in_chans=image_shape[0], **arguments
        )

    def normalization(self, module: nn.Module) -> kdkit.Normalize:
        """CIFAR-100's, as in the code bases of the tables."""
        from ._cifar.registration import MEAN, STD

        return kdkit.Normalize(mean=MEAN, std=STD)

    def rename(self, key: str, module: nn.Module) -> str:
        """Other code bases call a ResNet's classifier `linear`, and the layers of its shortcuts
        `shortcut`.
        """
        from ._cifar.network import CifarNetwork

        names = cast(CifarNetwork, module).other_names
        return ".".join(names.get(step, step) for step in key.split("."))


@kdkit.hookimpl
def kdkit_models() -> list[type[kdkit.ModelSource]]:
    return [CifarSource]
