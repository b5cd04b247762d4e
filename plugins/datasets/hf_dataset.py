"""Texts of Hugging Face datasets (extra `text`): of the hub, or of CSV, JSON and Parquet files.

Lhoest et al., "Datasets: A Community Library for Natural Language Processing", EMNLP 2021 demos,
arXiv:2109.02846.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal, Self

from pydantic import Field, model_validator

import kdkit

from ._share import Share, drawn
from ._text.tokens import TextOptions, digest_of, tokenized

KINDS = ("csv", "json", "parquet", "text")
PICKLES = "pandas"  # a kind of files of the library's whose reading runs what is in them


class HfDatasetOptions(TextOptions):
    """Which dataset, and which of its columns."""

    dataset: str = Field(
        description=(
            "Name on the hub (`clinc_oos`), or the kind of the files: csv, json, parquet, text."
        )
    )
    config: str | None = Field(default=None, description="Configuration of it, such as `plus`.")
    files: dict[Literal["train", "test"], kdkit.RecipePath] | None = Field(
        default=None,
        description=(
            "Files of the parts, `{train: FILE, test: FILE}`, where `dataset` is a kind of files;"
            " without `test`, that says which share is for it."
        ),
    )
    train: str = Field(default="train", description="Split to train on.")
    test: str | Share = Field(
        default="test",
        description=(
            "Split to test on; or, such as 0.2, the share of each class in `train` that are test"
            " texts instead, drawn by their first column."
        ),
    )
    text: str | tuple[str, str] = Field(
        default="text", description="Column of the texts, or two of pairs of texts."
    )
    label: str = Field(
        default="label",
        description="Column of the classes: class labels, numbers from 0, or words.",
    )

    @model_validator(mode="after")
    def _files_without_code(self) -> Self:
        if self.dataset == PICKLES or (self.files and self.dataset not in KINDS):
            raise ValueError(
                f"dataset: '{self.dataset}' is no kind of files that is read here; allowed:"
                f" {', '.join(KINDS)}"
            )
        parts = {"train", "test"} if isinstance(self.test, str) else {"train"}
        if self.files is not None and self.files.keys() != parts:
            raise ValueError(
                "files: name `train` and `test`, or `train` alone with a share as `test`"
            )
        return self


class HfDataset(kdkit.DatasetSource):
    """Texts and their classes, as `datasets.load_dataset` gives them."""

    name = "hf_dataset"
    task = "text_classification"
    # `split` tokenises all texts
    split_at_check = False
    Options = HfDatasetOptions
    options: HfDatasetOptions

    def info(self) -> kdkit.DataInfo:
        names = self._classes
        counts = [len(self._parts[part]) for part in ("train", "test")]
        pairs = () if isinstance(self.options.text, str) else ("token_type_ids",)
        shape, tokens = (self.options.max_length,), digest_of(self.options.tokenizer)
        return kdkit.DataInfo(shape, len(names), counts[0], counts[1], tuple(names), pairs, *tokens)

    def split(self, part: Literal["train", "test"]) -> kdkit.Texts:
        rows, number = self._parts[part], {name: i for i, name in enumerate(self._classes)}
        columns = (
            [self.options.text] if isinstance(self.options.text, str) else list(self.options.text)
        )
        texts = list(zip(*(rows[column] for column in columns), strict=True))
        labels = [
            # the numbers of words are those of the training part
            label if isinstance(label, int) else number.get(label, -1)
            for label in rows[self.options.label]
        ]
        if unknown := [
            label for label, i in zip(rows[self.options.label], labels, strict=True) if i < 0
        ]:
            raise kdkit.DataError(
                f"{part}: {unknown[0]!r} is no class of the training part, which has:"
                f" {', '.join(self._classes[:20])}"
            )
        return tokenized(
            self.options, [pair[0] for pair in texts] if len(columns) == 1 else texts, labels
        )

    @cached_property
    def _parts(self) -> dict[str, Any]:
        try:
            import datasets
        except ImportError:
            raise kdkit.DataError(
                "dataset 'hf_dataset' needs datasets: pip install 'kdkit[text]'"
            ) from None
        options = self.options
        files = (
            {"data_files": {part: str(path) for part, path in options.files.items()}}
            if options.files
            else {}
        )
        wanted = {"train": "train" if options.files else options.train}
        if isinstance(options.test, str):
            wanted["test"] = "test" if options.files else options.test
        try:
            loaded = {
                # whatever a dataset comes with, no Python of it runs
                part: datasets.load_dataset(
                    options.dataset, options.config, split=name, trust_remote_code=False, **files
                )
                for part, name in wanted.items()
            }
        except Exception as error:  # whatever a hub or a file makes it raise
            # the library wraps what went wrong
            reason = kdkit.cause(error.__cause__ or error, 300)
            raise kdkit.DataError(
                f"dataset '{options.dataset}' cannot be loaded: {reason}"
            ) from error
        texts = [options.text] if isinstance(options.text, str) else [*options.text]
        columns = (*texts, options.label)
        for part, rows in loaded.items():
            if absent := [column for column in columns if column not in rows.column_names]:
                says = f"has no column '{absent[0]}'; it has: {', '.join(rows.column_names)}"
                raise kdkit.DataError(f"dataset '{options.dataset}', {part}: {says}")
        if not isinstance(options.test, str):
            rows = loaded["train"]
            names, classes = ([*map(str, rows[column])] for column in (texts[0], options.label))
            chosen = drawn(names, options.test, classes)
            loaded["test"] = rows.select(sorted(chosen))
            loaded["train"] = rows.select([i for i in range(len(rows)) if i not in chosen])
        return loaded

    @cached_property
    def _classes(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""
        train = self._parts["train"]
        if names := getattr(train.features[self.options.label], "names", None):
            return list(names)
        found = set(train[self.options.label])
        if strangers := [label for label in found if not isinstance(label, int | str)]:
            raise kdkit.DataError(
                f"column '{self.options.label}': a class is a number from 0 or a word, not"
                f" {strangers[0]!r}"
            )
        return (
            # up to the largest: a class without training texts keeps its number
            [*map(str, range(max(found) + 1))]
            if all(isinstance(label, int) for label in found)
            else sorted(found)
        )


@kdkit.hookimpl
def kdkit_datasets() -> list[type[kdkit.DatasetSource]]:
    return [HfDataset]
