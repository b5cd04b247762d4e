"""Norm and direction (KD++): the student's embedding is to point to the mean of the teacher's
embeddings of its class, and to be as long as the teacher's.

Wang, Cheng, Yi, Li, Wang, Shi, "Improving Knowledge Distillation via Regularizing Feature Norm and
Direction", ECCV 2024, arXiv:2305.17007, section 3. With a weight of 0.5 to 4 beside cross-entropy
and `logit_kl` or `dkd`. The means are those of the training images in eval mode, which the released
code reads from a file; here one pass before the first step finds them. That code loops over the
images; where the widths differ it has batch normalisation, dropout and a linear layer on the
student's embedding, as here.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kdkit

SHORTEST = 1e-6  # length that an embedding counts as having at least


class NormDirection(kdkit.Loss):
    """How far the student's embedding is from the length of the teacher's, along the mean of its
    class.

    Formula: 1 - <r(f_s), m_y> / max(norm r(f_s), norm f_t), mean over the batch, then over the
    layer pairs; m_y = mean embedding of the teacher for class y over the training images,
    normalised

    An embedding that is longer than the teacher's is only turned; a shorter one is made longer too.
    r is the identity where the widths are equal, and otherwise batch normalisation, dropout and a
    linear layer. For mixed labels m_y is the mean of the classes' m by their shares. Vectors (B,
    D); maps are averaged over positions, sequences over tokens. `penultimate` is the usual layer.
    """

    name = "nd"
    knowledge = "feature"
    # the means are those of classes
    tasks = frozenset({"classes of samples"})

    class Options(kdkit.VectorOptions):
        dropout: float = Field(
            default=0.5,
            ge=0,
            lt=1,
            description="Share of the student's values that are dropped before the linear layer.",
        )

    options: Options
    parts: nn.ModuleList

    def setup(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs, context: kdkit.Context | None = None
    ) -> None:
        super().setup(student, teacher, context)
        if context is None:
            raise kdkit.ShapeError(
                "the directions are the teacher's class means; give setup a kdkit.Context with the"
                " teacher network and a `survey`"
            )
        layers = [pair.teacher for pair in self.options.layers]
        means = context.teacher_statistics(class_sums, layers, classes=context.outputs)
        self.parts = nn.ModuleList(
            Part(f_s, f_t, means[layer], self.options.dropout)
            for layer, (f_s, f_t) in zip(layers, self.options.pairs(student, teacher), strict=True)
        )

    def forward(self, student: kdkit.Outputs, teacher: kdkit.Outputs, batch: kdkit.Batch) -> Tensor:
        pairs = self.options.pairs(student, teacher)
        terms = [
            1 - part(f_s, f_t, batch.labels).mean()
            for part, (f_s, f_t) in zip(self.parts, pairs, strict=True)
        ]
        return torch.stack(terms).mean()


class Part(nn.Module):
    """What one layer pair needs: the direction of each class, (K, D), and the adapter r.

    Args:
        f_s, f_t: an example of each side's vectors.
        sums: of the teacher's embeddings by class, (K, D); a class without images has zeros.
        dropout: see the options.
    """

    directions: Tensor

    def __init__(self, f_s: Tensor, f_t: Tensor, sums: Tensor, dropout: float) -> None:
        super().__init__()
        # not persistent: they follow from the frozen teacher, and a later stage may have another
        self.register_buffer("directions", F.normalize(sums).to(f_s), persistent=False)
        width, wanted = f_s.shape[1], f_t.shape[1]
        self.adapter = (
            nn.Identity()
            if width == wanted
            else nn.Sequential(
                nn.Unflatten(1, (width, 1, 1)),
                kdkit.AnyBatchNorm(width),
                nn.Flatten(),
                nn.Dropout(dropout),
                nn.Linear(width, wanted),
            )
        )

    def forward(self, f_s: Tensor, f_t: Tensor, labels: Tensor) -> Tensor:
        """Return <r(f_s), m_y> / max(norm r(f_s), norm f_t), (B,)."""
        e = self.adapter(f_s)
        directions = self.directions.to(e)
        towards = directions[labels] if labels.ndim == 1 else labels.to(e) @ directions
        lengths = torch.maximum(e.norm(dim=1), f_t.norm(dim=1)).clamp_min(SHORTEST)
        shares: Tensor = (e * towards).sum(1) / lengths
        return shares


def class_sums(answers: kdkit.Answers, classes: int) -> dict[str, Tensor]:
    """Add up the teacher's embeddings by class, (K, D), for each layer."""
    sums = dict[str, Tensor]()
    for outputs, batch in answers:
        members = F.one_hot(batch.classes, classes).double()
        for layer, f in outputs.features.items():
            embedding = kdkit.as_vectors(f, outputs.mask).double()
            sums[layer] = sums.get(layer, 0) + members.T @ embedding
    return sums


@kdkit.hookimpl
def kdkit_losses() -> list[type[kdkit.Loss]]:
    return [NormDirection]
