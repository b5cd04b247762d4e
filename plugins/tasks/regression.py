"""Numbers for each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

import kdkit

from ._numbers import columns, table


class Regression(kdkit.Task):
    """D numbers for each image; a row is an image.

    Targets are finite numbers (N, D), one number a sample becomes a column; answers (B, D) are the
    numbers themselves. Scores: mean absolute error (decides by default), root mean squared error
    and R^2 over all outputs, and the mean absolute error of each output, in the unit of the
    targets.
    """

    name = "regression"
    rows_are = "numbers"
    default_loss = "mse"

    class Options(kdkit.TaskOptions):
        decides: Literal["mae", "r2"] = Field(
            default="mae",
            description=(
                "The score that chooses epochs, students and variants: the mean absolute error, or"
                " R^2, in which outputs of different units count alike."
            ),
        )

    options: Options

    def check(self, info: kdkit.DataInfo) -> None:
        if info.outputs < 1:
            raise kdkit.DataError("has no number to predict")

    def targets(self, values: Any, info: kdkit.DataInfo, whose: str) -> Tensor:
        """Numbers as fp32 (N, D)."""
        largest = torch.finfo(torch.float32).max
        wanted = f"a target is {info.outputs} finite number{'s' if info.outputs > 1 else ''}"
        return table(values, info, whose, wanted, within=(-largest, largest))

    def random_targets(self, info: kdkit.DataInfo, index: Tensor) -> Tensor:
        return (index[:, None] + torch.arange(1.0, info.outputs + 1, device=index.device)).sin()

    def scores(self, info: kdkit.DataInfo) -> Sequence[kdkit.Score]:
        outputs = info.outputs
        error: dict[str, Any] = {"sees": in_double, "digits": 4, "higher_is_better": False}

        def mae() -> Any:
            from ._number_metrics import mean_absolute_error

            return mean_absolute_error()

        def rmse() -> Any:
            from ._number_metrics import root_mean_squared_error

            return root_mean_squared_error()

        def r2() -> Any:
            from ._number_metrics import R2

            return R2(outputs)

        def mae_of_each() -> Any:
            from ._number_metrics import mean_absolute_error

            return mean_absolute_error(outputs)

        whole = (
            kdkit.Score(
                name="mae",
                title="MAE",
                build=mae,
                meaning="mean absolute error over samples and outputs",
                **error,
            ),
            kdkit.Score(
                name="rmse",
                title="RMSE",
                build=rmse,
                meaning="root of the mean squared error over samples and outputs",
                **error,
            ),
            kdkit.Score(
                name="r2",
                title="R^2",
                build=r2,
                sees=in_double,
                digits=4,
                meaning=(
                    "1 - squared error / variance of the targets, mean over the outputs that vary"
                ),
            ),
        )
        each = kdkit.Score(
            name="mae_of",
            title="MAE",
            build=mae_of_each,
            parts=columns(info),
            meaning="mean absolute error of the output",
            **error,
        )
        # the first one decides; `sorted` keeps the order of the others
        ordered = sorted(whole, key=lambda score: score.name != self.options.decides)
        # that of a single output is the whole
        return (*ordered, *([each] if outputs > 1 else []))

    def agreement(self, info: kdkit.DataInfo) -> Sequence[kdkit.Score]:
        def mae() -> Any:
            from ._number_metrics import mean_absolute_error

            return mean_absolute_error()

        return (
            kdkit.Score(
                name="mae_to_teacher",
                title="MAE to teacher",
                build=mae,
                sees=lambda rows: in_double(kdkit.Rows(rows.answer, rows.teacher)),
                digits=4,
                higher_is_better=False,
                meaning="mean absolute difference from the teacher's answers",
            ),
        )


def in_double(rows: kdkit.Rows) -> tuple[Tensor, Tensor]:
    """Answers and targets as contiguous doubles: their sums are the same in batches of any size."""
    return rows.answer.double().contiguous(), rows.target.double().contiguous()


@kdkit.hookimpl
def kdkit_tasks() -> list[type[kdkit.Task]]:
    return [Regression]
