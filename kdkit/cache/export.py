"""Writes a full cache of one view as a folder of answers, which any recipe can be taught from."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save

from kdkit import files
from kdkit.cache.packing import LOGITS, TAP
from kdkit.cache.teacher import TeacherCache
from kdkit.contracts.known_answers import INDEX, AnswerArray, AnswerIndex, AnswerShard
from kdkit.errors import RunError

SHARD = 64 << 20  # bytes
READ_AT_ONCE = 1024  # rows


def refuse_taken(folder: Path) -> None:
    """Check that a folder can be made.

    Raises:
        RunError: something is there.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise RunError(f"{folder} exists; name a folder that does not, or remove it")


def write(
    cache: TeacherCache, folder: Path, dataset: str, teacher: str, shard: int = SHARD
) -> AnswerIndex:
    """Write all answers of a cache, in the order of the images; the folder appears when it is
    whole.

    Args:
        cache: of one view, full.
        folder: a new one, or an empty one.
        dataset: what was answered, in words.
        teacher: who answered, in words.
        shard: size of a file at most, in bytes; at least one row.

    Raises:
        RunError: the folder is taken; the cache has no row of logits of each image, or rows that
            are missing or damaged.
    """
    refuse_taken(folder)
    kept, store = cache.kept, cache.store
    if len(kept.shape) != 1:
        what = f"{kept.shape} of each sample" if kept.logits else "layers alone"
        raise RunError(
            f"{store.path}: has {what}; a folder of answers has a row of logits (K,) a sample,"
            " and what a loss reads beside them"
        )
    missing = int((~store.known(torch.arange(cache.images))).sum())
    if missing:
        raise RunError(
            f"{store.path}: {missing:,} of {cache.images:,} samples have no answer, as the recipe"
            " does not train on them"
        )
    with _appearing(folder) as made:
        rows = max(1, shard // kept.bytes)
        shards = []
        for number, start in enumerate(range(0, cache.images, rows)):
            end = min(start + rows, cache.images)
            content = save(_values(cache, start, end))
            path = made / f"answers-{number:05d}.safetensors"
            files.write_atomically(path, content)
            digest = hashlib.sha256(content).hexdigest()
            shards.append(AnswerShard(file=path.name, rows=end - start, sha256=digest))
        dtype, top_k = store.columns[0].dtype, kept.options.top_k
        logits = {"shape": kept.shape, "dtype": dtype, "top_k": top_k, "rest": top_k is not None}
        taps = {
            name: {
                "shape": next(one.shape for one in store.columns if one.name == TAP + name),
                "dtype": dtype,
                "channels_last": name in kept.channels_last,
            }
            for name in kept.taps
        }
        index = AnswerIndex(
            format=1,
            rows=cache.images,
            arrays={
                name: AnswerArray.model_validate(about)
                for name, about in {LOGITS: logits, **taps}.items()
            },
            shards=tuple(shards),
            dataset=dataset,
            teacher=teacher,
        )
        files.write_json(made / INDEX, index.model_dump(mode="json"))
    return index


def _values(cache: TeacherCache, start: int, end: int) -> dict[str, torch.Tensor]:
    """Read the rows from `start` to `end`, by column."""
    parts = []
    for first in range(start, end, READ_AT_ONCE):
        rows = torch.arange(first, min(first + READ_AT_ONCE, end))
        values = cache.store.read(rows)
        if bool(cache.store.damaged(rows, values).any()):
            raise RunError(f"{cache.store.path}: answers were damaged meanwhile; try it again")
        parts.append(values)
    return {name.removeprefix(TAP): torch.cat([part[name] for part in parts]) for name in parts[0]}


@contextlib.contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """Yield a folder that takes its name at the end of the block; without an end it is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
    try:
        yield made
        made.chmod(0o755)
        os.replace(made, folder)
    # BaseException: Ctrl-C must leave nothing either
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
