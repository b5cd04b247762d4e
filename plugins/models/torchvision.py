"""torchvision's classifiers, networks of segmentation, and detectors."""

import difflib
import re
from typing import Any

from pydantic import Field
from torch import nn

import kdkit

AUXILIARY = "aux_classifier."  # prefix of weights
STAGE = re.compile(r"backbone\.(body\.)?layer\d")
HEADS = ("head.", "roi_heads.box_predictor.")  # of detectors, prefixes of weights


def _segmenting() -> list[str]:
    """Names of the networks of segmentation."""
    from torchvision import models

    names: list[str] = models.list_models(module=models.segmentation)
    return names


def _detecting() -> list[str]:
    """Names of the detectors of boxes."""
    from torchvision import models

    names = models.list_models(module=models.detection)
    return [name for name in names if "mask" not in name and "keypoint" not in name]


class TorchvisionSource(kdkit.ModelSource):
    """torchvision's classifiers, `model: torchvision/resnet18`, its networks of segmentation,
    `model: torchvision/deeplabv3_resnet50`, and its detectors, such as
    `model: torchvision/fcos_resnet50_fpn`.

    Those of segmentation answer (B, K, H, W) at the images' size. With `args: {aux_loss: true}`
    deeplabv3 and fcn have an auxiliary head in training, as output 1 of the network (a loss with
    `output: 1` trains it).

    Detectors answer (B, A, 5 + K), as task `detection` describes it, for images of any size that
    the recipe prepares (`data.image_size`); what they do in torchvision to resize and normalise
    images is left out.
    """

    name = "torchvision"

    class Options(kdkit.ModelOptions):
        """Which weights, and what the model is called with."""

        pretrained: bool = Field(
            default=False,
            description="Start from torchvision's best ImageNet weights (downloaded once).",
        )
        args: kdkit.NetworkArguments = Field(
            default_factory=dict, description="Arguments of torchvision's model function."
        )

    options: Options

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """The network by torchvision's `get_model`."""
        # here: torchvision takes long to load, and `import kdkit` must not
        from torchvision import models

        from . import _detectors

        segmenting, detecting = _segmenting(), _detecting()
        known = [*models.list_models(module=models), *segmenting, *detecting]
        if self.model_name not in known:
            close = difflib.get_close_matches(self.model_name, known, n=3, cutoff=0.4)
            raise kdkit.ModelError(
                f"torchvision has no model '{self.model_name}'; did you mean one of:"
                f" {', '.join(close or known)}"
            )
        is_dense = self._is_dense()
        # else torchvision fetches ImageNet's weights for the backbone
        without = {"weights_backbone": None} if is_dense else {}
        arguments = {"weights": None, **without, **self.options.args}
        if self.model_name in detecting:
            num_classes += _detectors.background(self.model_name)
        try:
            module: nn.Module = models.get_model(
                self.model_name, num_classes=num_classes, **arguments
            )
        except Exception as error:
            raise kdkit.ModelError(
                f"torchvision cannot build '{self.model_name}': {' '.join(str(error).split())}"
            ) from error
        if self.model_name in detecting:
            module = _detectors.as_network(module)
        if is_dense:
            # what stages are, in timm's form; a MobileNet's are numbered blocks
            names = [name for name, _ in module.named_modules()]
            stages = [{"module": name} for name in names if STAGE.fullmatch(name)]
            module.feature_info = stages  # type: ignore[assignment]
        return module

    def load(self, module: nn.Module) -> None:
        """Load torchvision's weights; heads of another number of classes keep their own."""
        if not self.options.pretrained:
            return
        try:
            # the digest in the file's name tells a download that was cut short
            weights = self._weights().get_state_dict(progress=False, check_hash=True)
        except Exception as error:
            cause = " ".join(str(error).split())
            raise kdkit.ModelError(
                f"torchvision's weights of '{self.model_name}' cannot be fetched: {cause};"
                " `pretrained: false` begins without them"
            ) from error
        own = module.state_dict()
        # an auxiliary head is for training, and need not be built
        weights = {k: v for k, v in weights.items() if k in own or not k.startswith(AUXILIARY)}
        fitting = {
            key: value
            for key, value in weights.items()
            if key in own and own[key].shape == value.shape
        }
        misfits = (own.keys() | weights.keys()) - fitting.keys()
        # the oldest files lack the counters, which no answer depends on
        left = sorted(
            {key.rpartition(".")[0] for key in misfits if not key.endswith("num_batches_tracked")}
        )
        # the heads of a detector are several layers
        if self.model_name in _detecting():
            left = [name for name in left if not name.startswith(HEADS)]
        # one layer may be another, the classifier of other classes; segmentation has two of them
        if len(left) > (2 if self.model_name in _segmenting() else 1):
            raise kdkit.ModelError(
                f"torchvision's weights of '{self.model_name}' do not fit these arguments:"
                f" {', '.join(left[:3])}"
            )
        module.load_state_dict(fitting, strict=False)

    def normalization(self, module: nn.Module) -> kdkit.Normalize:
        """What the model's best weights were trained with."""
        if (inside := getattr(module, "transform", None)) is not None:  # that of a detector
            return kdkit.Normalize(mean=tuple(inside.image_mean), std=tuple(inside.image_std))
        transforms = self._weights().transforms()
        return kdkit.Normalize(mean=tuple(transforms.mean), std=tuple(transforms.std))

    def portable(self, module: nn.Module) -> kdkit.Portable:
        """torchvision's own function builds it, and its weights have the names of that."""
        from ._detectors import background

        detecting = self.model_name in _detecting()
        none = " + 1" if detecting and background(self.model_name) else ""
        arguments = {"weights_backbone": None} if self._is_dense() else {}
        said = "".join(f", {k}={v!r}" for k, v in {**arguments, **self.options.args}.items())
        # braces of a mapping are no placeholders
        said = said.replace("{", "{{").replace("}", "}}")
        itself = "; there it resizes and normalises images itself" if detecting else ""
        return kdkit.Portable(
            {"pretrained": False},
            {},
            f'build it by torchvision.models.get_model("{self.model_name}",'
            f" num_classes={{outputs}}{none}{said}), and load into it"
            f' safetensors.torch.load_file("{{folder}}/model.safetensors"){itself}',
        )

    def in_channels(self, image_channels: int) -> int:
        """torchvision's classifiers take colour images."""
        return 3

    def _is_dense(self) -> bool:
        return self.model_name in (*_segmenting(), *_detecting())

    def _weights(self) -> Any:
        from torchvision import models

        return models.get_model_weights(self.model_name).DEFAULT


@kdkit.hookimpl
def kdkit_models() -> list[type[kdkit.ModelSource]]:
    return [TorchvisionSource]
