"""Tensors of a served teacher on their way: safetensors over HTTP, so that nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kdkit.contracts.records import Inputs, Outputs
from kdkit.errors import RunError

TOKEN = "KDKIT_TOKEN"  # environment variable that both sides read
ASKED = "Kdkit-Asked"  # HTTP header of a request: what is asked, as JSON
LAST = "Kdkit-Channels-Last"  # of an answer: names of tensors in that layout, as JSON
ABOUT, ANSWER, HEAD = "/about", "/answer", "/head"
IMAGES, LOGITS, LAYER = "images", "logits", "layer "
PRECISIONS = {
    None: None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def name_of(precision: torch.dtype | None) -> str | None:
    """Return the name of a type, a key of PRECISIONS."""
    return str(precision).removeprefix("torch.") if precision else None


def authorization(token: str) -> str:
    """Return the header of a request that knows the token: a digest, as a header is ASCII."""
    return f"Bearer {hashlib.sha256(token.encode()).hexdigest()}"


def pack_inputs(inputs: Inputs) -> bytes:
    """Return a batch as bytes."""
    named = {IMAGES: inputs} if isinstance(inputs, Tensor) else inputs
    return pack(named)[0]


def unpack_inputs(data: bytes) -> Inputs:
    """Return a batch (see `pack_inputs`).

    Raises:
        RunError: these are no tensors.
    """
    named = unpack(data)
    return named[IMAGES] if [*named] == [IMAGES] else named


def pack_answer(answer: Outputs, *, logits: bool) -> tuple[bytes, str]:
    """Return an answer as bytes, and the names of its tensors that are channels-last as JSON."""
    named = {LAYER + name: value for name, value in answer.features.items()}
    return pack({**named, **({LOGITS: answer.logits} if logits else {})})


def unpack_answer(data: bytes, last: str) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Return the logits and the layers of an answer (see `pack_answer`).

    Raises:
        RunError: these are no tensors.
    """
    named = unpack(data)
    for name in named.keys() & set(json.loads(last)):
        named[name] = named[name].contiguous(memory_format=torch.channels_last)
    layers = {k.removeprefix(LAYER): v for k, v in named.items() if k.startswith(LAYER)}
    return named.get(LOGITS), layers


def pack(named: Mapping[str, Tensor]) -> tuple[bytes, str]:
    """Return tensors as bytes, and the names of those that are channels-last as JSON."""
    last = [
        name
        for name, value in named.items()
        if value.ndim == 4
        and not value.is_contiguous()
        and value.is_contiguous(memory_format=torch.channels_last)
    ]
    # copies: layers may share memory, which safetensors refuses
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in named.items()}
    return save(tensors), json.dumps(last)


def unpack(data: bytes) -> dict[str, Any]:
    """Return tensors (see `pack`).

    Raises:
        RunError: these are none.
    """
    try:
        found: dict[str, Any] = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise RunError(f"no tensors, or damaged ones: {error}") from None
    return found
