"""Hard distillation: the teacher's decision serves as the label.

Touvron et al., "Training data-efficient image transformers & distillation through attention", ICML
2021, arXiv:2012.12877, eq. 3 (the teacher's half of it). There a second head of the student, on a
token of its own, learns the teacher's label; here it is the student's logits, whatever they come
from.
"""

import torch.nn.functional as F
from torch import Tensor

import kdkit


class HardLabel(kdkit.Loss):
    """Cross-entropy of the student's prediction with the teacher's most probable class.

    Formula: -log softmax(z_s)_k with k = argmax z_t, mean over the batch, in nats

    Logits (B, K) on both sides; of equal largest ones, a single one counts. Labels are not read, so
    inputs may be mixed.
    """

    name = "hard_label"
    knowledge = "response"
    Options = kdkit.ResponseOptions

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        # a decision has no gradient, so the teacher's side needs no `detach`
        return F.cross_entropy(student.logits, teacher.logits.argmax(1))


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [HardLabel]
