"""Weights of layers whose batch norms are folded, trained as they were before.

Folding multiplies the weights of each channel by s = gamma / sqrt(variance + epsilon). Trained as
they are then, they would move the network by s^-2 as far in a step as before, and s lies between
0.08 and 12 in a published ResNet-56: rates that suit the network break it. So the weights before
folding are trained, and s stays as it is. That is the training of torchao's `prepare_qat_pt2e` with
batch statistics and gamma at rest.
"""

from collections import Counter

import torch
from torch import Tensor, fx, nn

from ._exported import FOLDED

SMALLEST = 1e-6  # of a scale: a channel that is switched off is trained as it is folded
SCALE = "_folding_scale"


def scales_of(graph: fx.GraphModule) -> dict[str, Tensor]:
    """Return s, (C,), by the node of the layer that a batch norm folds into."""
    nodes = {node.name: node for node in graph.graph.nodes}
    found: dict[str, Tensor] = {}
    for norm, layer in graph.meta[FOLDED].items():
        _, gamma, _, _, variance, _, _, epsilon, *_ = nodes[norm].args
        scale = torch.rsqrt(_value(graph, variance) + epsilon)
        found[layer] = scale if gamma is None else scale * _value(graph, gamma)
    return found


def unfold(prepared: fx.GraphModule, scales: dict[str, Tensor]) -> None:
    """Train folded layers as they were before, in place."""
    graph = prepared.graph
    nodes = {node.name: node for node in graph.nodes}
    held = Counter(node.target for node in graph.nodes if node.op == "get_attr")
    for norm, layer in prepared.meta[FOLDED].items():
        if norm in nodes:  # not folded
            continue
        _, weight, bias, *_ = nodes[layer].args
        # folding makes it, in place of the batch norm's, as a constant
        _value(prepared, bias).requires_grad_()
        while weight.op != "get_attr":  # fake quantisation
            weight = weight.args[0]
        value, scale = _value(prepared, weight), scales[layer].detach()
        # shared by layers with batch norms of their own, or transposed
        if held[weight.target] > 1 or len(value) != len(scale):
            continue
        scale = torch.where(scale.abs() < SMALLEST, 1.0, scale)
        scale = scale.view(-1, *[1] * (value.ndim - 1)).clone()
        owner, name = _owner(prepared, weight)
        setattr(owner, name, nn.Parameter(value.detach() / scale))
        owner.register_buffer(name + SCALE, scale)
        users = list(weight.users)
        with graph.inserting_after(weight):
            factor = graph.get_attr(weight.target + SCALE)
        with graph.inserting_after(factor):
            product = graph.call_function(torch.ops.aten.mul.Tensor, (weight, factor))
        for user in users:
            user.replace_input_with(weight, product)
    prepared.recompile()


def folded(prepared: fx.GraphModule) -> fx.GraphModule:
    """Multiply the weights by s for good, in place; return the module."""
    graph = prepared.graph
    for factor in [node for node in graph.nodes if str(node.target).endswith(SCALE)]:
        (product,) = factor.users
        weight = product.args[0]
        with torch.no_grad():
            _value(prepared, weight).mul_(_value(prepared, factor))
        product.replace_all_uses_with(weight)
        graph.erase_node(product)
        graph.erase_node(factor)
        delattr(*_owner(prepared, factor))
    prepared.recompile()
    return prepared


def _owner(module: fx.GraphModule, node: fx.Node) -> tuple[nn.Module, str]:
    path, _, name = str(node.target).rpartition(".")
    return module.get_submodule(path), name


def _value(module: fx.GraphModule, node: fx.Node) -> Tensor:
    value: Tensor = getattr(*_owner(module, node))
    return value
