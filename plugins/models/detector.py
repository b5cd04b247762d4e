"""Detectors on any of timm's backbones, with torchvision's feature pyramid and heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import Tensor, nn

import kdkit

HEADS = ("fcos", "gfl", "retinanet")
FINEST = 8  # stride of the finest map of a pyramid


class DetectorSource(kdkit.ModelSource):
    """Detectors with equal heads on timm's backbones: `model: detector/fcos`, `detector/retinanet`
    or `detector/gfl` with `backbone: resnet18`, any of timm's that gives maps of features.

    A pyramid (Lin et al., CVPR 2017, arXiv:1612.03144) of `width` channels takes the backbone's
    maps of strides 8, 16 and 32 and adds two coarser ones; the heads are torchvision's, or that of
    the generalized focal loss (Li et al., NeurIPS 2020, arXiv:2006.04388) on the points of FCOS,
    which gives distributions of boxes. Two of one kind have equal rows and equal maps in the
    pyramid, whatever their backbones: `backbone.fpn.layer_blocks.*` are its maps of strides 8, 16
    and 32. Stages (`stage1`...) are the backbone's, from the first of stride 8 on.
    """

    name = "detector"

    class Options(kdkit.ModelOptions):
        """The backbone, and the size of pyramid and heads."""

        backbone: str = Field(description="Name of timm's backbone, such as `resnet18`.")
        pretrained: bool = Field(
            default=False,
            description="Start from the backbone's pretrained weights of timm (downloaded once).",
        )
        width: int = Field(
            default=256,
            ge=64,
            le=4096,
            multiple_of=32,
            description="Channels of the pyramid and the heads, a multiple of 32.",
        )
        bins: int = Field(
            default=16,
            gt=0,
            le=256,
            description="Of `detector/gfl`: largest distance of a box's side, in strides of a map.",
        )
        args: kdkit.NetworkArguments = Field(
            default_factory=dict, description="Arguments of timm's backbone."
        )

    options: Options

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """The network with random weights."""
        from ._detectors import as_network

        if self.model_name not in HEADS:
            raise kdkit.ModelError(
                f"there is no detector '{self.model_name}'; allowed: {', '.join(HEADS)}"
            )
        backbone = self._backbone(image_shape[0], pretrained=False)
        network = as_network(
            _headed(
                self.model_name, _pyramid(backbone, self.options), num_classes, self.options.bins
            )
        )
        network.feature_info = _stages(backbone)  # type: ignore[assignment]
        return network

    def load(self, module: nn.Module) -> None:
        """Load timm's pretrained weights of the backbone; pyramid and heads keep random ones."""
        if not self.options.pretrained:
            return
        donor = self._backbone(self.in_channels(3), pretrained=True)
        module.get_submodule("backbone.body").load_state_dict(donor.state_dict())

    def normalization(self, module: nn.Module) -> kdkit.Normalize | None:
        """What timm's `pretrained_cfg` of the backbone says."""
        if not self.options.pretrained:
            return None
        import timm

        config = timm.get_pretrained_cfg(self.options.backbone)
        if config is None or config.mean is None or config.std is None:
            return None
        return kdkit.Normalize(mean=tuple(config.mean), std=tuple(config.std))

    def in_channels(self, image_channels: int) -> int:
        """Colour for pretrained backbones, and the images' own channels for others."""
        return 3 if self.options.pretrained else image_channels

    def _backbone(self, channels: int, *, pretrained: bool) -> Any:
        """Make timm's network of features, from stride 8 on."""
        import timm

        made: dict[str, Any] = {"features_only": True, "in_chans": channels, **self.options.args}
        try:
            whole: Any = timm.create_model(self.options.backbone, **made)
            strides = whole.feature_info.reduction()
            chosen = [i for i, stride in enumerate(strides) if stride >= FINEST]
            if not chosen:
                raise ValueError(f"its maps have the strides {strides}, none of 8 and more")
            backbone: Any = timm.create_model(
                self.options.backbone, out_indices=chosen, pretrained=pretrained, **made
            )
        except Exception as error:  # timm and its networks refuse names and arguments in many ways
            raise kdkit.ModelError(
                f"timm's '{self.options.backbone}' is no backbone of a detector:"
                f" {kdkit.cause(error)}"
            ) from error
        return backbone


class Pyramid(nn.Module):
    """A backbone with a feature pyramid: maps by name, the finest first."""

    def __init__(self, body: nn.Module, channels: list[int], width: int) -> None:
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork
        from torchvision.ops.feature_pyramid_network import LastLevelP6P7

        self.body = body
        self.fpn = FeaturePyramidNetwork(channels, width, extra_blocks=LastLevelP6P7(width, width))
        self.out_channels = width

    def forward(self, images: Tensor) -> Mapping[str, Tensor]:
        maps = {str(i): f for i, f in enumerate(self.body(images))}
        found: Mapping[str, Tensor] = self.fpn(maps)
        return found


def _pyramid(backbone: Any, options: DetectorSource.Options) -> Pyramid:
    return Pyramid(backbone, backbone.feature_info.channels(), options.width)


def _headed(name: str, backbone: Pyramid, classes: int, bins: int) -> nn.Module:
    """Put a head on a backbone, with one anchor size for each map of the pyramid."""
    from torchvision.models.detection import FCOS, RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    features: Any = backbone.body
    strides = [int(stride) for stride in features.feature_info.reduction()]
    strides += [2 * strides[-1], 4 * strides[-1]]
    points = AnchorGenerator(tuple((s,) for s in strides), ((1.0,),) * len(strides))
    if name == "gfl":
        from ._gfl import Gfl

        return Gfl(backbone, classes, points, bins)
    if name == "fcos":
        fcos: nn.Module = FCOS(backbone, classes, anchor_generator=points)
        return fcos
    # three sizes of four strides and more, as in the paper
    sizes = tuple(tuple(int(4 * s * 2 ** (i / 3)) for i in range(3)) for s in strides)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    retina: nn.Module = RetinaNet(backbone, classes, anchor_generator=anchors)
    return retina


def _stages(backbone: Any) -> list[dict[str, str]]:
    """Name the backbone's stages by their paths in the whole network, in timm's form."""
    # timm's networks of features name modules with `_` in place of dots
    paths = {path.replace(".", "_"): path for path, _ in backbone.named_modules()}
    names = [entry["module"].replace(".", "_") for entry in backbone.feature_info.info]
    return [{"module": f"backbone.body.{paths[name]}"} for name in names if name in paths]


@kdkit.hookimpl
def kdkit_models() -> list[type[kdkit.ModelSource]]:
    return [DetectorSource]
