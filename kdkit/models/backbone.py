"""A network up to one of its layers, as a network of its own."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from kdkit.contracts.layers import classifier_path, resolve
from kdkit.models.hooks import Keep, Store, register


class Backbone(nn.Module):
    """What a layer of a network gives, from what the network takes. Its parameters and buffers
    are the network's own, not copies.

    The modules around them are: `train`, `eval` and hooks of the one do not reach the other. The
    classifier is left out.

    Args:
        network: stays as it is.
        layer: named in any of the ways of a recipe.
        num_classes: number of logits, which helps to find the classifier of a network that does not
            say.

    Raises:
        TapError: there is no such layer, or no single classifier.
    """

    def __init__(self, network: nn.Module, layer: str, num_classes: int | None = None) -> None:
        super().__init__()
        place, head = resolve(layer, network, num_classes), classifier_path(network, num_classes)
        self.network = copy.deepcopy(
            network, {id(value): value for value in (*network.parameters(), *network.buffers())}
        )
        self.network.set_submodule(head, nn.Identity())
        # an object, as is the hook that it fills: a copy of this module must not write here
        self._store = Store()
        register(self.network, {layer: place}, lambda name: Keep(name, self._store))
        self._layer = layer

    def forward(self, images: Tensor) -> Tensor:
        self._store.open = True
        try:
            self.network(images)
            return self._store.values.pop(self._layer)
        finally:
            self._store.open = False
            self._store.values.clear()
