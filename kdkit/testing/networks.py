"""Stand-ins for the networks that a loss may inspect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from kdkit.contracts.features import as_vectors
from kdkit.contracts.records import Outputs
from kdkit.testing.forms import CLASSES, Shape


class Network(nn.Module):
    """Stand-in for a network in the context: batch norms named like the tapped layers, and a
    classifier of the last one's mean.
    """

    def __init__(self, layers: Mapping[str, Shape], classes: int = CLASSES) -> None:
        super().__init__()
        for name, shape in layers.items():
            norm = nn.BatchNorm2d(_channels(shape))
            nn.init.normal_(norm.bias)
            self.add_module(name.replace(".", "_"), norm)
        self.last = next(reversed(list(layers)), None)
        self.classes = classes
        self.classifier = nn.Linear(_channels(layers[self.last]) if self.last else 6, classes)

    def answer(self, outputs: Outputs) -> Outputs:
        """Replace the logits by the classifier's output for the last layer."""
        if self.last is None or outputs.logits.shape[1] != self.classes or self.last == "logits":
            return outputs
        with torch.no_grad():
            return replace(outputs, logits=self.classifier(as_vectors(outputs.features[self.last])))

    def get_classifier(self) -> nn.Module:
        return self.classifier


def _channels(shape: Shape) -> int:
    """Count the channels of a map, of tokens or of a vector."""
    return as_vectors(torch.empty(1, *shape)).shape[1]
