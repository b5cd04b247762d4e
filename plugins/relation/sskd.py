"""Self-supervision as a lesson: which turned image belongs to which plain one, as the teacher
sees it, mistakes included.

Xu, Liu, Li and Loy, "Knowledge Distillation Meets Self-Supervision", ECCV 2020, arXiv:2006.07114,
section 3: the self-supervised part and the one on transformed images, with the weights,
temperatures, shares and heads of the released code. The other two parts of the paper's objective
are the losses `cross_entropy` (weight 0.1) and `logit_kl` (0.9). As in that code, the teacher's
head learns without a temperature. There, of equally wrong answers any are kept; here, the more
certain ones.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit


class SelfSupervision(kdkit.Loss):
    """Divergence of the two models' similarities between turned and plain images, and of their
    logits for turned images.

    Formula: w_A T_A^2 KL(softmax(A_t / T_A) || softmax(A_s / T_A)) + w_z T_z^2 KL(softmax(z_t /
    T_z) || softmax(z_s / T_z)), each a mean over the turned images kept, in nats, the first over
    the layer pairs too; while the teacher's head learns, also its own task: cross-entropy of
    softmax(A_t) to the image that a turned one was made of, mean over all turned images

    A (3N, N) are cosines of turned against plain images, between projections by a head (two linear
    layers with a ReLU) of embeddings, (N, D), larger features flattened to that. z (3N, K) are
    logits of turned images. Kept are all turned images that the teacher gets right (A: the largest
    cosine; z: the largest logit) and a share of the others, those first for which the truth ranks
    highest. w, T and the shares are options. The teacher's similarities are constants in the first
    part, which is 0 for a batch of one.

    It needs to be shown turned images: `schedule: {use: staged, turned: true}`. The paper trains
    the teacher's head first: a stage with `train: [sskd.teacher_head]` does that, only the task has
    a gradient there. In later stages, with `train: [student, sskd.student_head]`, that head rests
    and the value is the paper's. Without stages all learn at once.
    """

    name = "sskd"
    knowledge = "relation"
    tasks = frozenset({"classes of samples"})
    # of turned images, for the second part
    needs_teacher_logits = True
    needs_views = {"turned": 3}
    exceptions = {
        "check_teaches_every_part": (
            "of turned images that the teacher gets wrong, only a share is kept"
        ),
    }

    class Options(kdkit.RelationOptions):
        similarity_weight: kdkit.Rampable = Field(
            default=10.0, ge=0, description="w_A: weight of the part on similarities."
        )
        similarity_temperature: kdkit.Rampable = Field(
            default=0.5, gt=0, description="T_A: softens the similarities."
        )
        similarity_share: float = Field(
            default=0.75,
            ge=0,
            le=1,
            description=(
                "How many are kept of the turned images that the teacher takes for another image."
            ),
        )
        logit_weight: kdkit.Rampable = Field(
            default=2.7, ge=0, description="w_z: weight of the part on logits; 0 leaves it out."
        )
        logit_temperature: kdkit.Rampable = Field(
            default=4.0, gt=0, description="T_z: softens the logits."
        )
        logit_share: float = Field(
            default=1.0,
            ge=0,
            le=1,
            description="How many are kept of the turned images whose class the teacher misses.",
        )

    options: Options
    teacher_head: nn.ModuleList
    student_head: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        for outputs in (student, teacher):
            if "turned" not in outputs.views:
                raise kdkit.ShapeError(
                    "sskd compares turned images with plain ones; let both models see them:"
                    " `schedule: {use: staged, turned: true}`"
                )
        z_s, z_t = student.views["turned"].logits, teacher.views["turned"].logits
        if self.options.logit_weight != 0 and z_s.shape != z_t.shape:
            says = (
                f"student logits {tuple(z_s.shape)} and teacher logits {tuple(z_t.shape)} of turned"
                " images must be over the same classes"
            )
            raise kdkit.ShapeError(f"{says}; train both on one class set, or set `logit_weight: 0`")
        pairs = list(self.options.pairs(student, teacher))
        self.teacher_head = nn.ModuleList(head(e_t.shape[1]) for _, e_t in pairs)
        self.student_head = nn.ModuleList(head(e_s.shape[1]) for e_s, _ in pairs)

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        options = self.options
        seen_s = student.views["turned"]
        seen_t = teacher.views["turned"]
        plain, turned = options.pairs(student, teacher), options.pairs(seen_s, seen_t)
        values = []
        for head_s, head_t, (e_s, e_t), (r_s, r_t) in zip(
            self.student_head, self.teacher_head, plain, turned, strict=True
        ):
            a_s, a_t = cosines(head_s(r_s), head_s(e_s)), cosines(head_t(r_t), head_t(e_t))
            # each process gives its own, thrice
            image = torch.arange(len(e_s), device=e_s.device).view(-1, 1, len(batch.labels))
            image = image.expand(-1, len(r_s) // len(e_s), -1).flatten()
            value = divergence(
                a_s, a_t.detach(), image, options.similarity_share, options.similarity_temperature
            )
            values.append(options.similarity_weight * value)
            # only where the head learns: in later stages the value is the paper's
            if any(weight.requires_grad for weight in head_t.parameters()):
                values[-1] = values[-1] + F.cross_entropy(a_t, image)
        total = torch.stack(values).mean()
        if options.logit_weight == 0:
            return total
        answers = (
            seen_s.logits,
            seen_t.logits,
            # turned images come a whole batch at a time, one angle after the other
            batch.classes.repeat(len(seen_s.logits) // len(batch.labels)),
        )
        z_s, z_t, classes = (kdkit.gather(x) if options.gather else x for x in answers)
        return total + options.logit_weight * divergence(
            z_s, z_t, classes, options.logit_share, options.logit_temperature
        )


def head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """Cosines of the rows of (M, D) and (N, D), (M, N)."""
    # 1e-4 bounds the gradient of a projection near 0, where torch's own 1e-12 does not
    return F.normalize(one, eps=1e-4) @ F.normalize(other, eps=1e-4).T


def divergence(s: Tensor, t: Tensor, truth: Tensor, share: float, temperature: float) -> Tensor:
    """T^2 KL of the rows' softmax (M, N), mean over the rows whose `truth` (M,) t gives the
    largest value, and a share of the others.
    """
    log_p, log_q = (F.log_softmax(x / temperature, 1) for x in (s, t))
    true = t.gather(1, truth[:, None])
    rank = (t > true).sum(1)
    # stable sorts: equal answers are kept in the order of the images, on every device
    order = log_q.gather(1, truth[:, None])[:, 0].argsort(descending=True, stable=True)
    order = order[rank[order].argsort(stable=True)]  # by rank, then by certainty
    wrong = (rank > 0).sum()
    # counts stay tensors, so that the host need not wait for the device
    kept = len(t) - wrong + (share * wrong).floor()
    rows = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)[order]
    return (
        temperature**2
        * (rows * (torch.arange(len(t), device=t.device) < kept)).sum()
        / kept.clamp_min(1)
    )


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [SelfSupervision]
