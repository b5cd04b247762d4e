"""One class for each text."""

from __future__ import annotations

from collections.abc import Sequence

import kdkit

from ._classes import Classes


class TextClassification(Classes):
    """One of K classes for each text; a row is a text.

    Samples are token ids of at most N tokens, (N,); a batch is a mapping of tensors with an
    `attention_mask`. Targets, answers and scores are those of `classification`.
    """

    name = "text_classification"
    takes = "texts"

    def shape(self, shape: Sequence[int]) -> kdkit.TextShape:
        if len(shape) != 1:
            raise kdkit.DataError(
                f"task '{self.name}' takes texts of at most N tokens (N,), and the samples are"
                f" {tuple(shape)}; say which task it is (`task:`)"
            )
        return kdkit.TextShape(shape)


@kdkit.hookimpl
def kdkit_tasks() -> list[type[kdkit.Task]]:
    return [TextClassification]
