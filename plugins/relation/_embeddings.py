"""Options of losses that relate the embeddings of a batch, with adapters on them."""

from collections.abc import Iterator

from pydantic import Field
from torch import Tensor

import kdkit


class VectorsOfPairs(kdkit.VectorOptions):
    """Options of a loss on one vector (N, D) per sample, which is the classifier's input unless
    layers are named.
    """

    layers: tuple[kdkit.LayerPair, ...] = Field(
        default=(kdkit.LayerPair(student="penultimate", teacher="penultimate"),),
        min_length=1,
        description="Student/teacher layer pairs to compare.",
    )


class EmbeddingOptions(VectorsOfPairs):
    """Options of a loss that relates these vectors, of all processes or of each."""

    gather: bool = Field(
        default=False,
        description="Relate the samples of all processes, not of each process alone.",
    )

    def pairs(
        self, student: kdkit.Outputs, teacher: kdkit.Outputs
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the vectors of each pair; maps and tokens are averaged.

        Raises:
            ShapeError: a layer gives no vectors.
        """
        for e_s, e_t in super().pairs(student, teacher):
            yield (kdkit.gather(e_s), kdkit.gather(e_t)) if self.gather else (e_s, e_t)
