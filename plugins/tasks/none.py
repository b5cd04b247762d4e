"""No labels: what is learnt is an embedding of each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit

UNLABELLED = -1


class NoLabels(kdkit.Task):
    """An embedding (B, D) of each image, learnt without labels; a row is an image.

    Networks are built without a head; teacher and student may have embeddings of other widths. No
    loss on labels or responses is for this task: losses on features and relations are, such as
    `embedding` and `seed`. Scores: linear CKA with the teacher's embeddings, and how much of them a
    linear map of the student's explains. Where test images have labels, also the accuracy of
    nearest neighbours and of a linear probe; both leave one out of the test images, so that they
    are lower than published figures that learn from all training images. An image without a label
    has the label -1.
    """

    name = "none"
    rows_are = "embeddings"
    default_loss = "embedding"

    class Options(kdkit.TaskOptions):
        decides: Literal["teacher", "neighbours", "probe"] = Field(
            default="teacher",
            description=(
                "What chooses epochs, students and variants: similarity to the teacher's"
                " embeddings (CKA), or, on test images with labels, the accuracy of nearest"
                " neighbours or of a linear probe."
            ),
        )
        neighbours: int = Field(default=20, ge=1, description="Number of neighbours that vote, k.")
        penalty: float = Field(
            default=1.0,
            gt=0,
            description="Factor of the squared weights in ridge regression, on the sum of errors.",
        )

    options: Options

    def check(self, info: kdkit.DataInfo) -> None:
        if self.options.decides != "teacher" and not info.test_labelled:
            raise kdkit.DataError(
                "has test images without labels, and the task says `decides:"
                f" {self.options.decides}`, which reads them"
            )

    def targets(self, values: Any, info: kdkit.DataInfo, whose: str) -> Tensor:
        """Class indices as int64 (N,); -1 is no label."""
        try:
            found = torch.as_tensor(values)
        except (TypeError, ValueError, RuntimeError) as error:
            says = " ".join(str(error).split())
            raise kdkit.DataError(f"{whose} are no numbers: {says}") from None
        # labels only measure neighbours and a probe, which ask for one class
        if found.ndim != 1 or found.is_floating_point() or found.is_complex():
            raise kdkit.DataError(
                f"{whose} are {found.dtype} {tuple(found.shape)}; for task 'none' a label is the"
                " class of an image, or -1 for none"
            )
        found = found.to(torch.int64)
        most = max(info.outputs, 1) - 1
        if len(found) and not UNLABELLED <= int(found.min()) <= int(found.max()) <= most:
            raise kdkit.DataError(
                f"{whose} go from {int(found.min())} to {int(found.max())}; a label is a class"
                f" from 0 to {most}, or -1 for none"
            )
        return found

    def random_targets(self, info: kdkit.DataInfo, index: Tensor) -> Tensor:
        return index % max(info.outputs, 1)

    def outputs(self, info: kdkit.DataInfo) -> int:
        return 0

    def fits(self, shape: Sequence[int], info: kdkit.DataInfo, count: int) -> bool:
        return len(shape) == 2 and shape[0] == count and shape[1] > 0

    def random_answer(self, info: kdkit.DataInfo, count: int) -> kdkit.Outputs:
        return kdkit.Outputs(torch.randn(count, 8))

    def combined(
        self,
        answers: Sequence[kdkit.Outputs],
        by: Any = "probabilities",
        weights: Tensor | None = None,
    ) -> kdkit.Outputs:
        """Embeddings of several models side by side, each of norm 1, times the root of its weight:
        a cosine is then the weighted mean of theirs.
        """
        shares = torch.ones(len(answers)) if weights is None else weights
        roots = (shares / shares.sum()).sqrt().to(answers[0].logits)
        parts = [
            root * F.normalize(answer.logits.float(), eps=1e-6)
            for root, answer in zip(roots, answers, strict=True)
        ]
        return kdkit.Outputs(torch.cat(parts, 1))

    def as_targets(self, answer: kdkit.Outputs) -> Tensor:
        """A teacher's embedding says no label."""
        return torch.full(answer.logits.shape[:1], UNLABELLED, device=answer.logits.device)

    def seen(self, rows: kdkit.Rows) -> tuple[Any, ...]:
        raise kdkit.DataError("torchmetrics' classes compare answers with labels")

    def scores(self, info: kdkit.DataInfo) -> Sequence[kdkit.Score]:
        cka, explained = self._of_teacher()
        if not info.test_labelled:
            return cka, explained
        neighbours, probe = self._of_labels(info)
        first = {"teacher": cka, "neighbours": neighbours, "probe": probe}[self.options.decides]
        # the first one decides; `sorted` keeps the order of the others
        return sorted((cka, explained, neighbours, probe), key=lambda score: score is not first)

    def _of_teacher(self) -> tuple[kdkit.Score, kdkit.Score]:
        penalty = self.options.penalty

        def build() -> Any:
            from ._embedding_metrics import Likeness

            return Likeness(penalty)

        shared: dict[str, Any] = {"build": build, "sees": beside_teacher, "of_teacher": True}
        return (
            kdkit.Score(
                name="cka",
                title="CKA",
                digits=4,
                reads=lambda found: found["cka"],
                meaning="linear CKA of the embeddings with the teacher's, from 0 to 1",
                **shared,
            ),
            kdkit.Score(
                name="explained",
                title="explained",
                unit="%",
                scale=100.0,
                reads=lambda found: found["explained"],
                meaning=(
                    "share of the variance of the teacher's embeddings that ridge regression on the"
                    " student's predicts, each image left out of its own prediction"
                ),
                **shared,
            ),
        )

    def _of_labels(self, info: kdkit.DataInfo) -> tuple[kdkit.Score, kdkit.Score]:
        options, chance = self.options, 100 / info.outputs if info.outputs else None

        def build() -> Any:
            from ._embedding_metrics import Accuracies

            return Accuracies(options.neighbours, options.penalty)

        shared: dict[str, Any] = {
            "build": build,
            "unit": "%",
            "scale": 100.0,
            "chance": chance,
        }
        return (
            kdkit.Score(
                name="knn",
                title=f"{options.neighbours}-NN",
                reads=lambda found: found["knn"],
                meaning=(
                    f"share of test images whose class {options.neighbours} neighbours by cosine"
                    " among the other test images vote for, with weights exp(cosine / 0.07)"
                ),
                **shared,
            ),
            kdkit.Score(
                name="probe",
                title="probe",
                reads=lambda found: found["probe"],
                meaning=(
                    "share of test images whose class a linear classifier finds, by ridge"
                    " regression on all other test images"
                ),
                **shared,
            ),
        )


def beside_teacher(rows: kdkit.Rows) -> tuple[Tensor, Tensor]:
    """Embeddings of the student and of the teacher."""
    return rows.answer, rows.teacher.float()


@kdkit.hookimpl
def kdkit_tasks() -> list[type[kdkit.Task]]:
    return [NoLabels]
