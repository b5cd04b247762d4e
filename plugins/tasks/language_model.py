"""The next token of a text, for each of its tokens (causal language models)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkit

from ._tokens import TOKENS, counted, texts_of


class LanguageModel(kdkit.Task):
    """One of V tokens behind each token of a text; a row is a token.

    Samples are token ids of at most N tokens, (N,); a batch is a mapping of tensors with an
    `attention_mask`. Targets are the ids themselves, each that of the token before it: labels of
    the dataset are not read, and any dataset of texts will do. Padding does not count, nor do
    tokens where a tensor `completion_mask` (B, N) of the batch is 0. Answers are logits (B, N, V).
    Losses on labels and responses see the next tokens of all texts as rows (R, V).

    Scores: cross-entropy of the next token in nats (decides), its exponential (perplexity), share
    of next tokens that are the most likely one. Agreement with a teacher: share of tokens behind
    which both hold the same token for the most likely.
    """

    name = "language_model"
    takes = "texts"
    rows_are = "classes"
    answer_axis = 2
    default_loss = "cross_entropy"

    def check(self, info: kdkit.DataInfo) -> None:
        if not info.num_tokens:
            raise kdkit.DataError(
                "does not say how many token ids there are: its tokenizer is not on this machine"
                " yet; load it once, or name its folder (`tokenizer: bytes` needs no file)"
            )

    def described(self, info: kdkit.DataInfo) -> kdkit.DataInfo:
        """An output for each token id; classes and labels of texts are not asked for."""
        return replace(
            info, outputs=info.num_tokens, class_names=(), labelled=True, test_labelled=True
        )

    def targets(self, values: Any, info: kdkit.DataInfo, whose: str) -> Tensor:
        """Nothing beside the texts, int64 (N, 0)."""
        try:
            count = len(torch.as_tensor(values))
        except (TypeError, ValueError, RuntimeError) as error:
            raise kdkit.DataError(f"{whose} are no numbers: {kdkit.cause(error)}") from None
        return torch.empty(count, 0, dtype=torch.int64)

    def random_targets(self, info: kdkit.DataInfo, index: Tensor) -> Tensor:
        return index.new_empty(len(index), 0)

    def fits(self, shape: Sequence[int], info: kdkit.DataInfo, count: int) -> bool:
        return len(shape) == 3 and (shape[0], shape[2]) == (count, info.outputs)

    def random_answer(self, info: kdkit.DataInfo, count: int) -> kdkit.Outputs:
        return kdkit.Outputs(torch.randn(count, *info.train_shape, info.outputs))

    def rows(
        self, answers: Sequence[kdkit.Outputs], batch: kdkit.Batch
    ) -> tuple[list[kdkit.Outputs], kdkit.Batch]:
        """The next tokens that count."""
        counts = counted(batch)
        rows = [kdkit.with_logits(answer, _behind(answer, counts)) for answer in answers]
        index = batch.index[:, None].expand_as(counts)[counts]
        targets = texts_of(batch)[TOKENS][:, 1:][counts]
        return rows, kdkit.Batch(targets.new_empty(0), targets, index)

    def scores(self, info: kdkit.DataInfo) -> Sequence[kdkit.Score]:
        def cross_entropy() -> Any:
            from ._metrics import CrossEntropy

            return CrossEntropy()

        def accuracy() -> Any:
            from torchmetrics.classification import MulticlassAccuracy

            # its checks look at values, for which the host would wait for the device
            return MulticlassAccuracy(info.outputs, average="micro", validate_args=False)

        return (
            kdkit.Score(
                name="nll",
                title="NLL",
                build=cross_entropy,
                unit="nats",
                digits=4,
                higher_is_better=False,
                chance=math.log(info.outputs),
                meaning="cross-entropy of the next token, per token",
            ),
            kdkit.Score(
                name="perplexity",
                title="perplexity",
                build=cross_entropy,
                reads=torch.exp,
                digits=3,
                higher_is_better=False,
                chance=info.outputs,
                meaning="exponential of the cross-entropy of the next token",
            ),
            kdkit.Score(
                name="top1",
                title="top-1",
                build=accuracy,
                scale=100.0,
                unit="%",
                chance=100 / info.outputs,
                meaning="share of next tokens that are the most likely one",
            ),
        )

    def agreement(self, info: kdkit.DataInfo) -> Sequence[kdkit.Score]:
        def share() -> Any:
            from ._metrics import mean

            return mean()

        def same(rows: kdkit.Rows) -> tuple[Tensor]:
            theirs = torch.cat([*rows.teacher]).to(rows.answer.device)
            return (rows.answer.argmax(1) == theirs,)

        return (
            kdkit.Score(
                name="agreement",
                title="agreement",
                build=share,
                sees=same,
                scale=100.0,
                unit="%",
                meaning="share of tokens behind which the most likely one is the teacher's too",
            ),
        )

    def remembered(self, answer: kdkit.Outputs, batch: kdkit.Batch) -> Sequence[Tensor]:
        """The most likely next tokens of each text: all logits would fill memories."""
        counts = counted(batch)
        likely = _behind(answer, counts).argmax(1).cpu()
        return torch.split(likely, counts.sum(1).tolist())

    def metric_arguments(self, info: kdkit.DataInfo) -> dict[str, Any]:
        return {"task": "multiclass", "num_classes": info.outputs}


def _behind(answer: kdkit.Outputs, counts: Tensor) -> Tensor:
    """The answers (R, V) to the tokens in front of those that count."""
    logits, length = answer.logits, counts.shape[1]
    if logits.shape[1] < length:  # given to the same texts in a batch of shorter ones
        logits = F.pad(logits, (0, 0, 0, length - logits.shape[1]))
    # answers of a cache are as long as the longest text of all
    return logits[:, :length][counts]


@kdkit.hookimpl
def kdkit_tasks() -> list[type[kdkit.Task]]:
    return [LanguageModel]
