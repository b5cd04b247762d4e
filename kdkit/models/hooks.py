"""Forward hooks that record what one forward of a network shows at its tapped layers."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdkit.contracts.layers import Layer, output_of
from kdkit.errors import TapError


# an exception is the only way to leave a forward from a hook
class Stop(Exception):
    """Ends a forward after every tapped layer has given its output."""


class Watch:
    """The outputs of one forward so far: each tapped layer's last output, and how often it ran.

    Args:
        role: name of the model in messages.
        enough: how often each layer runs in a complete forward; after that, `Stop` is raised (None:
            never).
    """

    def __init__(self, role: str, enough: Counter[str] | None) -> None:
        self.role, self.enough = role, enough
        self.kept: dict[str, Tensor] = {}
        self.versions: dict[str, int | None] = {}
        self.calls: Counter[str] = Counter()

    def keep(self, name: str, output: object) -> None:
        """Record a layer's output.

        Raises:
            TapError: it is not one tensor.
        """
        if not isinstance(output, Tensor):
            raise TapError(
                f"{self.role}: layer '{name}' gives {type(output).__name__}, not one tensor; tap a"
                " layer inside or behind it"
            )
        self.kept[name], self.versions[name] = output, version(output)
        self.calls[name] += 1
        # a layer may run several times, of which the last one counts
        if self.calls == self.enough:
            raise Stop


class Store:
    """Where the hooks of a compiled network write while it is open; closed, it discards."""

    def __init__(self) -> None:
        self.open = False
        self.values: dict[str, Tensor] = {}


class Keep:
    """A hook that stays on a compiled network."""

    # an object, not a function, so that a copied network writes into a copied store

    def __init__(self, name: str, store: Store) -> None:
        self.name, self.store = name, store

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], *output: Tensor) -> None:
        if self.store.open:
            self.store.values[self.name] = seen(module, args, output)  # type: ignore[assignment]


class Picked:
    """A hook that receives one of a network's outputs; copied with it, like `Keep`."""

    def __init__(self, hook: Callable[..., None], number: int) -> None:
        self.hook, self.number = hook, number

    def __call__(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        self.hook(module, args, output_of(output, self.number))


def register(
    module: nn.Module, layers: Mapping[str, Layer], hook: Callable[[str], Callable[..., None]]
) -> list[RemovableHandle]:
    """Put `hook(name)` on each layer; it gets (module, arguments[, output])."""
    handles = []
    for name, layer in layers.items():
        tapped, call = module.get_submodule(layer.path), hook(name)
        if layer.side == "input":
            handles.append(tapped.register_forward_pre_hook(call))
        else:
            # only the network itself may give several outputs
            picked = call if layer.path else Picked(call, layer.output)
            handles.append(tapped.register_forward_hook(picked))
    return handles


@contextlib.contextmanager
def observed(
    module: nn.Module, layers: Mapping[str, Layer], keep: Callable[[str, object], None]
) -> Iterator[None]:
    """Call `keep(name, tensor)` whenever a layer runs, inside the `with` block only."""

    def hook(name: str) -> Callable[..., None]:
        def observe(module: nn.Module, args: tuple[object, ...], *output: object) -> None:
            keep(name, seen(module, args, output))

        return observe

    handles = register(module, layers, hook)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def seen(module: nn.Module, args: tuple[object, ...], output: tuple[object, ...]) -> object:
    """Return what a hook records: the output or, before the forward, the first argument."""
    value = (*output, *args, None)[0]
    # an in-place module is about to overwrite its argument
    if not output and isinstance(value, Tensor) and getattr(module, "inplace", False):
        return value.clone()
    return value


def version(tensor: Tensor) -> int | None:
    """Return how often a tensor was changed in place; None if torch does not count."""
    return None if tensor.is_inference() else tensor._version


def overwriter(module: nn.Module, layer: Layer, forward: Callable[[], object]) -> str:
    """Run `forward` again to find a module to tap instead of an overwritten layer.

    That is the module which changes it or, if an operation between modules does, the module that
    encloses both.
    """
    recorded: list[tuple[Tensor, int | None]] = []
    guilty: list[str] = []
    around = layer.path.rpartition(".")[0]

    def look(path: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if recorded and not guilty and version(recorded[0][0]) != recorded[0][1]:
                guilty.append(path)

        return hook

    def keep(_: str, output: object) -> None:
        if isinstance(output, Tensor):
            recorded[:] = [(output, version(output))]

    leaves = [
        (path, child)
        for path, child in module.named_modules()
        if path != layer.path and not list(child.children())
    ]
    # a change seen before a leaf runs was made between modules
    handles = [leaf.register_forward_pre_hook(look(around)) for _, leaf in leaves]
    handles += [leaf.register_forward_hook(look(path)) for path, leaf in leaves]
    try:
        with torch.no_grad(), observed(module, {"it": layer}, keep):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    instead = guilty[0] if guilty else around
    return f"'{instead}'" if instead else "a later layer"
