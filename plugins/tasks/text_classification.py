"""One class for each text."""

from __future__ import annotations

import kdkit

from ._classes import Classes


class TextClassification(Classes):
    """One of K classes for each text; a row is a text.

    Samples are token ids of at most N tokens, (N,); a batch is a mapping of tensors with an
    `attention_mask`. Targets, answers and scores are those of `classification`.
    """

    name = "text_classification"
    takes = "texts"


@kdkit.hookimpl
def kdkit_tasks() -> list[type[kdkit.Task]]:
    return [TextClassification]
