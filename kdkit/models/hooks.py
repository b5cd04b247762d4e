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
        if self.calls == self.enough:
            raise Stop


class Store:
    """The place where the hooks of a compiled network write while it is open; closed, it discards
    every tensor.
    """

    def __init__(self) -> None:
        self.open = False
        self.values: dict[str, Tensor] = {}


class Keep:
    """A hook that stays on a compiled network; an object, so that a copied network writes into a
    copied store.
    """

    def __init__(self, name: str, store: Store) -> None:
        self.name, self.store = name, store

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], *output: Tensor) -> None:
        if self.store.open:
            self.store.values[self.name] = seen(module, args, output)  # type: ignore[assignment]


class Picked:
    """A hook that receives one of a network's outputs; an object, for the same reason as `Keep`."""

    def __init__(self, hook: Callable[..., None], number: int) -> None:
        self.hook, self.number = hook, number

    def __call__(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        self.hook(module, args, output_of(output, self.number))


def register(
    module: nn.Module, layers: Mapping[str, Layer], hook: Callable[[str], Callable[..., None]]
) -> list[RemovableHandle]:
    """Put `hook(name)` on each layer; it is called with (module, arguments) and, on the output
    side, the output.
    """
    handles = []
    for name, layer in layers.items():
        part = module.get_submodule(layer.path)
        call = (
            hook(name) if layer.path or layer.side == "input" else Picked(hook(name), layer.output)
        )
        handles.append(
            (
                part.register_forward_pre_hook
                if layer.side == "input"
                else part.register_forward_hook
            )(call)
        )
    return handles


@contextlib.contextmanager
def observed(
    module: nn.Module, layers: Mapping[str, Layer], keep: Callable[[str, object], None]
) -> Iterator[None]:
    """Call `keep(name, tensor)` whenever a layer runs, inside the `with` block only."""

    def hook(name: str) -> Callable[..., None]:
        def observe(part: nn.Module, args: tuple[object, ...], *output: object) -> None:
            keep(name, seen(part, args, output))

        return observe

    handles = register(module, layers, hook)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def seen(part: nn.Module, args: tuple[object, ...], output: tuple[object, ...]) -> object:
    """Return the tensor that a hook records: the output, or the first argument for a hook before
    the forward, copied if the module would overwrite it.
    """
    value = (*output, *args, None)[0]
    return (
        value.clone()
        if not output and isinstance(value, Tensor) and getattr(part, "inplace", False)
        else value
    )


def version(tensor: Tensor) -> int | None:
    """Return how often a tensor was changed in place; None if torch does not count."""
    return None if tensor.is_inference() else tensor._version


def overwriter(module: nn.Module, layer: Layer, forward: Callable[[], object]) -> str:
    """Run `forward` again to find a module to tap in place of a layer whose output is changed
    later.

    That is the module which changes it or, if an operation between modules does, the module that
    encloses both.
    """
    kept: list[tuple[Tensor, int | None]] = []
    guilty: list[str] = []
    around = layer.path.rpartition(".")[0]

    def look(path: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if kept and not guilty and version(kept[0][0]) != kept[0][1]:
                guilty.append(path)

        return hook

    def keep(_: str, output: object) -> None:
        if isinstance(output, Tensor):
            kept[:] = [(output, version(output))]

    leaves = [
        (path, part)
        for path, part in module.named_modules()
        if path != layer.path and not list(part.children())
    ]
    handles = [part.register_forward_pre_hook(look(around)) for _, part in leaves]
    handles += [part.register_forward_hook(look(path)) for path, part in leaves]
    try:
        with torch.no_grad(), observed(module, {"it": layer}, keep):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    found = guilty[0] if guilty else around
    return f"'{found}'" if found else "a later layer"
