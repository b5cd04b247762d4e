"""Returns a network up to one of its layers, as a network of its own."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from kdkit.contracts.layers import classifier_path, resolve
from kdkit.contracts.synonyms import with_synonyms
from kdkit.models.hooks import Keep, Store, register


@with_synonyms
class Backbone(nn.Module):
    """A network up to one of its layers, with the same parameters and buffers, not copies.

    The modules that contain them are new: `train`, `eval` and hooks of one do not affect the other.
    The classifier is left out.

    Args:
        network: not modified.
        layer: named in any of the ways of a recipe.
        outputs: number of logits, which helps to find the classifier of a network that does not
            say.

    Raises:
        TapError: there is no such layer, or no single classifier.
    """

    def __init__(self, network: nn.Module, layer: str, outputs: int | None = None) -> None:
        super().__init__()
        tap, head = resolve(layer, network, outputs), classifier_path(network, outputs)
        # the memo maps tensors to themselves: new modules, but shared parameters and buffers
        self.network = copy.deepcopy(
            network, {id(value): value for value in (*network.parameters(), *network.buffers())}
        )
        self.network.set_submodule(head, nn.Identity())
        # an object, like the hook that fills it, so that a copy of this module gets its own
        self._store = Store()
        register(self.network, {layer: tap}, lambda name: Keep(name, self._store))
        self._layer = layer

    def forward(self, images: Tensor) -> Tensor:
        self._store.open = True
        try:
            self.network(images)
            return self._store.values.pop(self._layer)
        finally:
            self._store.open = False
            self._store.values.clear()
