"""What a loss is tried on: shapes of the student's and the teacher's layers, without the batch, and
stand-ins for networks that have such layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from kdkit.contracts.features import as_vectors
from kdkit.contracts.loss import Rest
from kdkit.contracts.records import Outputs

Shape = tuple[int, ...]
CLASSES = 5
IMAGE: Shape = (3, 8, 8)
NO_LAYERS: tuple[Shape, Shape] = ((), ())

# Most differ in channels, so that a loss needs its adapters; 17 tokens are a class token before a
# grid of 4 x 4, and 10 one before a grid of 3 x 3.
FORMS: Mapping[str, tuple[Shape, Shape]] = {
    "maps of one shape": ((6, 8, 8), (6, 8, 8)),
    "maps of other channels": ((6, 8, 8), (10, 8, 8)),
    "maps of half the size": ((6, 8, 8), (10, 4, 4)),
    "maps of twice the size": ((6, 4, 4), (10, 8, 8)),
    "maps of a third of the size": ((6, 9, 9), (10, 3, 3)),
    "maps of one pixel": ((6, 1, 1), (10, 1, 1)),
    "tokens": ((9, 6), (9, 10)),
    "tokens and a map": ((17, 6), (10, 4, 4)),
    "a map and tokens": ((6, 8, 8), (16, 10)),
    "other numbers of tokens": ((10, 6), (16, 10)),
    "vectors": ((6,), (10,)),
}

# what only losses for several labels an image are tried on
LABEL_WISE: Mapping[str, tuple[Shape, Shape]] = {
    "an embedding for each label": ((CLASSES, 6), (CLASSES, 10))
}

# no loss can compare these
MISFITS: Mapping[str, tuple[Shape, Shape]] = {
    "a map and a vector": ((6, 8, 8), (10,)),
    "tokens of no square grid and a map": ((15, 6), (10, 3, 3)),
    "features without a dimension": ((), ()),
}


def shapes_of(form: str) -> tuple[Shape, Shape]:
    """Look up the shapes of a form; a loss that reads no layers has none."""
    return {**FORMS, **LABEL_WISE}.get(form, NO_LAYERS)


class Network(nn.Module):
    """Stand-in for a network in the context: batch norms named like the tapped layers, and a
    classifier of the last one's mean.
    """

    def __init__(self, layers: Mapping[str, Shape], classes: int = CLASSES) -> None:
        super().__init__()
        for name, shape in layers.items():
            norm = nn.BatchNorm2d(_channels(shape))
            # Losses that read the norms, as OFD for its margins, would see equal channels if all
            # biases were 0.
            nn.init.normal_(norm.bias)
            # A module's name must not contain a dot.
            self.add_module(name.replace(".", "_"), norm)
        self.last = next(reversed(list(layers)), None)
        self.shapes = dict(layers)
        self.classes = classes
        self.classifier = nn.Linear(_channels(layers[self.last]) if self.last else 6, classes)

    def answer(self, outputs: Outputs) -> Outputs:
        """Replace the logits by the classifier's output for the last layer."""
        # The classifier has `classes` outputs: answers with another number are misfits that `setup`
        # must refuse, and a layer called `logits` is the logits themselves.
        if self.last is None or outputs.logits.shape[1] != self.classes or self.last == "logits":
            return outputs
        with torch.no_grad():
            return replace(outputs, logits=self.classifier(as_vectors(outputs.features[self.last])))

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def behind(self, layer: str, taps: Sequence[str]) -> Rest:
        """Stand in for what follows a layer: linear maps of its mean to the logits and the taps."""
        generator = torch.Generator().manual_seed(0)
        width = _channels(self.shapes[layer])
        shapes = {name: self.shapes[name] for name in taps} | {"": (self.classes,)}
        maps = {
            name: torch.randn(width, math.prod(shape), generator=generator) / width**0.5
            for name, shape in shapes.items()
        }

        def rest(values: Tensor) -> Outputs:
            mean = as_vectors(values)
            found = {
                name: (mean @ x.to(mean)).unflatten(1, shapes[name]) for name, x in maps.items()
            }
            return Outputs(found.pop(""), found)

        return rest


def _channels(shape: Shape) -> int:
    """Count the channels of a map, of tokens or of a vector."""
    return as_vectors(torch.empty(1, *shape)).shape[1]
