"""Plain text files, a text each line or in blocks of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

import kdkit

from ._text.tokens import TextOptions, digest_of, tokenized


class TextFilesOptions(TextOptions):
    """Where the files are, and what of them is a text."""

    train: kdkit.RecipePath = Field(description="Text file (UTF-8) to train on.")
    test: kdkit.RecipePath = Field(description="Text file that is measured.")
    texts: Literal["blocks", "lines"] = Field(
        default="blocks",
        description=(
            "`blocks`: the whole file in texts of `max_length` tokens (what is left at its end is"
            " not used); `lines`: a text each line, empty ones left out, cut off behind"
            " `max_length`."
        ),
    )


class TextFiles(kdkit.DatasetSource):
    """Texts without labels of two files, for language models."""

    name = "text_files"
    task = "language_model"
    Options = TextFilesOptions
    options: TextFilesOptions

    def info(self) -> kdkit.DataInfo:
        train, test = (len(self._parts[part]) for part in ("train", "test"))
        digest, number = digest_of(self.options.tokenizer)
        shape = (self.options.max_length,)
        return kdkit.DataInfo(
            shape,
            number,
            train,
            test,
            tokenizer=digest,
            num_tokens=number,
            labelled=False,
            test_labelled=False,
        )

    def own_files(self) -> Sequence[Path]:
        files = (self.options.train, self.options.test, Path(self.options.tokenizer))
        return [file for file in files if file.exists()]

    def split(self, part: Literal["train", "test"]) -> kdkit.Texts:
        return self._parts[part]

    @cached_property
    def _parts(self) -> dict[str, kdkit.Texts]:
        return {"train": self._read(self.options.train), "test": self._read(self.options.test)}

    def _read(self, file: Path) -> kdkit.Texts:
        try:
            content = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise kdkit.DataError(f"dataset '{self.name}': {file}: {kdkit.cause(error)}") from None
        lines = [line for line in content.split("\n") if line.strip()]
        if not lines:
            raise kdkit.DataError(f"dataset '{self.name}': {file}: has no text")
        if self.options.texts == "lines":
            return tokenized(self.options, lines, [0] * len(lines))
        whole, length = tokenized(self.options, [content], [0], cut=False), self.options.max_length
        if (count := whole.lengths[0] // length) == 0:
            raise kdkit.DataError(
                f"dataset '{self.name}': {file}: has {whole.lengths[0]} tokens, fewer than the"
                f" {length} of a block (`max_length`)"
            )
        tokens = {
            name: torch.tensor(ids[0][: count * length]).view(count, length).tolist()
            for name, ids in whole.tokens.items()
        }
        return kdkit.Texts(tokens, torch.zeros(count, dtype=torch.int64))


@kdkit.hookimpl
def kdkit_datasets() -> list[type[kdkit.DatasetSource]]:
    return [TextFiles]
