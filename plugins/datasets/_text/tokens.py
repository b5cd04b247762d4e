"""From strings to token ids, by a tokenizer of transformers."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field

import kdkit

BYTES = "bytes"


def _beside_its_file(value: Any) -> Any:
    """A folder (`./NAME`, `../NAME`) is meant from the file in which it is written."""
    folder = getattr(value, "folder", None)
    return (
        str((folder / Path(value).expanduser()).resolve())
        if folder is not None and value.startswith((".", "~"))
        else value
    )


class TextOptions(kdkit.DatasetOptions):
    """How texts become tokens."""

    tokenizer: Annotated[str, BeforeValidator(_beside_its_file)] = Field(
        description=(
            "Tokenizer of transformers, which must be that of teacher and student: a name of the"
            " hub, a folder, or `bytes`: a token for each byte, which needs no file (ByT5's, 259"
            " ids, 1 ends a text)."
        )
    )
    max_length: int = Field(
        default=64,
        ge=2,
        description="Tokens of a text at most, special ones included; the rest is cut off.",
    )


def tokenizer_of(name: str, *, fetching: bool = True) -> Any:
    """The tokenizer of that name; `fetching`: by the network, if it is not on this machine."""
    import transformers

    if name == BYTES:
        # Xue et al., "ByT5: Towards a Token-Free Future with Pre-trained Byte-to-Byte Models",
        # TACL 2022, arXiv:2105.13626; its other ids fill masked spans
        return transformers.ByT5Tokenizer(extra_ids=0)
    return transformers.AutoTokenizer.from_pretrained(
        name, local_files_only=not fetching, trust_remote_code=False
    )


@functools.lru_cache(maxsize=8)
def digest_of(tokenizer: str) -> tuple[str, int]:
    """A digest of a tokenizer's words and their ids, and how many ids there are; nothing is
    fetched, and ("", 0) if it is not here.
    """
    try:
        # a check fetches nothing
        known = tokenizer_of(tokenizer, fetching=False)
    except Exception:  # whatever the library raises: `tokenized` says it, when the texts are read
        return "", 0
    words = sorted(known.get_vocab().items())
    return hashlib.sha256(repr(words).encode()).hexdigest(), 1 + max(
        (number for _, number in words), default=-1
    )


def tokenized(
    options: TextOptions, texts: Sequence[Any], labels: Sequence[int], *, cut: bool = True
) -> kdkit.Texts:
    """The texts (strings, or pairs of strings) as token ids; `cut` off behind `max_length`.

    Raises:
        DataError: transformers is not installed, or has no such tokenizer.
    """
    try:
        tokenizer = tokenizer_of(options.tokenizer)
    except ImportError:
        raise kdkit.DataError("texts need transformers: pip install 'kdkit[text]'") from None
    except Exception as error:  # whatever a hub or a file makes it raise
        if options.tokenizer.startswith("/") and not Path(options.tokenizer).is_dir():
            raise kdkit.DataError(f"tokenizer: there is no folder {options.tokenizer}") from error
        reason = kdkit.cause(error, 300)
        raise kdkit.DataError(
            f"tokenizer '{options.tokenizer}' cannot be loaded: {reason}"
        ) from error
    for number, text in enumerate(texts):
        if not isinstance(text, str) and not (
            isinstance(text, tuple) and all(isinstance(part, str) for part in text)
        ):
            raise kdkit.DataError(f"text {number} is none: {text!r}")
    found: Mapping[str, Sequence[Sequence[int]]] = tokenizer(
        list(texts),
        truncation=cut,
        max_length=options.max_length if cut else None,
        return_attention_mask=False,
        verbose=False,  # it would warn of a text that no network reads at once
    )
    tokens = {name: found[name] for name in found}
    if "token_type_ids" in tokens and not any(map(any, tokens["token_type_ids"])):
        del tokens["token_type_ids"]  # of single texts they are what a network takes them to be
    padding = {
        # some tokenizers have none; the mask hides what stands there
        "input_ids": tokenizer.pad_token_id or 0,
        "token_type_ids": tokenizer.pad_token_type_id,
    }
    return kdkit.Texts(tokens, torch.tensor(list(labels), dtype=torch.int64), padding)
