"""Resolves names of layers: from what a recipe writes to a module of the network.

A layer is a `named_modules()` path, a glob over such paths (`blocks.*.attn`; a star stays within
one step of the path), or an alias: `stage1`..`stageN`, `penultimate` (the classifier's input),
`logits` (the network's output). With `@input` behind it, it is what the layer takes, not what it
gives: `layer1.0.act2@input` is a block's sum before its activation.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor, nn

from kdkit.contracts.loss_options import LayerPair
from kdkit.errors import TapError, suggest

INPUT = "@input"
OUTPUT = re.compile(r"output(\d+)")  # a further output of the network, counted from 0
WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
BATCH_NORM = nn.modules.batchnorm._BatchNorm


class NoHead(nn.Identity):
    """Stands where a network that is built without a head would have its classifier."""


@dataclass(frozen=True)
class Layer:
    """A place to observe: output or first argument of the module at `path`; "" is the network.

    `embedding` says that it is one vector per sample, whatever dimensions of size 1 surround it.
    `output`: index of the output, if the network gives several; see `outputs_of`.
    """

    path: str
    side: Literal["output", "input"] = "output"
    embedding: bool = False
    # excluded, because cache keys contain the repr of before this field existed
    output: int = field(default=0, repr=False)


LOGITS = ("logits", "out")


def outputs_of(returned: object) -> list[Tensor]:
    """List the tensors that a network returns, the logits first; empty if it returns others.

    It returns one tensor, a mapping or a named tuple with `logits` (or `out`, as torchvision's
    segmentation networks call them), or a tuple that begins with them.
    """
    if isinstance(returned, Tensor):
        return [returned]
    named = returned._asdict() if hasattr(returned, "_asdict") else returned
    keys = named.keys() if isinstance(named, Mapping) else ()
    main = next((key for key in LOGITS if key in keys), None)
    if isinstance(named, Mapping) and main is not None:
        values = [named[main], *(value for key, value in named.items() if key != main)]
    else:
        values = [*returned] if isinstance(returned, tuple | list) else []
    # outputs may be None or nested, as a transformer's hidden states are; the logits may not
    tensors = [value for value in values if isinstance(value, Tensor)]
    return tensors if tensors and tensors[0] is values[0] else []


def output_of(returned: object, number: int) -> object:
    """Return the output of that number, or the only one: trained networks may drop the others.

    Raises:
        TapError: there are others, but not this one.
    """
    outputs = outputs_of(returned)
    if len(outputs) > 1 and number >= len(outputs):
        raise TapError(
            f"'output{number}': the network gives {len(outputs)} outputs, counted from 0"
        )
    return outputs[min(number, len(outputs) - 1)] if outputs else returned


def resolve(name: str, module: nn.Module, outputs: int | None = None) -> Layer:
    """Find the place in the network that a name means.

    Raises:
        TapError: no such layer; suggests the closest name and lists the others.
    """
    if (kept := kept_layers(module)) is not None:
        return _kept_layer(name, kept)
    if name == "logits":
        return Layer("")
    numbered = OUTPUT.fullmatch(name)
    # a network may call a layer of its own `output1`
    if numbered and name not in dict(module.named_children()):
        return Layer("", output=int(numbered[1]))
    if name == "penultimate":
        return Layer(classifier_path(module, outputs), "input", embedding=True)
    if name.endswith(INPUT):
        return Layer(resolve(name.removesuffix(INPUT), module, outputs).path, "input")
    paths = dict(module.named_modules())
    # before the aliases: a network's own `stage1` is meant by that name
    if name and name in paths:
        return Layer(name)
    stages = stage_paths(module)
    if re.fullmatch(r"stage\d+", name):
        position = int(name.removeprefix("stage"))
        if not stages:
            raise TapError(
                f"'{name}': this network does not say what its stages are; name a layer:"
                f" {_top(module)}"
            )
        if 1 <= position <= len(stages) and stages[position - 1] in paths:
            return Layer(stages[position - 1])
    # a network has hundreds of paths, too many to list them as `suggest` would
    close = difflib.get_close_matches(name, [*paths, *_aliases(stages)], n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise TapError(
        f"there is no layer '{name}'; {hint}allowed: {', '.join(_aliases(stages))}, or a path that"
        f" begins with {_top(module)}{_remark(module)}"
    )


def kept_layers(module: nn.Module) -> Mapping[str, str] | None:
    """Return the paths of all layers by name, of a stand-in for a network; None of a network."""
    return getattr(module, "layer_paths", None)


def _kept_layer(name: str, kept: Mapping[str, str]) -> Layer:
    if name not in kept:
        raise TapError(f"there is no layer '{name}'; {suggest(name, kept)}")
    return Layer(kept[name])


def expand(name: str, module: nn.Module) -> list[str]:
    """List the layers that a glob matches, in the network's order, or the name without one.

    Raises:
        TapError: nothing matches.
    """
    if not any(sign in name for sign in "*?["):
        resolve(name, module)
        return [name]
    kept = kept_layers(module)
    if name.endswith(INPUT) and kept is None:
        return [f"{layer}{INPUT}" for layer in expand(name.removesuffix(INPUT), module)]
    steps = name.split(".")
    aliases = [f"stage{i}" for i in range(1, len(stage_paths(module)) + 1)]
    matches = [alias for alias in aliases if fnmatchcase(alias, name)]
    paths = [path for path, _ in module.named_modules() if path] if kept is None else [*kept]
    matches = matches or [path for path in paths if _matches(path.split("."), steps)]
    if not matches:
        says = f"paths begin with {_top(module)}" if kept is None else suggest(name, kept)
        raise TapError(f"no layer matches '{name}'; {says}")
    return matches


def expand_pairs(
    pairs: Iterable[LayerPair], student: nn.Module, teacher: nn.Module
) -> list[LayerPair]:
    """Expand globs in pairs of layers: first match with first match, and so on.

    Raises:
        TapError: a name matches nothing, or the two sides of a pair match different numbers of
            layers.
    """
    written: list[LayerPair] = []
    for pair in pairs:
        ours, theirs = expand(pair.student, student), expand(pair.teacher, teacher)
        if len(ours) != len(theirs):
            raise TapError(
                f"'{pair.student}' is {len(ours)} student layers ({', '.join(ours)}),"
                f" '{pair.teacher}' is {len(theirs)} teacher layers ({', '.join(theirs)}); they"
                f" must be as many{_remark(student)}{_remark(teacher)}"
            )
        written += [LayerPair(student=s, teacher=t) for s, t in zip(ours, theirs, strict=True)]
    return written


def _remark(module: nn.Module) -> str:
    """Return what a network itself says where it lacks a layer: its attribute `remark`."""
    remark = getattr(module, "remark", None)
    return f"; {remark}" if isinstance(remark, str) else ""


def stage_paths(module: nn.Module) -> list[str]:
    """List the paths of the stages, from `stage1` on: timm's `feature_info` without the stem.

    Without `feature_info`, top-level blocks numbered from 1 (`layer1`, `layer2`, ...), if there is
    one such row.
    """
    info = getattr(module, "feature_info", None)
    # timm stores a list of mappings, or an object with one
    entries = getattr(info, "info", info)
    if not isinstance(entries, Sequence) or not entries:
        return _numbered_blocks(module)
    paths = [str(entry["module"]) for entry in entries if entry.get("module")]
    known = dict(module.named_modules())
    # 0: a flat row of layers, as in VGG, of which none is the stem
    start = next((i for i, path in enumerate(paths) if not _is_stem(path, known)), 0)
    return paths[start:]


def classifier_path(module: nn.Module, outputs: int | None = None) -> str:
    """Find the path of the layer that turns the embedding into logits.

    That is timm's `get_classifier()`, otherwise the last Linear of `outputs` features.

    Raises:
        TapError: there is none, or several.
    """
    ask = getattr(module, "get_classifier", None)
    head = ask() if callable(ask) else module
    # timm's distilled networks return two
    if not isinstance(head, nn.Module) or isinstance(head, nn.ModuleList):
        raise TapError("'penultimate': this network has several classifiers; name a layer instead")
    prefix = next((path for path, child in module.named_modules() if child is head), "")
    if head is not module and not list(head.children()):
        return prefix
    inner = [
        path
        for path, child in head.named_modules()
        if (isinstance(child, nn.Linear) and outputs in (None, child.out_features))
        or isinstance(child, NoHead)
    ]
    if not inner:
        raise TapError("'penultimate': this network has no linear classifier; name a layer instead")
    return ".".join(step for step in (prefix, inner[-1]) if step)


def norm_path(layer: str, module: nn.Module) -> str:
    """Find the path of the batch normalisation that a layer's values come from.

    That is the layer itself or, for an activation's input, the last one registered before it in the
    same block or in an enclosing one.

    Raises:
        TapError: the layer is something else, there is none, or an activation that runs several
            times leaves open which it is.
    """
    tap = resolve(layer, module)
    tapped = module.get_submodule(tap.path)
    if tap.side == "output" and isinstance(tapped, BATCH_NORM):
        # timm's BatchNormAct2d has its activation inside
        if activation := next(
            (name for name, child in tapped.named_children() if not isinstance(child, nn.Identity)),
            None,
        ):
            raise TapError(
                f"'{layer}' gives values behind its activation; take"
                f" '{tap.path}.{activation}{INPUT}'"
            )
        return tap.path
    # a module without parameters is taken for an activation
    is_activation = not any(True for _ in tapped.parameters())
    norm = _norm_before(tap.path, module) if tap.side == "input" and is_activation else None
    if norm is None:
        raise TapError(
            f"no batch norm is known to give '{layer}'; name one, or the input of the activation"
            f" behind it ('...act2{INPUT}')"
        )
    return norm


def _norm_before(path: str, module: nn.Module) -> str | None:
    """Find the batch norm before an activation, with no weighted layer between them."""
    block, _, name = path.rpartition(".")
    around = module.get_submodule(block)
    if isinstance(around, BATCH_NORM):
        return block
    names, children = zip(*around.named_children(), strict=True)
    here = names.index(name)
    norms = [i for i, child in enumerate(children) if isinstance(child, BATCH_NORM)]
    before = [
        i
        for i in norms
        if i < here and not any(isinstance(child, WEIGHTED) for child in children[i:here])
    ]
    if not before:
        return None
    # a block such as torchvision's BasicBlock calls its only activation after every batch norm,
    # while a Sequential runs each child once
    if (
        norms[-1] > here
        and not isinstance(around, nn.Sequential)
        and not any(type(child) is type(children[here]) for child in children[norms[-1] :])
    ):
        candidates = ", ".join(f"'{block}.{names[i]}'" for i in norms)
        raise TapError(
            f"'{path}' may run several times, of which the last is seen; name the batch norm in"
            f" front of that one (`norms`): {candidates}"
        )
    return ".".join(step for step in (block, names[before[-1]]) if step)


def _is_stem(path: str, known: Mapping[str, nn.Module]) -> bool:
    """Check whether a layer is the stem, by its name or as a single layer outside of any row."""
    steps = path.split(".")
    if any("stem" in step for step in steps):
        return True
    if path not in known:
        return False
    weighted = (isinstance(child, WEIGHTED) for child in known[path].modules())
    return sum(weighted) < 2 and not any(step.isdigit() for step in steps)


def _numbered_blocks(module: nn.Module) -> list[str]:
    rows: dict[str, list[str]] = {}
    for name, child in module.named_children():
        match = re.fullmatch(r"(.*?\D)(\d+)", name)
        if match and list(child.children()) and int(match[2]) == len(rows.get(match[1], ())) + 1:
            rows.setdefault(match[1], []).append(name)
    # several rows leave open which one the stages are
    long = [row for row in rows.values() if len(row) > 1]
    return long[0] if len(long) == 1 else []


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    return len(path) == len(pattern) and all(
        fnmatchcase(step, glob) for step, glob in zip(path, pattern, strict=True)
    )


def _aliases(stages: Sequence[str]) -> Iterator[str]:
    yield from ("logits", "penultimate")
    yield from (f"stage{i}" for i in range(1, len(stages) + 1))


def _top(module: nn.Module) -> str:
    return ", ".join(name for name, _ in module.named_children()) or "(it has no layers)"
