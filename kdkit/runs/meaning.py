"""Compares the meaning of a network's inputs and outputs with that of the data."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.model_source import Meaning, ModelOptions, ModelSource
from kdkit.errors import ModelError


def meaning_of(options: ModelOptions, source: ModelSource, module: Any) -> Meaning:
    """Return the known meaning of a network: from the files of the run or export beside its
    checkpoint, or from its source.
    """
    beside = _beside(options.checkpoint) if options.checkpoint else None
    return beside or source.meaning(module)


def refuse_other_meaning(theirs: Meaning, info: DataInfo, whose: str) -> None:
    """Compare what is known of a network's classes and tokens with those of the data.

    Args:
        theirs: of a network.
        info: of the data.
        whose: the network, for the message.

    Raises:
        ModelError: a class or a token has another number than in the data.
    """
    # not strict: either side may have no names
    for number, (name, ours) in enumerate(zip(theirs.class_names, info.class_names, strict=False)):
        if name != ours and (name in info.class_names or ours in theirs.class_names):
            raise ModelError(
                f"{whose} has the classes in another order: class {number} is '{name}' there and"
                f" '{ours}' in the data"
            )
    if theirs.tokenizer and info.tokenizer and theirs.tokenizer != info.tokenizer:
        raise ModelError(
            f"{whose} has another tokenizer than the data: the same words are other token ids there"
        )
    if theirs.num_tokens and info.num_tokens > theirs.num_tokens:
        raise ModelError(
            f"{whose} knows {theirs.num_tokens:,} tokens, and the data's tokenizer has"
            f" {info.num_tokens:,}"
        )


def other_class_names(theirs: Meaning, info: DataInfo) -> str:
    """Return a name that only one side has, if both name their classes; otherwise an empty
    string.
    """
    strangers = [name for name in theirs.class_names if name not in info.class_names]
    return strangers[0] if strangers and info.class_names else ""


def _beside(checkpoint: Path) -> Meaning | None:
    """Read the meaning of the weights in a run folder or an exported folder."""
    for file, key in (("run.json", "data"), ("config.json", "kdkit")):
        # without a readable file nothing is known, which is no error
        with contextlib.suppress(OSError, ValueError):
            about = json.loads((checkpoint.parent / file).read_text(encoding="utf-8"))
            told = about.get(key) if isinstance(about, Mapping) else None
            if isinstance(told, Mapping):
                return Meaning(
                    tuple(told.get("class_names") or ()), str(told.get("tokenizer") or ""), 0
                )
    return None
