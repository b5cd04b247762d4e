"""Universal self-distillation (USKD): soft labels made of the student's own prediction and of a
weak classifier at a middle layer.

Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
Normalized Loss and Customized Soft Labels", ICCV 2023, arXiv:2303.13005, the self-distillation;
parts, weights and mixed labels as in the released code. The paper's objective is `cross_entropy`
with weight 1 beside this loss.

The released code ranks classes by log p / (1 - log p_y), as a variable is overwritten, where the
paper has p / (1 - p_y); `ranking: released` does that. Its weight of a mixed sample's label may be
negative and then drives the label's probability to 0; here it is 0 at least. Of a sample that is
not mixed, in a batch of mixed ones, it leaves out an arbitrary second class; here, the label only.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit


class CustomSoftLabels(kdkit.Loss):
    """Cross-entropy with a soft label for the target, soft labels by rank for the other classes,
    and the labels for the weak classifier that helps to rank them.

    Formula: -alpha * v log p_y - beta * sum over c other than y of h_c log p'_c + mu * CE(w, smooth
    label), mean over the batch, in nats; v = p_y^2 + 1 - the batch's mean of p_y^2

    p is the student's prediction, p' the same over the classes other than the label. h_c is 1 / the
    rank of class c among all by w_c / (1 - w_y) + p_c / (1 - p_y), the largest first, divided by
    the sum over the classes other than the label (Zipf's law). w is the prediction of the weak
    classifier, a linear layer on the vectors of a middle layer (maps averaged over positions,
    tokens over tokens). v and h are constants. Of a mixed sample, the classes of the two largest
    shares are labels, with the share in the place of 1 and 0 at least; CE has all shares.
    """

    name = "uskd"
    knowledge = "labels"
    tasks = frozenset({"classes of samples"})
    exceptions = {
        "check_the_gradient_is_that_of_the_value": (
            "soft labels are made of predictions, and constants"
        ),
    }

    class Options(kdkit.VectorOptions):
        layers: tuple[kdkit.LayerPair, ...] = Field(
            min_length=1,
            description="The middle layer of the student, named on both sides of a pair.",
        )
        alpha: kdkit.Rampable = Field(
            default=1.0, ge=0, description="Weight of the part on the label."
        )
        beta: kdkit.Rampable = Field(
            default=0.1, ge=0, description="Weight of the part on the other classes."
        )
        mu: kdkit.Rampable = Field(
            default=0.005, ge=0, description="Weight of the weak classifier's cross-entropy."
        )
        smoothing: float = Field(
            default=0.1, ge=0, lt=1, description="Label smoothing for the weak classifier."
        )
        ranking: Literal["paper", "released"] = Field(
            default="paper",
            description=(
                "What the student's prediction adds to the rank of a class: p / (1 - p_y), or the"
                " same of logarithms."
            ),
        )
        gather: bool = Field(
            default=False,
            description="Take the mean of p_y^2 over all processes, not over each alone.",
        )

    options: Options
    weak: nn.Linear

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        names = {name for pair in self.options.layers for name in (pair.student, pair.teacher)}
        if len(self.options.layers) > 1 or len(names) > 1:
            raise kdkit.ShapeError(
                f"{self.name} reads one layer of the student, not {', '.join(sorted(names))}: name"
                " it on both sides of one pair"
            )
        if student.logits.ndim != 2 or student.logits.shape[1] < 2:
            raise kdkit.ShapeError(
                f"{self.name}: student logits {tuple(student.logits.shape)} must be (B, K) of two"
                " classes or more"
            )
        self.weak = nn.Linear(self.middle(student).shape[1], student.logits.shape[1])

    def middle(self, student: kdkit.Outputs) -> Tensor:
        """Return the vectors (B, D) that the weak classifier reads."""
        ((f, _),) = self.options.pairs(student, student)
        return f

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        o = self.options
        weak = self.weak(self.middle(student))
        number, share = targets(batch.labels)
        log_p = student.logits.log_softmax(1)
        is_target = torch.zeros_like(log_p, dtype=torch.bool).scatter(1, number, share > 0)
        of_target = self.of_targets(log_p.gather(1, number), share)
        with torch.no_grad():
            h = self.by_rank(log_p, weak.softmax(1), is_target)
        nothing = torch.finfo(log_p.dtype).min / 2
        others = student.logits.masked_fill(is_target, nothing).log_softmax(1)
        label = F.cross_entropy(weak, batch.labels, label_smoothing=o.smoothing, reduction="none")
        value = o.alpha * of_target - o.beta * (h * others).sum(1) + o.mu * label
        return (kdkit.gather(value) if o.gather else value).mean()

    def of_targets(self, log_p: Tensor, share: Tensor) -> Tensor:
        """Return the cross-entropy of each sample with the soft labels of its targets, from their
        logarithms (B, M) and shares.
        """
        square = log_p.detach().exp().square()
        mean = (kdkit.gather(square) if self.options.gather else square).mean(0)
        v = (square + share - mean).clamp_min(0) * (share > 0)
        return -(v * log_p).sum(1)

    def by_rank(self, log_p: Tensor, w: Tensor, is_target: Tensor) -> Tensor:
        """Return the soft labels of the classes that are no targets, (B, K)."""
        p = log_p.exp() if self.options.ranking == "paper" else log_p
        score = relative(w, is_target) + relative(p, is_target)
        # stable: of equal classes the first is ranked first, on every device
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(1)
        h = (1.0 / (rank + 1)).to(log_p.dtype) * ~is_target
        # of two classes, both may be targets
        return h / h.sum(1, keepdim=True).clamp_min(1e-6)


def relative(x: Tensor, is_target: Tensor) -> Tensor:
    """Divide numbers (B, K) by 1 less those of the targets."""
    return x / (1 - (x * is_target).sum(1, keepdim=True) + 1e-6)


def targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers (B, M) of the classes that are labels, and their shares: one of class
    indices (B,), the two largest of shares (B, K).
    """
    if labels.ndim == 1:
        return labels[:, None], torch.ones_like(labels[:, None])
    share, number = labels.sort(dim=1, descending=True, stable=True)
    return number[:, :2], share[:, :2]


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [CustomSoftLabels]
