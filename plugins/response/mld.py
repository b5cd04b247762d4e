"""Multi-label logit distillation (MLD): one yes-or-no question per label, answered as the teacher
does.

Yang, Xie, Zong, Feng, Niu, Sugiyama, Huang, "Multi-Label Knowledge Distillation", ICCV 2023,
arXiv:2308.06453, its logit term. The paper's objective (L2D) is `bce` with weight 1 beside this
loss with weight 10 and `led`:

    - {use: bce}
    - {use: mld, weight: 10}

As there, the divergences are summed over the labels. `binary_kd` with `target: sigmoid` is their
mean and a cross-entropy: it has this gradient divided by K. The released code keeps probabilities
between 1e-8 and 1 - 1e-8, which in fp32 rounds to 1; here logits give both logarithms exactly.
"""

import torch.nn.functional as F
from torch import Tensor

import kdkit


class MultiLabelLogits(kdkit.Loss):
    """Binary KL divergence of the student's prediction of each label from the teacher's.

    Formula: sum_k (q_k log(q_k / p_k) + (1 - q_k) log((1 - q_k) / (1 - p_k))), mean over the batch,
    in nats

    p = sigmoid(z_s) and q = sigmoid(z_t). Logits (B, K) on both sides.
    """

    name = "mld"
    knowledge = "response"
    tasks = frozenset({"labels"})
    Options = kdkit.ResponseOptions

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        z_s, z_t = student.logits, teacher.logits
        yes = z_t.sigmoid() * (F.logsigmoid(z_t) - F.logsigmoid(z_s))
        # not 1 - q, which loses the digits of a probability near 1
        no = (-z_t).sigmoid() * (F.logsigmoid(-z_t) - F.logsigmoid(-z_s))
        return (yes + no).sum(1).mean()


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [MultiLabelLogits]
