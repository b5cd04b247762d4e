"""Teacher-bounded regression: the teacher's error is a bound. Once the student is better than the
teacher by a margin, the loss lets it go.

Chen, Choi, Yu, Han, Chandraker, "Learning Efficient Object Detection Models with Knowledge
Distillation", NIPS 2017,
https://papers.nips.cc/paper/6676-learning-efficient-object-detection-models-with-knowledge-distillation
The paper's objective is this loss (L_b) with weight nu = 0.5 beside the smooth absolute error on
the targets:

    - {use: smooth_l1}
    - {use: bounded_regression, weight: 0.5}

There the numbers are the four offsets of a box.
"""

from pydantic import Field
from torch import Tensor

import kdkit


class BoundedRegression(kdkit.Loss):
    """Squared error of the student on the targets, where it is not better than the teacher by a
    margin.

    Formula: e_s if e_s + margin > e_t, else 0, with e = sum_d (z - y)_d^2, mean over the batch,
    in squared units of the targets

    The teacher gives no direction, only the bound e_t: the student learns from the targets. Samples
    at which it is let go count as 0 in the mean. Answers and targets (B, D).
    """

    name = "bounded_regression"
    knowledge = "response"
    tasks = frozenset({"numbers"})
    exceptions = {
        "check_teaches_every_part": "a sample at which the student beats the teacher is let go"
    }

    class Options(kdkit.ResponseOptions):
        margin: kdkit.Rampable = Field(
            default=0.0,
            ge=0,
            description=(
                "m: by how much the student's squared error must be below the teacher's; 0: it only"
                " has to be below."
            ),
        )

    options: Options

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        y = batch.labels.to(student.logits)
        e_s, e_t = ((z - y).square().sum(1) for z in (student.logits, teacher.logits))
        return e_s.where(e_s + self.options.margin > e_t, 0.0).mean()


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [BoundedRegression]
