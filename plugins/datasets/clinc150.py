"""CLINC150: short requests to an assistant, of 150 intents, and requests out of scope.

Larson et al., "An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction", EMNLP
2019, arXiv:1909.02027.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

import kdkit

from ._text.tokens import TextOptions, digest_of, tokenized

URL = "https://raw.githubusercontent.com/clinc/oos-eval/master/data/{file}"
FILES = {"plus": "data_oos_plus.json", "full": "data_full.json"}
# training and test, requests out of scope included
SIZES = {"plus": (15_250, 5_500), "full": (15_100, 5_500)}
OUT_OF_SCOPE = "oos"
INTENTS = 151  # that included


class Clinc150Options(TextOptions):
    """Where the files are, and which."""

    root: kdkit.RecipePath = Field(
        default=Path("data"),
        description="Folder that has, or gets, the folder `clinc150`.",
        json_schema_extra=kdkit.BOOKKEEPING,
    )
    download: bool = Field(
        default=False,
        description="Fetch the file if it is not there.",
        json_schema_extra=kdkit.BOOKKEEPING,
    )
    config: Literal["plus", "full"] = Field(
        default="plus",
        description=(
            "plus: 250 training requests out of scope, as `clinc_oos`'s configuration of that name;"
            " full: 100."
        ),
    )


class Clinc150(kdkit.DatasetSource):
    """Requests of 150 intents, and of none of them (`oos`): 15,250 for training and 5,500 for
    the test, as the authors' JSON has them.
    """

    name = "clinc150"
    task = "text_classification"
    # `split` tokenises all texts
    split_at_check = False
    Options = Clinc150Options
    options: Clinc150Options

    def info(self) -> kdkit.DataInfo:
        """What the file has, or, before it is fetched, what is known of it."""
        shape, tokens = (self.options.max_length,), digest_of(self.options.tokenizer)
        # so that `kdkit check` can plan before anything is fetched
        if self.lacks():
            return kdkit.DataInfo(shape, INTENTS, *SIZES[self.options.config], (), (), *tokens)
        counts = [
            len(self._content[part]) + len(self._content[f"{OUT_OF_SCOPE}_{part}"])
            for part in ("train", "test")
        ]
        return kdkit.DataInfo(
            shape, len(self._intents), counts[0], counts[1], tuple(self._intents), (), *tokens
        )

    def lacks(self) -> kdkit.Lacking | None:
        """The authors' JSON."""
        if not self.options.download or self._file.is_file():
            return None
        return kdkit.Lacking(URL.format(file=self._file.name), self._file.parent)

    def fetch(self) -> None:
        """Whole or not at all."""
        import torch

        url = URL.format(file=self._file.name)
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            # writes to a temporary file, and moves it when it is whole
            torch.hub.download_url_to_file(url, str(self._file), progress=False)
        except Exception as error:  # no network, no room...
            raise kdkit.DataError(
                f"{url} cannot be fetched to {self._file}: {type(error).__name__}: {error}"
            ) from error

    def split(self, part: Literal["train", "test"]) -> kdkit.Texts:
        """Requests in scope, then those out of scope."""
        pairs = [*self._content[part], *self._content[f"{OUT_OF_SCOPE}_{part}"]]
        number = {intent: i for i, intent in enumerate(self._intents)}
        return tokenized(
            self.options, [text for text, _ in pairs], [number[intent] for _, intent in pairs]
        )

    @property
    def _file(self) -> Path:
        return self.options.root / "clinc150" / FILES[self.options.config]

    @cached_property
    def _intents(self) -> Sequence[str]:
        """In alphabetical order, `oos` among them."""
        return sorted({intent for part in self._content.values() for _, intent in part})

    @cached_property
    def _content(self) -> dict[str, Any]:
        if not self._file.is_file():
            raise kdkit.DataError(
                f"dataset 'clinc150': there is no {self._file}; `download: true` fetches it"
            )
        try:
            content: dict[str, Any] = json.loads(self._file.read_text())
            if (
                missing := {"train", "test", f"{OUT_OF_SCOPE}_train", f"{OUT_OF_SCOPE}_test"}
                - content.keys()
            ):
                raise ValueError(f"it has no '{min(missing)}'")
        except (OSError, ValueError) as error:
            raise kdkit.DataError(
                f"{self._file}: cannot be read: {error}; `download: true` fetches it anew once it"
                " is removed"
            ) from error
        return content


@kdkit.hookimpl
def kdkit_datasets() -> list[type[kdkit.DatasetSource]]:
    return [Clinc150]
