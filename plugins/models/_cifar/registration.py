"""Tells timm of the CIFAR networks: `timm.create_model("cifar_resnet20")` once this is imported."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from .mobilenet import MobileNetV2
from .network import CifarNetwork
from .resnet import ResNet
from .shufflenet import ShuffleNetV1, ShuffleNetV2
from .vgg import VGG
from .wide_resnet import WideResNet

# timm has networks of its own called resnet50 or vgg11
PREFIX = "cifar_"
# CIFAR-100, as the code bases of the tables have it
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def _resnet(depth: int, factor: int = 1) -> tuple[type[CifarNetwork], dict[str, Any]]:
    # `x4` makes the stages four times as wide, and the stem twice, as in the tables' code bases
    stem = 16 if factor == 1 else 32
    return ResNet, {
        "depths": [(depth - 2) // 6] * 3,
        "widths": [16 * factor, 32 * factor, 64 * factor],
        "stem": stem,
    }


ARCHITECTURES: Mapping[str, tuple[type[CifarNetwork], dict[str, Any]]] = {
    **{f"resnet{depth}": _resnet(depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": _resnet(depth, 4) for depth in (8, 32)},
    "resnet50": (
        ResNet,
        {"depths": [3, 4, 6, 3], "widths": [64, 128, 256, 512], "stem": 64, "block": "bottleneck"},
    ),
    **{
        f"wrn_{depth}_{factor}": (WideResNet, {"depth": depth, "factor": factor})
        for depth in (16, 40)
        for factor in (1, 2)
    },
    "vgg8": (VGG, {"depths": [1, 1, 1, 1, 1]}),
    "vgg11": (VGG, {"depths": [1, 1, 2, 2, 2]}),
    "vgg13": (VGG, {"depths": [2, 2, 2, 2, 2]}),
    "vgg16": (VGG, {"depths": [2, 2, 3, 3, 3]}),
    "vgg19": (VGG, {"depths": [2, 2, 4, 4, 4]}),
    "mobilenet_v2": (MobileNetV2, {"factor": 0.5}),
    "shufflenet_v1": (ShuffleNetV1, {}),
    "shufflenet_v2": (ShuffleNetV2, {}),
}


def _config(network: type[CifarNetwork]) -> dict[str, Any]:
    sizes = {
        "input_size": (3, 32, 32),
        "fixed_input_size": False,
        "num_classes": 100,
        # images of 32 pixels are shown whole
        "crop_pct": 1.0,
        "interpolation": "bilinear",
    }
    first = "conv1.0" if network is MobileNetV2 else "block0.0" if network is VGG else "conv1"
    return {**sizes, "mean": MEAN, "std": STD, "first_conv": first, "classifier": network.head}


def _entry(name: str) -> Callable[..., nn.Module]:
    network, arguments = ARCHITECTURES[name]

    def build(pretrained: bool = False, **others: Any) -> nn.Module:
        make = functools.partial(build_model_with_cfg, network, PREFIX + name, pretrained)
        built: nn.Module = make(
            feature_cfg={"feature_cls": "hook", "out_indices": ()}, **{**arguments, **others}
        )
        return built

    build.__name__ = PREFIX + name
    return build


default_cfgs = generate_default_cfgs(
    {PREFIX + name: _config(network) for name, (network, _) in ARCHITECTURES.items()}
)
for _name in ARCHITECTURES:
    register_model(_entry(_name))
