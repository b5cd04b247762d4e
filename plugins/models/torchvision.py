"""torchvision's classifiers."""

import difflib
from typing import Any

from pydantic import Field
from torch import nn

import kdkit


class TorchvisionSource(kdkit.ModelSource):
    """torchvision's classifiers: `model: torchvision/resnet18`."""

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

        known = models.list_models(module=models)
        if self.model_name not in known:
            close = difflib.get_close_matches(self.model_name, known, n=3, cutoff=0.4)
            raise kdkit.ModelError(
                f"torchvision has no model '{self.model_name}'; did you mean one of:"
                f" {', '.join(close or known)}"
            )
        try:
            module: nn.Module = models.get_model(
                self.model_name, weights=None, num_classes=num_classes, **self.options.args
            )
        except Exception as error:
            raise kdkit.ModelError(
                f"torchvision cannot build '{self.model_name}': {' '.join(str(error).split())}"
            ) from error
        return module

    def load(self, module: nn.Module) -> None:
        """Load the ImageNet weights; a classifier of another size keeps its own."""
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
        # one layer may be another: the classifier of other classes
        if len(left) > 1:
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
