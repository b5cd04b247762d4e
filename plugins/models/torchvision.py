"""torchvision's classifiers."""

import difflib
from typing import Any

from pydantic import Field
from torch import nn

import kdkit

AUXILIARY = "aux_classifier."  # prefix of weights


def _segmenting() -> list[str]:
    """Names of the networks of segmentation."""
    from torchvision import models

    names: list[str] = models.list_models(module=models.segmentation)
    return names


class TorchvisionSource(kdkit.ModelSource):
    """torchvision's classifiers, `model: torchvision/resnet18`, and its networks of segmentation,
    `model: torchvision/deeplabv3_resnet50`.

    Those of segmentation answer (B, K, H, W) at the images' size. With `args: {aux_loss: true}`
    deeplabv3 and fcn have an auxiliary head in training, as output 1 of the network (a loss with
    `output: 1` trains it).
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

        segmenting = _segmenting()
        known = [*models.list_models(module=models), *segmenting]
        if self.model_name not in known:
            close = difflib.get_close_matches(self.model_name, known, n=3, cutoff=0.4)
            raise kdkit.ModelError(
                f"torchvision has no model '{self.model_name}'; did you mean one of:"
                f" {', '.join(close or known)}"
            )
        # else torchvision fetches ImageNet's weights for the backbone
        without = {"weights_backbone": None} if self.model_name in segmenting else {}
        arguments = {"weights": None, **without, **self.options.args}
        try:
            module: nn.Module = models.get_model(
                self.model_name, num_classes=num_classes, **arguments
            )
        except Exception as error:
            raise kdkit.ModelError(
                f"torchvision cannot build '{self.model_name}': {' '.join(str(error).split())}"
            ) from error
        if self.model_name in segmenting:
            # what stages are, in timm's form; a MobileNet's are numbered blocks
            children = module.get_submodule("backbone").named_children()
            stages = [{"module": f"backbone.{name}"} for name, _ in children if "layer" in name]
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
                f"torchvision's weights of '{self.model_name}' cannot be fetched: {cause}"
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
        # one layer may be another, the classifier of other classes; segmentation has two of them
        if len(left) > (2 if self.model_name in _segmenting() else 1):
            raise kdkit.ModelError(
                f"torchvision's weights of '{self.model_name}' do not fit these arguments:"
                f" {', '.join(left[:3])}"
            )
        module.load_state_dict(fitting, strict=False)

    def normalization(self, module: nn.Module) -> kdkit.Normalize:
        """What the model's best weights were trained with."""
        transforms = self._weights().transforms()
        return kdkit.Normalize(mean=tuple(transforms.mean), std=tuple(transforms.std))

    def in_channels(self, image_channels: int) -> int:
        """torchvision's classifiers take colour images."""
        return 3

    def _weights(self) -> Any:
        from torchvision import models

        return models.get_model_weights(self.model_name).DEFAULT


@kdkit.hookimpl
def kdkit_models() -> list[type[kdkit.ModelSource]]:
    return [TorchvisionSource]
