"""What the numbers that go into a network and come out of it stand for, compared with what the
data mean by them.
"""

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
    """What is known of a network: by the files beside its checkpoint, where a run or an export
    left them, or by its source.
    """
    beside = _beside(options.checkpoint) if options.checkpoint else None
    return beside or source.meaning(module)


def refuse_other_meaning(theirs: Meaning, info: DataInfo, whose: str) -> None:
    """Compare what both sides know.

    Args:
        theirs: of a network.
        info: of the data.
        whose: the network, for the message.

    Raises:
        ModelError: it takes a class, or a token, for another one than the data do.
    """
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
    """A name that only one side has, where both name their classes; empty if there is none."""
    strangers = [name for name in theirs.class_names if name not in info.class_names]
    return strangers[0] if strangers and info.class_names else ""


def _beside(checkpoint: Path) -> Meaning | None:
    """What a run folder, or an exported folder, says of the weights in it."""
    for file, key in (("run.json", "data"), ("config.json", "kdkit")):
        with contextlib.suppress(OSError, ValueError):
            about = json.loads((checkpoint.parent / file).read_text(encoding="utf-8"))
            told = about.get(key) if isinstance(about, Mapping) else None
            if isinstance(told, Mapping):
                return Meaning(
                    tuple(told.get("class_names") or ()), str(told.get("tokenizer") or ""), 0
                )
    return None
