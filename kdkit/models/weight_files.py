"""Reads files of weights, and fits them to a network. Code in such a file is never run."""

from __future__ import annotations

import functools
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kdkit.contracts.layers import classifier_path
from kdkit.contracts.model_source import OWN_OUTPUTS
from kdkit.errors import CheckpointError, ModelError, TapError

# Where training scripts keep weights within a file, the likeliest first.
CONTAINERS = (
    "state_dict",
    "model",
    "model_state_dict",
    "state_dict_ema",
    "model_ema",
    "ema",
    "net",
    "network",
    "module",
    "weights",
    "params",
)
SHOWN = 3  # keys of each kind in a message
COUNTER = "num_batches_tracked"  # of batch norms, which old files lack

Weights = dict[str, Tensor]
OwnName = Callable[[str, str], str]  # from a file's key and the prefix to drop


@dataclass(frozen=True)
class Fitted:
    """A file's weights under the network's names, and notes on the match, a clause each."""

    weights: Weights
    notes: tuple[str, ...]


def fit_weights(
    path: Path,
    module: nn.Module,
    strip_prefix: str = "",
    rename: Callable[[str], str] | None = None,
    *,
    heads: tuple[str, ...] = (),
    shapes_only: bool = False,
) -> Fitted:
    """Fit a file's weights to a network, without changing the network.

    A prefix of all keys in the file (`module.` of DataParallel) is dropped automatically, if every
    key fits without it.

    Args:
        path: the file.
        module: the network; it may be on the meta device.
        strip_prefix: the prefix to drop from the file's keys. Keys without it may still fit; keys
            that do not fit are ignored.
        rename: the network's own name of a key, once the prefix is dropped (None: the same).
        heads: layers to ignore on both sides, such as the network's classifier.
        shapes_only: do not read the values; the weights are on the meta device.

    Raises:
        CheckpointError: the file is missing, holds more than tensors, or does not fit.
    """
    content, prefix, notes = _chosen(read_groups(path, shapes_only=shapes_only), path, strip_prefix)
    wanted = {key: value for key, value in module.state_dict().items() if not _within(key, heads)}
    own = functools.partial(_own_name, rename=rename)
    weights, candidates = _named(content, prefix, own, heads, path), _prefixes(content, wanted)
    if not strip_prefix and (common := _dropped_unasked(content, wanted, candidates, own, heads)):
        weights, prefix = _named(content, common, own, heads, path), common
        notes.append(f"the prefix `{common}` of its keys is dropped")
    if left := sorted(name for key in content if _within(name := own(key, prefix), heads)):
        notes.append(_listed(left, "key", "of its head are left out"))
    # a file of several networks: keys without the prefix belong to another one, unless they fit
    others = {own(key, "") for key in content if not key.startswith(prefix)}
    if left := sorted(others & (weights.keys() - wanted.keys())):
        weights = {key: value for key, value in weights.items() if key not in left}
        notes.append(_listed(left, "key", f"without the prefix `{prefix}` are left out"))
    missing, unexpected = _lacking(wanted, weights), sorted(weights.keys() - wanted.keys())
    reshaped = {
        key: (weights[key].shape, value.shape)
        for key, value in wanted.items()
        if key in weights and weights[key].shape != value.shape
    }
    if missing or unexpected or reshaped:
        hint = _hint(content, wanted, candidates, own) if missing else ""
        raise Misfit(path, missing, unexpected, reshaped, hint)
    return Fitted(weights, tuple(notes))


def _own_name(key: str, prefix: str, rename: Callable[[str], str] | None) -> str:
    plain = key.removeprefix(prefix)
    return rename(plain) if rename else plain


def _named(
    content: Weights, prefix: str, own: OwnName, heads: tuple[str, ...], path: Path
) -> Weights:
    """Return the file's weights under the network's own names.

    Raises:
        CheckpointError: two of them have the same name.
    """
    weights: Weights = {}
    for key, value in content.items():
        if (name := own(key, prefix)) in weights:
            raise CheckpointError(f"{path} does not fit: several of its keys mean '{name}'")
        if not _within(name, heads):
            weights[name] = value
    return weights


def _lacking(wanted: Mapping[str, Tensor], names: Iterable[str]) -> list[str]:
    there = set(names)
    return [key for key in wanted if key not in there and not key.endswith(COUNTER)]


def _dropped_unasked(
    content: Weights,
    wanted: Mapping[str, Tensor],
    candidates: list[str],
    own: OwnName,
    heads: tuple[str, ...],
) -> str:
    """Return a prefix of all keys that has to be dropped for them to fit, or an empty string."""
    if not _lacking(wanted, (own(key, "") for key in content)):
        return ""
    for prefix in candidates:
        names = [own(key, prefix) for key in content]
        known = [name in wanted or _within(name, heads) for name in names]
        if (
            all(known)
            and not _lacking(wanted, names)
            and all(key.startswith(prefix) for key in content)
        ):
            return prefix
    return ""


def adopt_shapes(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a network's tensors the shapes of saved weights: it may have pruned itself.

    A parameter stays the same object, so that an optimizer can continue with it. Tensors that the
    network does not have are ignored.
    """
    for name, value in weights.items():
        path, _, attribute = name.rpartition(".")
        try:
            owner = module.get_submodule(path)
        # the network has no such module
        except AttributeError:
            continue
        # a lazy parameter takes its shape when it is loaded
        if isinstance(own := owner._parameters.get(attribute), nn.Parameter) and not is_lazy(own):
            if own.shape != value.shape:
                own.data = torch.empty(value.shape, dtype=own.dtype, device=own.device)
        elif attribute in owner._buffers:
            buffer = owner._buffers[attribute]
            if buffer is None or buffer.shape != value.shape:
                device = value.device if buffer is None else buffer.device
                owner._buffers[attribute] = torch.empty_like(value, device=device)


class Misfit(CheckpointError):
    """Weights that do not fit: keys missing, unexpected, or reshaped (theirs, ours)."""

    def __init__(
        self,
        path: Path,
        missing: list[str],
        unexpected: list[str],
        reshaped: Mapping[str, tuple[torch.Size, torch.Size]],
        hint: str = "",
    ) -> None:
        self.missing = missing
        self.unexpected = unexpected
        self.reshaped = reshaped
        shapes = [
            f"{key} {tuple(theirs)}, not {tuple(ours)}" for key, (theirs, ours) in reshaped.items()
        ]
        kinds = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
        clauses = [_listed(keys, "key", kind) for kind, keys in kinds if keys]
        super().__init__(f"{path} does not fit: {'; '.join(clauses)}{hint}")


def refuse_other_classes(
    error: Misfit, path: Path, module: nn.Module, outputs: int | None, *, teaches: bool
) -> None:
    """Report a classifier of another size, with advice, if nothing else differs.

    Raises:
        CheckpointError: only the classifier's size differs.
    """
    try:
        head = classifier_path(module, outputs)
    # without a single classifier there is no special advice
    except TapError:
        return
    if (
        error.missing
        or error.unexpected
        or not all(_within(key, (head,)) for key in error.reshaped)
    ):
        return
    theirs = next(iter(error.reshaped.values()))[0][0]
    says = f"{path} is a classifier ('{head}') of {theirs} classes, not of {outputs or 'as many'}"
    if not teaches:
        raise CheckpointError(
            f"{says}; `new_head: true` leaves it out and begins with a random one"
        )
    more = (
        f", or say which of its answers they are: `{OWN_OUTPUTS}: {theirs}` and `classes`"
        if theirs > (outputs or theirs)
        else ""
    )
    # no `new_head` for a teacher: a random classifier has nothing to teach
    raise CheckpointError(f"{says}; a teacher needs weights for these classes{more}")


def read_weights(path: Path) -> Weights:
    """Read the weights in a safetensors or torch file, even if a training script nested them.

    Raises:
        CheckpointError: the file is missing, broken, or holds more than tensors and plain values.
    """
    return _chosen(read_groups(path), path, strip_prefix="")[0]


def read_groups(path: Path, *, shapes_only: bool = False) -> dict[str, Weights]:
    """Read every mapping of tensors in a file by its place: "" is the file, `model.` a key.

    Raises:
        CheckpointError: there is none; the file is missing, broken, or holds more than tensors and
            plain values.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        content: Any = (
            _safetensors(path, shapes_only)
            if path.suffix == ".safetensors"
            else _torch_file(path, shapes_only)
        )
    except ModelError:
        raise
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: no checkpoint, or holds more than tensors; code in a file is never run: save"
            " a state_dict()"
        ) from None
    except Exception as error:  # readers raise errors of any type on a broken file
        raise CheckpointError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    groups = dict(_groups(content, shapes_only))
    if not groups:
        keys = (
            _listed([str(key) for key in content], "key")
            if isinstance(content, Mapping) and content
            else type(content).__name__
        )
        raise CheckpointError(
            f"{path}: holds no weights, which are a mapping of tensors; it holds {keys}"
        )
    return groups


def _safetensors(path: Path, shapes_only: bool) -> Any:
    if not shapes_only:
        return load_file(path)
    with safe_open(path, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in list(file.keys())}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _torch_file(path: Path, shapes_only: bool) -> Any:
    archive = zipfile.is_zipfile(path)
    if archive:
        with zipfile.ZipFile(path) as file:
            if any(name.endswith("/constants.pkl") for name in file.namelist()):
                says = (
                    "is a TorchScript archive, whose code kdkit does not run; in Python, save"
                    " `torch.jit.load(FILE).state_dict()`"
                )
                raise CheckpointError(f"{path}: {says}")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
                raise CheckpointError(
                    f"{path}: is a compressed archive, which torch does not write; unpacked it may"
                    " fill the memory"
                )
    # mapped, so that values which are not looked at are not read; files of torch < 1.6 cannot be
    return torch.load(path, map_location="cpu", weights_only=True, mmap=archive and shapes_only)


def _groups(
    content: Any, shapes_only: bool, place: str = "", depth: int = 3, met: set[int] | None = None
) -> Iterator[tuple[str, Weights]]:
    """Yield each mapping once, to a limited depth."""
    # a file of strangers may contain itself, or one mapping under many keys
    met = set() if met is None else met
    # met by identity, as mappings of tensors cannot be compared
    if not isinstance(content, Mapping) or not content or id(content) in met:
        return
    met.add(id(content))
    if all(_is_plain(value, shapes_only) for value in content.values()):
        yield place, {str(key): value for key, value in content.items()}
    elif depth:
        for key, value in content.items():
            if isinstance(key, str):
                yield from _groups(value, shapes_only, f"{place}{key}.", depth - 1, met)


def _is_plain(value: object, shapes_only: bool) -> bool:
    """Check whether it is an ordinary tensor, with values or (`shapes_only`) without."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type in (("cpu", "meta") if shapes_only else ("cpu",))
    )


def _chosen(
    groups: Mapping[str, Weights], path: Path, strip_prefix: str
) -> tuple[Weights, str, list[str]]:
    """Return the group that is meant, the rest of the prefix within it, and a note.

    Raises:
        CheckpointError: the choice is ambiguous.
    """
    # a place such as `model.` ends in a dot
    steps = {place: place.split(".")[:-1] for place in groups}
    known = [place for place in groups if all(step in CONTAINERS for step in steps[place])]
    likely = sorted(known, key=lambda place: [CONTAINERS.index(step) for step in steps[place]])
    place = likely[0] if likely else next(iter(groups))
    # the prefix may name a group, or begin the keys of one
    named = [other for other in groups if other and strip_prefix.startswith(other)]
    if named and not any(key.startswith(strip_prefix) for key in groups[place]):
        return groups[named[0]], strip_prefix.removeprefix(named[0]), []
    if len(groups) > 1 and not likely:
        listed = ", ".join(f"`{other}`" for other in groups)
        raise CheckpointError(
            f"{path}: has weights under several keys; say which are meant by `strip_prefix`, one of"
            f" {listed}"
        )
    others = [f"`{other}`" for other in likely[1:]]
    notes = (
        [f"the weights are those under `{place}`; it also has some under {', '.join(others)}"]
        if others
        else []
    )
    return groups[place], strip_prefix, notes


def _prefixes(content: Weights, wanted: Mapping[str, Tensor]) -> list[str]:
    """List the prefixes that may precede the network's own names in the file."""
    # the first name is enough: a prefix precedes all of them
    first = next(iter(wanted), "")
    prefixes = (key.removesuffix(first) for key in content if first and key.endswith(f".{first}"))
    return list(dict.fromkeys(prefixes))


def _hint(
    content: Weights, wanted: Mapping[str, Tensor], candidates: list[str], own: OwnName
) -> str:
    fits = {
        prefix: sum(key.startswith(prefix) and own(key, prefix) in wanted for key in content)
        for prefix in candidates
    }
    best = [prefix for prefix, count in fits.items() if count == max(fits.values())]
    if not best:
        return ""
    prefixes = "` or `".join(best)
    return f"; with `strip_prefix: {prefixes}` {fits[best[0]]} of {len(wanted)} keys would fit"


def _within(key: str, layers: tuple[str, ...]) -> bool:
    return key.startswith(tuple(f"{layer}." for layer in layers))


def _listed(items: list[str], what: str, kind: str = "") -> str:
    """Format keys as `4 keys missing (a, b, c, ...)`."""
    more = ["..."] if len(items) > SHOWN else []
    counted = f"{len(items)} {what}{'s' if len(items) > 1 else ''}"
    return f"{counted}{' ' * bool(kind)}{kind} ({', '.join([*items[:SHOWN], *more])})"
