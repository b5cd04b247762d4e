"""Structured pruning: the student begins as its teacher with fewer channels.

Fang, Ma, Song, Mi, Wang, "DepGraph: Towards Any Structural Pruning", CVPR 2023,
arXiv:2301.12900, by its library Torch-Pruning. To prune and then distil is the way of Muralidharan
et al., "Compact Language Models via Pruning and Knowledge Distillation" (Minitron), NeurIPS 2024,
arXiv:2407.14679.
"""

from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import kdkit


class Prune(kdkit.Compression):
    """Removes the least important channels of every layer, before training.

    Channels that are added or concatenated go together, as one group. The same share of each group
    goes, so that the widths follow from the options alone. The layer that gives the answers keeps
    its outputs. Needs `pip install kdkit[prune]`.
    """

    name = "prune"

    class Options(kdkit.CompressionOptions):
        """How much goes, and by what."""

        share: float = Field(
            gt=0, lt=1, description="Share of the channels of each layer that are removed."
        )
        by: Literal["l2", "l1", "bn_scale", "random"] = Field(
            default="l2",
            description=(
                "Importance of a channel: norm of its weights in all layers of its group (l2, l1),"
                " scale of its batch norm, or random."
            ),
        )
        round_to: int | None = Field(
            default=None, gt=0, description="Widths become multiples of this (default: any width)."
        )
        keep: tuple[str, ...] = Field(
            default=(), description="Layers, by path or glob, whose outputs all stay."
        )

    options: Options

    def begin(self, network: nn.Module, images: Tensor) -> nn.Module:
        try:
            import torch_pruning
        except ImportError:
            raise kdkit.ModelError("prune needs Torch-Pruning: pip install kdkit[prune]") from None
        importance = {
            "l2": lambda: torch_pruning.importance.GroupMagnitudeImportance(p=2),
            "l1": lambda: torch_pruning.importance.GroupMagnitudeImportance(p=1),
            "bn_scale": torch_pruning.importance.BNScaleImportance,
            "random": torch_pruning.importance.RandomImportance,
        }[self.options.by]()
        modes = {layer: layer.training for layer in network.modules()}
        network.eval()
        kept = [*self._kept(network), *_answering(network, images)]
        before = sum(p.numel() for p in network.parameters())
        try:
            with torch.enable_grad():  # the library follows gradients through the network
                wanted = network(images).shape
                torch_pruning.pruner.BasePruner(
                    network,
                    images,
                    importance=importance,
                    pruning_ratio=self.options.share,
                    ignored_layers=kept,
                    round_to=self.options.round_to,
                ).step()
                found = network(images).shape
        # the library and the pruned network's own code raise errors of any type
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise kdkit.ModelError(
                f"prune: this network does not run without some channels ({reason}); `keep` names"
                " layers that stay whole"
            ) from error
        if found != wanted:
            raise kdkit.ModelError(
                f"prune: its answers would be {tuple(found)}, not {tuple(wanted)}; name the layer"
                " that gives them in `keep`"
            )
        if sum(p.numel() for p in network.parameters()) == before:
            raise kdkit.ModelError(
                "prune: no channel is removed; see `share`, `round_to` and `keep`"
            )
        for layer, mode in modes.items():
            layer.training = mode
        return network

    def _kept(self, network: nn.Module) -> list[nn.Module]:
        kept = []
        for pattern in self.options.keep:
            found = [
                m for path, m in network.named_modules() if path and fnmatchcase(path, pattern)
            ]
            if not found:
                raise kdkit.ModelError(f"prune.keep: there is no layer '{pattern}'")
            kept += found
        return kept


def _answering(network: nn.Module, images: Tensor) -> list[nn.Module]:
    """List the layers whose output the network returns as it is."""
    outputs: list[tuple[nn.Module, Any]] = []
    handles = [
        layer.register_forward_hook(lambda layer, _, output: outputs.append((layer, output)))
        for layer in network.modules()
        if layer is not network and not list(layer.children())
    ]
    try:
        with torch.no_grad():
            answer = network(images)
    finally:
        for handle in handles:
            handle.remove()
    returned = [answer] if isinstance(answer, Tensor) else [*answer]
    return [layer for layer, output in outputs if any(output is one for one in returned)]


@kdkit.hookimpl
def kdkit_compressions() -> list[type[kdkit.Compression]]:
    return [Prune]
