"""Exported networks with observers in them, whose layers hooks still see."""

import copy
import functools
import operator
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

import kdkit

Call = tuple[str, str, str]
"""A module's call: its path, the node of its first argument, the node of its output."""

FOLDED = "kdkit_folded"
"""Key of a graph's `meta`: of each batch norm's node, that of the layer that it may fold into."""
GIVEN = "given"
FORWARD = "forward"  # by name: type checkers know no method that is replaced


def exported(network: nn.Module, images: Tensor) -> tuple[fx.GraphModule, list[Call]]:
    """Export a network in eval mode, for any batch size; return also the calls of its modules, in
    the order in which they end.

    Calls are left out whose tensors are overwritten later, and those with others than tensors.

    Raises:
        ModelError: torch cannot export it.
    """
    network.eval()
    for layer in network.modules():
        if getattr(layer, "inplace", False) is True:
            # otherwise it would overwrite what the layer before it gives
            setattr(layer, "inplace", False)  # noqa: B010
    told: list[_Told] = []
    handles = [
        layer.register_forward_hook(functools.partial(_tell, told, path))
        for path, layer in network.named_modules()
        if path
    ]
    # what the layers show leaves the graph beside the answer
    handles.append(network.register_forward_hook(lambda *args: (args[-1], _shown(told))))
    batch = torch.export.Dim("batch", min=2, max=1 << 20)
    try:
        program = torch.export.export(
            network, (images,), dynamic_shapes=({0: batch},), strict=False
        )
    except Exception as error:  # of any type, also from the network's own code
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise kdkit.ModelError(f"torch cannot export this network: {reason}") from error
    finally:
        for handle in handles:
            handle.remove()
    module = program.module()
    calls = _only_answer(module)
    module.meta[FOLDED] = {
        node.name: node.args[0].name
        for node in module.graph.nodes
        if node.target is torch.ops.aten.batch_norm.default
    }
    return module, calls


_Told = tuple[str, Tensor, Tensor, int, int]


def _tell(told: list[_Told], path: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
        told.append((path, args[0], output, args[0]._version, output._version))


def _shown(told: list[_Told]) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        f"{number}:{path}": (first, output)
        for number, (path, first, output, *versions) in enumerate(told)
        if versions == [first._version, output._version]
    }


def _only_answer(module: fx.GraphModule) -> list[Call]:
    """Let the graph return the network's answer alone, in place; return the calls that it told."""
    graph, codegen = module.graph, module.graph._codegen
    assert isinstance(codegen, fx.graph._PyTreeCodeGen)
    (output,) = (node for node in graph.nodes if node.op == "output")
    spec = codegen.pytree_info.out_spec
    assert spec is not None
    answer, shown = _pytree.tree_unflatten(output.args[0], spec)
    calls = [
        (name.partition(":")[2], first.name, given.name) for name, (first, given) in shown.items()
    ]
    values, spec = _pytree.tree_flatten(answer)
    output.args = (tuple(values),)
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=spec)
    # guards on the shape of the example
    for node in [node for node in graph.nodes if node.op == "call_module"]:
        graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()
    return calls


def shown_to_hooks(
    network: nn.Module, prepared: fx.GraphModule, calls: Sequence[Call]
) -> fx.GraphModule:
    """Put a prepared graph back into the modules of the network that it was exported from.

    The graph calls each module, in place of what it has computed for it, with the first argument
    and the output, and the module gives the output: hooks see what they saw on the network. A
    convolution whose batch norm is folded has no output of its own any more, and is not called.

    Args:
        network: its modules are reused; their tensors become those of the graph.
        prepared: the graph, with observers.
        calls: those of `exported`.
    """
    _take_tensors(network, prepared)
    graph = prepared.graph
    nodes = {node.name: node for node in graph.nodes}
    gone = {norm: conv for norm, conv in prepared.meta[FOLDED].items() if norm not in nodes}
    latest: dict[str, fx.Node] = {}  # of the nodes that are given, the last call
    for path, first, output in calls:
        given = gone.get(output, output)
        if output in gone.values() or given not in nodes:
            continue
        taken = gone.get(first, first)
        # what a folded batch norm took is not there either
        known = (nodes[taken],) if first not in gone.values() and taken in nodes else ()
        before = latest.get(given, nodes[given])
        with graph.inserting_after(before):
            call = graph.create_node("call_module", path, known, {GIVEN: before})
        before.replace_all_uses_with(call, delete_user_cb=functools.partial(operator.is_not, call))
        latest[given] = call
    made = fx.GraphModule(network, graph)
    made.meta.update(prepared.meta)
    return made


def without_calls(module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of what `shown_to_hooks` made, as it was before."""
    plain = copy.deepcopy(module)
    for node in [node for node in plain.graph.nodes if GIVEN in node.kwargs]:
        node.replace_all_uses_with(node.kwargs[GIVEN])
        plain.graph.erase_node(node)
    plain.recompile()
    return plain


def _take_tensors(network: nn.Module, prepared: fx.GraphModule) -> None:
    """Give a network's modules the tensors and observers of a graph, and no others."""
    for path, layer in [*network.named_modules()]:
        for kept in (layer._parameters, layer._buffers):
            for name in [name for name, value in kept.items() if value is not None]:
                del kept[name]
        setattr(layer, FORWARD, passed_on)
        # folded: what looks for batch norms must not find it
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and path:
            parent, _, name = path.rpartition(".")
            rest = nn.Sequential(OrderedDict(layer.named_children()))
            setattr(rest, FORWARD, passed_on)
            setattr(network.get_submodule(parent), name, rest)
    for node in prepared.graph.nodes:
        path, _, name = str(node.target).rpartition(".")
        if node.op == "call_module":
            network.add_module(str(node.target), prepared.get_submodule(str(node.target)))
        elif node.op == "get_attr":
            value = getattr(prepared.get_submodule(path), name)
            owner = network.get_submodule(path)
            if isinstance(value, nn.Parameter):
                owner.register_parameter(name, value)
            else:
                owner.register_buffer(name, value)


def passed_on(*_: Tensor, given: Tensor) -> Tensor:
    """Stands in the place of a module's `forward`: the graph has computed it already."""
    return given
