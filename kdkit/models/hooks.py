"""Forward hooks: what one forward of a network shows at its tapped layers."""

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
    """Ends a forward once every tapped layer has given what it has to give."""


class Watch:
    """What one forward has shown so far: each tapped layer's last output, and how often it ran.

    Args:
        role: how messages call the model.
        enough: how often each layer runs in a whole forward; once they have, `Stop` is raised
            (None: never).
    """

    def __init__(self, role: str, enough: Counter[str] | None) -> None:
        self.role, self.enough = role, enough
        self.kept: dict[str, Tensor] = {}
        self.versions: dict[str, int | None] = {}
        self.calls: Counter[str] = Counter()

    def keep(self, name: str, output: object) -> None:
        """Take down what a layer gave.

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
    """Where the hooks of a compiled network write while it is open; closed, they let every
    tensor go.
    """

    def __init__(self) -> None:
        self.open = False
        self.values: dict[str, Tensor] = {}


class Keep:
    """A hook that stays on a network which is compiled; an object, so that a copied network
    writes into a copied store.
    """

    def __init__(self, name: str, store: Store) -> None:
        self.name, self.store = name, store

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], *output: Tensor) -> None:
        if self.store.open:
            self.store.values[self.name] = seen(module, args, output)  # type: ignore[assignment]


class Picked:
    """A hook that is shown one of a network's outputs; an object, as `Keep` is."""

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
    """What a hook keeps: the output, or of a hook before the forward the first argument, copied
    where the module would overwrite it.
    """
    value = (*output, *args, None)[0]
    return (
        value.clone()
        if not output and isinstance(value, Tensor) and getattr(part, "inplace", False)
        else value
    )


def version(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version


def overwriter(module: nn.Module, layer: Layer, forward: Callable[[], object]) -> str:
    """Run `forward` once more to find what to tap in place of a layer whose output is changed
    later.

    That is the module which changes it, or, where an operation between modules does, the module
    around both.
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
