"""Networks on the meta device, whose layers the globs of losses are matched with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.model_source import ModelOptions
from kdkit.errors import ModelError
from kdkit.models.build import build_model
from kdkit.recipe import Recipe
from kdkit.runs import wanted
from kdkit.runs.trained_teachers import TrainedTeacher


class Skeletons:
    """The networks of a recipe without weights, each built once.

    Args:
        recipe: names the networks.
        info: image shape.
        trained: teachers by name, where other recipes train them.
        outputs: returns the number of outputs of the network of a section.
    """

    def __init__(
        self,
        recipe: Recipe,
        info: DataInfo,
        trained: Mapping[str, TrainedTeacher],
        outputs: Callable[[str], int],
    ) -> None:
        self._recipe, self._info, self._trained, self._outputs = recipe, info, trained, outputs
        self._built: dict[str, nn.Module] = {}

    def __call__(self, section: str, options: ModelOptions) -> nn.Module:
        """Return the network of a section.

        Raises:
            RecipeError: it cannot be built.
        """
        if section not in self._built:
            recipe, info = self._recipe, self._info
            try:
                built = build_model(
                    options,
                    recipe.model_source(options),
                    self._outputs(section),
                    info.image_shape,
                    role=section,
                    weights=False,
                    fields=info.fields,
                )
            except ModelError as error:
                trained = section in self._trained
                raise wanted.error_in(recipe, section, error, trained=trained) from error
            self._built[section] = built.module
        return self._built[section]
