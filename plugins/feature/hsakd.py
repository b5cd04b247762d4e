"""Hierarchical self-supervised augmented distillation (HSAKD): branches at every stage say which
class an image has and how it is turned, as the teacher's do.

Yang, An, Cai and Xu, "Hierarchical Self-supervised Augmented Knowledge Distillation", IJCAI 2021,
arXiv:2107.13715; parts and reductions as in the released code. The paper's objective is
`cross_entropy` on plain images beside this loss, both with weight 1:

    schedule:
      use: staged
      turned: true
      stages:
        - {name: branches, losses: [hsakd], train: [hsakd.teacher_branches]}
        - {name: distill, train: [student, hsakd.student_branches]}
    losses:
      - {use: cross_entropy}
      - {use: hsakd, layers: [{student: 'stage*', teacher: 'stage*'}]}

There, a branch has the blocks of the network's later stages; here, convolutions that bring the map
to the size of the last layer's. The paper's better results have a teacher that learnt together with
its branches; here, as in its other ones, it is trained already.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit

ANGLES = 4


class HierarchicalBranches(kdkit.Loss):
    """Divergence of the two models' branches over class and angle together, and of their logits, on
    plain and turned images.

    Formula: joint * T^2 * sum over the layer pairs of KL(softmax(b_t / T) || softmax(b_s / T)) +
    logits * T^2 * KL(softmax(z_t / T) || softmax(z_s / T)), mean over plain and turned images, in
    nats; while the teacher's branches learn, also the sum of their cross-entropies with class and
    angle, a mean over all images too

    z (4N, K) are logits of each image at four angles. b (4N, 4 K) are those of a branch at a layer:
    3x3 convolutions with batch normalisation and ReLU, of stride 2 until the map has the size of
    the last pair's, then a mean over positions and a linear layer. Class c at angle r is number 4 c
    + r. Layers are maps (B, C, H, W) or tokens of a square grid. b_t is constant in the first part.

    It needs to be shown turned images: `schedule: {use: staged, turned: true}`. A first stage with
    `train: [hsakd.teacher_branches]` trains the teacher's branches; in later ones, with `train:
    [student, hsakd.student_branches]`, they rest and the value is the paper's. Without stages all
    learn at once. Nothing of it is deployed.
    """

    name = "hsakd"
    knowledge = "feature"
    needs_teacher_logits = True
    needs_views = {"turned": ANGLES - 1}
    exceptions = {
        "check_says_its_reduction": (
            "plain and turned maps are one batch, and the check enlarges the plain ones only"
        ),
    }

    class Options(kdkit.MapOptions):
        joint: kdkit.Rampable = Field(
            default=1.0, ge=0, description="Weight of the branches' divergence."
        )
        logits: kdkit.Rampable = Field(
            default=1.0, ge=0, description="Weight of the divergence of logits."
        )
        temperature: kdkit.Rampable = Field(
            default=3.0, gt=0, description="T: softens all predictions."
        )

        def check(self, student: kdkit.Outputs, teacher: kdkit.Outputs) -> None:
            for outputs in (student, teacher):
                if "turned" not in outputs.views:
                    raise kdkit.ShapeError(
                        "hsakd reads turned images beside plain ones; let both models see them:"
                        " `schedule: {use: staged, turned: true}`"
                    )
            super().check(student, teacher)
            kdkit.ResponseOptions().check(student, teacher)

    options: Options
    student_branches: nn.ModuleList
    teacher_branches: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        super().setup(student, teacher, context)
        ours, theirs = zip(*self.options.pairs(student, teacher), strict=True)
        outputs = ANGLES * student.logits.shape[1]
        self.student_branches = nn.ModuleList(branch(f, ours[-1], outputs) for f in ours)
        self.teacher_branches = nn.ModuleList(branch(f, theirs[-1], outputs) for f in theirs)

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        o, t = self.options, self.options.temperature
        seen_s, seen_t = student.views["turned"], teacher.views["turned"]
        z_s = torch.cat([student.logits, seen_s.logits])
        z_t = torch.cat([teacher.logits, seen_t.logits])
        total = o.logits * divergence(z_s, z_t, t)
        plain, turned = o.pairs(student, teacher), o.pairs(seen_s, seen_t)
        for branch_s, branch_t, features, others in zip(
            self.student_branches, self.teacher_branches, plain, turned, strict=True
        ):
            f_s, f_t = (torch.cat(pair) for pair in zip(features, others, strict=True))
            b_s, b_t = branch_s(f_s), branch_t(f_t)
            total = total + o.joint * divergence(b_s, b_t.detach(), t)
            # only where the branch learns: in later stages the value is the paper's
            if any(weight.requires_grad for weight in branch_t.parameters()):
                total = total + F.cross_entropy(b_t, joint_labels(batch.labels, z_s))
        return total


def branch(f: Tensor, last: Tensor, outputs: int) -> nn.Sequential:
    """From a map to logits of class and angle, by way of a map of the last layer's size."""
    channels, wide = f.shape[1], last.shape[1]
    ratio = min(size / end for size, end in zip(f.shape[2:], last.shape[2:], strict=True))
    # rounded down: the mean over positions takes any size
    widths = [min(channels * 2**i, wide) for i in range(1, int(math.log2(max(ratio, 1))) + 1)]
    layers: list[nn.Module] = []
    for width, stride in [*((width, 2) for width in widths), (wide, 1)]:
        layers += [
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            kdkit.AnyBatchNorm(width),
            nn.ReLU(),
        ]
        channels = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs)
    )


def joint_labels(labels: Tensor, z: Tensor) -> Tensor:
    """Return the shares (4N, 4K) of class and angle together, from class indices (N,) or shares
    (N, K); all images at one angle, then at the next.
    """
    shares = (F.one_hot(labels, z.shape[1]) if labels.ndim == 1 else labels).to(z.dtype)
    angle = torch.eye(ANGLES, dtype=z.dtype, device=z.device)
    joint = angle[:, None, None, :] * shares[None, :, :, None]
    return joint.flatten(2).flatten(0, 1)


def divergence(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL of the softmax of logits (M, K), mean over the rows."""
    log_p, log_q = (F.log_softmax(z / temperature, 1) for z in (s, t))
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [HierarchicalBranches]
