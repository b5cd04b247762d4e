"""Decides which parts learn in a stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from kdkit.contracts.layers import expand, resolve
from kdkit.errors import RunError, TapError, suggest

STUDENT = "student"


def freeze_all_but(
    wanted: Sequence[str], student: nn.Module, losses: Mapping[str, nn.Module]
) -> list[nn.Parameter]:
    """Freeze everything that is not named, and put modules without learnable parameters into eval
    mode; return what was frozen.

    Args:
        wanted: `student`, a layer of it (`student.stage1`), a loss by name, or a learnable part of
            one (`ft.paraphrasers`).
        student: the network that learns.
        losses: its losses by name.

    Raises:
        RunError: a name means nothing, or nothing that learns.
    """
    learning = {
        id(p)
        for name in wanted
        for part in _parts(name, student, losses)
        for p in part.parameters()
        if p.requires_grad
    }
    frozen = [
        p
        for part in (student, *losses.values())
        for p in part.parameters()
        if p.requires_grad and id(p) not in learning
    ]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def rest(network: nn.Module) -> None:
    """Put those layers of a student or loss into eval mode whose parameters are all frozen, so that
    no running statistics change.
    """
    for part in network.modules():
        parameters = list(part.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            part.eval()


def _parts(name: str, student: nn.Module, losses: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    root, _, path = name.partition(".")
    if root != STUDENT and root not in losses:
        raise RunError(f"train: {suggest(name, [STUDENT, *losses])}")
    network = student if root == STUDENT else losses[root]
    try:
        found = (
            [network.get_submodule(_path(layer, network)) for layer in expand(path, network)]
            if path
            else [network]
        )
    except TapError as error:
        raise RunError(f"train: {name}: {error}") from None
    if not any(p.requires_grad for part in found for p in part.parameters()):
        raise RunError(f"train: '{name}' has nothing that learns")
    yield from found


def _path(layer: str, network: nn.Module) -> str:
    return resolve(layer, network).path
