"""segmentation-models-pytorch: decoders of segmentation on any of timm's backbones."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import Field
from torch import nn

import kdkit

ENCODERS = "tu-"  # prefix of timm's backbones in smp


class SmpSource(kdkit.ModelSource):
    """segmentation-models-pytorch (smp): `model: smp/unet` with `encoder: resnet18`, any of timm's
    backbones. Needs the extra `segmentation`.

    Decoders: unet, unetplusplus, manet, linknet, fpn, pspnet, deeplabv3, deeplabv3plus, pan,
    upernet, segformer, dpt. They answer (B, K, H, W) at the images' size, whose sides most of them
    need to be multiples of 32. Stages (`stage1`...) are the backbone's.
    """

    name = "smp"

    class Options(kdkit.ModelOptions):
        """The backbone, and what the model is created with."""

        encoder: str = Field(description="Name of timm's backbone, such as `resnet18`.")
        pretrained: bool = Field(
            default=False,
            description="Start from the backbone's pretrained weights of timm (downloaded once).",
        )
        args: kdkit.NetworkArguments = Field(
            default_factory=dict,
            description="Arguments of the decoder, such as `decoder_channels` or `encoder_depth`.",
        )

    options: Options

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """The network by smp's `create_model`, with random weights."""
        return self._create(num_classes, image_shape[0], pretrained=False)

    def load(self, module: nn.Module) -> None:
        """Load timm's pretrained weights of the backbone; the decoder keeps random ones."""
        if not self.options.pretrained:
            return
        donor = self._create(num_classes=1, channels=self.in_channels(3), pretrained=True)
        module.get_submodule("encoder").load_state_dict(donor.get_submodule("encoder").state_dict())

    def normalization(self, module: nn.Module) -> kdkit.Normalize | None:
        """What timm's `pretrained_cfg` of the backbone says."""
        if not self.options.pretrained:
            return None
        import timm

        config = timm.get_pretrained_cfg(self.options.encoder)
        if config is None or config.mean is None or config.std is None:
            return None
        return kdkit.Normalize(mean=tuple(config.mean), std=tuple(config.std))

    def in_channels(self, image_channels: int) -> int:
        """Colour for pretrained backbones, and the images' own channels for others."""
        return 3 if self.options.pretrained else image_channels

    def _create(self, num_classes: int, channels: int, *, pretrained: bool) -> nn.Module:
        smp = _library()
        known = [*smp.MODEL_ARCHITECTURES_MAPPING]
        if self.model_name not in known:
            close = difflib.get_close_matches(self.model_name, known, n=3, cutoff=0.4)
            raise kdkit.ModelError(
                f"smp has no decoder '{self.model_name}'; did you mean one of:"
                f" {', '.join(close or known)}"
            )
        self._refuse_unknown_encoder()
        try:
            module: nn.Module = smp.create_model(
                self.model_name,
                encoder_name=ENCODERS + self.options.encoder,
                encoder_weights="imagenet" if pretrained else None,
                in_channels=channels,
                classes=num_classes,
                **self.options.args,
            )
        except Exception as error:  # each decoder and backbone refuses arguments its own way
            raise kdkit.ModelError(
                f"smp cannot build '{self.model_name}' with the encoder '{self.options.encoder}':"
                f" {kdkit.cause(error)}"
            ) from error
        module.feature_info = _stages(module)  # type: ignore[assignment]
        return module

    def _refuse_unknown_encoder(self) -> None:
        import timm

        name = self.options.encoder
        # a name with a colon is of a hub or a folder
        if ":" not in name and not timm.is_model(name):
            close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
            hint = f"; did you mean one of: {', '.join(close)}" if close else ""
            raise kdkit.ModelError(f"encoder: timm has no backbone '{name}'{hint}")


def _library() -> Any:
    """Import smp, which takes long to load."""
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise kdkit.ModelError(
            "models of smp need segmentation-models-pytorch; pip install 'kdkit[segmentation]'"
        ) from error
    return smp


def _stages(module: nn.Module) -> list[dict[str, str]]:
    """Name the backbone's stages by their paths in the whole network, in timm's form."""
    backbone = module.get_submodule("encoder.model")
    # timm's networks of features name modules with `_` in place of dots
    paths = {path.replace(".", "_"): path for path, _ in backbone.named_modules()}
    info = getattr(backbone, "feature_info", None)
    names = [entry["module"].replace(".", "_") for entry in getattr(info, "info", ())]
    return [{"module": f"encoder.model.{paths[name]}"} for name in names if name in paths]


@kdkit.hookimpl
def kdkit_models() -> list[type[kdkit.ModelSource]]:
    return [SmpSource]
