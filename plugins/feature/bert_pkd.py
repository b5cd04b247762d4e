"""Patient distillation (PKD): the direction of a text's first token in several layers is the
teacher's.

Sun, Cheng, Gan and Liu, "Patient Knowledge Distillation for BERT Model Compression", EMNLP 2019,
arXiv:1908.09355, section 3.2, eq. 7; the paper's weight, beta, is 10 to 1000, beside
`cross_entropy` and `logit_kl`. Its PKD-Skip names every second layer of a teacher of twelve, its
PKD-Last the last ones; the last layer of all is left to the predictions:

    - use: bert_pkd
      layers:
        - {student: bert.encoder.layer.0, teacher: bert.encoder.layer.1}
        - {student: bert.encoder.layer.1, teacher: bert.encoder.layer.3}
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdkit


class PatientDistillation(kdkit.Loss):
    """Squared distance between the two models' first tokens, each divided by its L2 norm.

    Formula: sum_d (l(h_s) / |l(h_s)| - h_t / |h_t|)^2, mean over the batch, then over the layer
    pairs

    h is the first token of hidden states (B, N, D), [CLS] of a text or the class token of an image,
    or a vector (B, D) as it is. l is a learnt linear layer where the widths differ, else nothing.
    """

    name = "bert_pkd"
    knowledge = "feature"

    class Options(kdkit.FeatureOptions):
        def pairs(
            self, student: kdkit.Outputs, teacher: kdkit.Outputs
        ) -> Iterator[tuple[Tensor, Tensor]]:
            """Return the first tokens (B, D) of each pair.

            Raises:
                ShapeError: a layer gives no tokens.
            """
            # the first token is none of padding
            answers = student.masked(None), teacher.masked(None)
            wanted = "two hidden states (B, N, D) with a first token to compare, or two vectors"
            return self._each(*answers, first_tokens, wanted)

    options: Options
    adapters: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        self.adapters = nn.ModuleList(
            nn.Identity() if h_s.shape[1] == h_t.shape[1] else nn.Linear(h_s.shape[1], h_t.shape[1])
            for h_s, h_t in self.options.pairs(student, teacher)
        )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        values = []
        pairs = self.options.pairs(student, teacher)
        for adapter, (h_s, h_t) in zip(self.adapters, pairs, strict=True):
            # 1e-4 bounds the gradient of a token near 0, where torch's own 1e-12 does not
            u_s, u_t = F.normalize(adapter(h_s), eps=1e-4), F.normalize(h_t, eps=1e-4)
            values.append((u_s - u_t).square().sum(1).mean())
        return torch.stack(values).mean()


def first_tokens(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first tokens (B, D) of hidden states; vectors as they are.

    Raises:
        ShapeError: they are neither, or of two kinds.
    """
    if f_s.ndim != f_t.ndim or f_s.ndim not in (2, 3):
        raise kdkit.ShapeError("no first tokens")
    return (f_s, f_t) if f_s.ndim == 2 else (f_s[:, 0], f_t[:, 0])


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [PatientDistillation]
