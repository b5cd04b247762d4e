"""Batch knowledge ensembling (BAKE): an image's soft target is spread over the images of the
batch that look like it.

Ge, Choi, Zhang, Luo, Zhu, Zhao, Li, "Self-distillation with Batch Knowledge Ensembling Improves
ImageNet Classification", 2021, arXiv:2104.13298, section 3: A_ij is the softmax over j != i of the
cosines of embeddings, Q = softmax(z / T), and the targets are (1 - omega) (I - omega A)^-1 Q, the
limit of omega A Q + (1 - omega) Q. With `cross_entropy` and `logit_kl` at the same T = 4 the total
is the paper's. As in the released code, all processes' images make one batch. It counts the images
drawn for similarity on top of the batch size; here the batch size counts all of them.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kdkit


class BatchEnsemble(kdkit.Schedule):
    """The student's own answers, ensembled over similar images of the batch, teach it.

    Images of one class come in groups, so that some are similar. The targets are given as logits T
    log q, so that T must be the temperature of `logit_kl`; tapped layers are averaged with the same
    weights. Cost: one forward and one backward per image, as the student alone, and an inverse of
    (B, B). No model is kept beside the student.
    """

    name = "bake"
    scheme = "self"
    # similar images come by class
    tasks = frozenset({"classes of samples"})
    needs_teacher = False
    students_teach = True

    class Options(kdkit.ScheduleOptions):
        layer: str = Field(
            default="penultimate", description="Layer whose outputs say how similar images are."
        )
        omega: float = Field(
            default=0.5,
            ge=0,
            lt=1,
            description="Share of an image's target that comes from the other images.",
        )
        temperature: float = Field(
            default=4.0,
            gt=0,
            description="T at which answers are ensembled: the one of `logit_kl`.",
        )
        tau: float = Field(
            default=1.0,
            gt=0,
            description="Divides the cosines: a small one looks at the most similar images only.",
        )
        similar: int = Field(
            default=1,
            ge=0,
            description="Images of its class that come together with each image; 0: chance alone.",
        )

    options: Options

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        student = models.student(taps=[self.options.layer])

        def step(batch: kdkit.Batch) -> Sequence[kdkit.Lesson]:
            answer = student(batch.inputs).pooled()
            return [kdkit.Lesson(answer, [self._ensembled(answer.detach())])]

        arrange = kdkit.by_class(self.options.similar + 1) if self.options.similar else None
        # the student teaches: losses that look into the teacher's network see its own
        yield kdkit.Stage("ensembling", [student], step, arrange=arrange, teachers=[student])

    @torch.no_grad()
    def _ensembled(self, answer: kdkit.Outputs) -> kdkit.Outputs:
        t, device = self.options.temperature, answer.logits.device.type
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

        def change(x: Tensor) -> Tensor:
            everyone = kdkit.gather(_exact(x))
            if x is not answer.logits:
                return (shares @ everyone.flatten(1)).view_as(x)
            mean = shares @ F.softmax(everyone / t, dim=1)
            # a share may round to 0, whose logarithm no loss could take
            return t * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()

        # without autocast, which would take products to half precision; the meta device has none
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):
            shares = self._shares(
                kdkit.gather(kdkit.as_vectors(_exact(answer.features[self.options.layer])))
            )
            # the others' targets are for their own processes
            shares = shares.narrow(0, rank * len(answer.logits), len(answer.logits))
            return answer.map(change)

    def _shares(self, f: Tensor) -> Tensor:
        """How much of each image's target each image gives, (N, N); rows sum to 1."""
        one = torch.eye(len(f), dtype=f.dtype, device=f.device)
        # a softmax over no other image would be NaN
        if len(f) == 1:
            return one
        f = F.normalize(f, dim=1)
        affinity = F.softmax(
            (f @ f.T / self.options.tau).masked_fill(one.bool(), -torch.inf), dim=1
        )
        # `inv` would make the host wait to look whether the matrix is singular, which it is not
        inverse, _ = torch.linalg.inv_ex(one - self.options.omega * affinity)
        shares: Tensor = (1 - self.options.omega) * inverse
        return shares


def _exact(x: Tensor) -> Tensor:
    # `inv` knows no half precision
    return x if x.dtype == torch.float64 else x.float()


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [BatchEnsemble]
