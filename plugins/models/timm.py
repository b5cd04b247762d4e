"""timm's models: any of its architectures, its pretrained weights, and a small-image stem for
its ResNets.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from torch import nn

import kdkit

OVERLAY = ("file", "num_classes")  # of weights: where they are, and how many classes they know


def _a_file_at_most(arguments: dict[str, Any]) -> dict[str, Any]:
    """Where pretrained weights come from is timm's to say, or a file of this machine, which is
    read weights-only.
    """
    overlay = arguments.get("pretrained_cfg_overlay", {})
    if not isinstance(overlay, dict) or overlay.keys() - OVERLAY:
        raise ValueError(f"pretrained_cfg_overlay is a mapping of {', '.join(OVERLAY)}")
    return arguments


class TimmSource(kdkit.ModelSource):
    """timm's models: `model: resnet18`, `model: timm/resnet18.a1_in1k` or `model:
    hf-hub:timm/resnet18.a1_in1k`.
    """

    name = "timm"

    class Options(kdkit.ModelOptions):
        """Which weights, and what the model is created with."""

        pretrained: bool = Field(
            default=False, description="Start from timm's pretrained weights (downloaded once)."
        )
        args: Annotated[kdkit.NetworkArguments, AfterValidator(_a_file_at_most)] = Field(
            default_factory=dict,
            description=(
                "Arguments of the network, as `timm.create_model` passes them on: drop_path_rate,"
                " img_size... `pretrained_cfg_overlay: {file: PATH}` names the file of its"
                " pretrained weights."
            ),
        )
        stem: Literal["default", "small"] = Field(
            default="default",
            description=(
                "small: a ResNet begins with one 3x3 convolution of stride 1 and no pooling, for"
                " images of 8 to 64 pixels; where args give `channels`, it is as wide as the first"
                " of them."
            ),
        )

    options: Options

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """The network by `timm.create_model`, with random weights."""
        options = self.options
        if options.stem == "small" and options.pretrained:
            raise kdkit.ModelError(
                "pretrained weights need the stem that they were trained with: leave out `stem:"
                " small`"
            )
        arguments = {
            "in_chans": image_shape[0],
            **(self._narrow_stem() if options.stem == "small" else {}),
            # last: what the recipe says counts
            **options.args,
        }
        module = self._create(num_classes=num_classes, **arguments)
        if options.stem == "small":
            _shrink_stem(module, self.model_name)
        return module

    def load(self, module: nn.Module) -> None:
        """Load timm's pretrained weights; a classifier of another size keeps random ones."""
        if not self.options.pretrained:
            return
        arguments = {"in_chans": self.in_channels(3), **self.options.args}
        file = (arguments.get("pretrained_cfg_overlay") or {}).get("file")
        if file and not Path(file).is_file():  # timm's error does not name it
            raise kdkit.ModelError(f"args.pretrained_cfg_overlay.file: no such file: {file}")
        # Only create_model knows how an architecture's files are converted, so a second network is
        # made and copied.
        donor = self._create(num_classes=module.num_classes, pretrained=True, **arguments)
        module.load_state_dict(donor.state_dict())

    def normalization(self, module: nn.Module) -> kdkit.Normalize | None:
        """What the network's `pretrained_cfg` says."""
        config: dict[str, Any] = getattr(module, "pretrained_cfg", None) or {}
        if not config.get("mean") or not config.get("std"):
            return None
        return kdkit.Normalize(mean=tuple(config["mean"]), std=tuple(config["std"]))

    def meaning(self, module: nn.Module) -> kdkit.Meaning:
        """The `label_names` that a model of a hub or a folder comes with."""
        names = (
            (getattr(module, "pretrained_cfg", None) or {}).get("label_names")
            if self.options.pretrained
            else None
        )
        return kdkit.Meaning(tuple(names or ()))

    def in_channels(self, image_channels: int) -> int:
        """`args.in_chans`; else colour for pretrained networks, and the images' own channels for
        others.
        """
        return int(
            self.options.args.get("in_chans", 3 if self.options.pretrained else image_channels)
        )

    def _create(self, **arguments: Any) -> nn.Module:
        # here: timm takes long to load, and `import kdkit` must not
        import timm

        name = self.model_name
        if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name):
            close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
            raise kdkit.ModelError(
                f"timm has no model '{name}'"
                + (f"; did you mean one of: {', '.join(close)}" if close else "")
            )
        try:
            module: nn.Module = timm.create_model(name, **arguments)
        except Exception as error:
            way = (
                "; `pretrained: false` begins without these weights"
                if arguments.get("pretrained")
                else ""
            )
            raise kdkit.ModelError(
                f"timm cannot build '{name}': {kdkit.cause(error)}{way}"
            ) from error
        return module

    def _narrow_stem(self) -> dict[str, Any]:
        """Arguments that make timm's blocks expect a stem as wide as the first stage (by itself
        a ResNet's has 64 channels).
        """
        channels = self.options.args.get("channels")
        if not channels:
            return {}
        if channels[0] % 2:
            raise kdkit.ModelError(
                f"`stem: small` needs an even number of first channels, got {channels[0]}"
            )
        # a deep stem is twice its width; it is replaced below
        return {"stem_type": "deep", "stem_width": channels[0] // 2}


def _shrink_stem(module: Any, name: str) -> None:
    from timm.models.resnet import ResNet

    if not isinstance(module, ResNet):
        raise kdkit.ModelError(
            f"`stem: small` is for timm's ResNet family, which '{name}' is not in"
        )
    network: Any = module
    network.conv1 = nn.Conv2d(network.in_chans, network.bn1.num_features, 3, padding=1, bias=False)
    # as timm's own
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    for number, entry in enumerate(network.feature_info):
        entry["reduction"] //= 4 if number else 2  # the stem comes before the pooling


@kdkit.hookimpl
def kdkit_models() -> list[type[kdkit.ModelSource]]:
    return [TimmSource]
