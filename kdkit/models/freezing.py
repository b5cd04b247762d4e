"""Decides which parts learn in a stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from kdkit.contracts.layers import expand, resolve
from kdkit.errors import RunError, TapError, suggest

STUDENT = "student"


def freeze_all_but(
    wanted: Sequence[str], student: nn.Module, losses: Mapping[str, nn.Module]
) -> list[nn.Parameter]:
    """Freeze the parameters of everything that is not named; return them.

    Args:
        wanted: `student`, a layer of it (`student.stage1`), a loss by name, or a learnable part of
            one (`ft.paraphrasers`).
        student: the network that learns.
        losses: its losses by name.

    Raises:
        RunError: a name means nothing, or nothing that learns.
    """
    learning = {
        id(p)  # tensors compare by element
        for name in wanted
        for module in _named(name, student, losses)
        for p in module.parameters()
        if p.requires_grad
    }
    frozen = [
        p
        for module in (student, *losses.values())
        for p in module.parameters()
        if p.requires_grad and id(p) not in learning
    ]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def rest(network: nn.Module) -> None:
    """Put layers whose parameters are all frozen into eval mode: their statistics stay."""
    for module in network.modules():
        parameters = list(module.parameters())
        # modules without parameters, such as dropout, follow the network's own mode
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


@contextlib.contextmanager
def in_eval_mode(*networks: nn.Module) -> Iterator[None]:
    """Put networks in eval mode inside the block, and restore the mode of each module after it."""
    # module by module: frozen ones of a network that is trained are in eval mode already
    training = [module for network in networks for module in network.modules() if module.training]
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for module in training:
            module.training = True


def _named(name: str, student: nn.Module, losses: Mapping[str, nn.Module]) -> list[nn.Module]:
    root, _, path = name.partition(".")
    if root != STUDENT and root not in losses:
        raise RunError(f"train: {suggest(name, [STUDENT, *losses])}")
    network = student if root == STUDENT else losses[root]
    try:
        layers = [resolve(layer, network).path for layer in expand(path, network)] if path else [""]
    except TapError as error:
        raise RunError(f"train: {name}: {error}") from None
    modules = [network.get_submodule(layer) for layer in layers]
    if not any(p.requires_grad for module in modules for p in module.parameters()):
        raise RunError(f"train: '{name}' has nothing that learns")
    return modules
