"""Contrastive model inversion (CMI): images that the teacher tells from all that were made before.

Fang, Song, Wang, Shen, Wang, Song, "Contrastive Model Inversion for Data-Free Knowledge
Distillation", IJCAI 2021, arXiv:2105.08584, section 3. In each round a new generator G and its
noise z are learnt for classes y: on a shifted and flipped view of the images,

    a H(t, y) + b (distance of batch norms' statistics) - c mean [t, s agree] KL(t || s)
    + d (contrast)

The contrast is the cross-entropy of telling which global view belongs to a local one (a cut-out),
by the cosines of h(f) / T: f is the teacher's embedding, h a small network that is learnt along,
and the others are this round's images and features of earlier ones. The round's best batch goes
into the bank. As in the release, the global side gets no gradient, and the mean over this round's
images is added to that over the earlier ones; its f are the channel means of all batch norms.
"""

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

import kdkit

from ._image_bank import BankOptions, BankSchedule, Ring
from ._synthesis import Generator, Networks, descend, disagreement, finite, moved

EMBEDDING = "penultimate"


class Cmi(BankSchedule):
    """One stage without training images: the student learns from a bank of generated images that
    differ from each other in the frozen teacher's eyes.

    A round costs a forward and backward of a generator and of the teacher (two views), and of the
    student, for each iteration.
    """

    name = "cmi"
    taps = (EMBEDDING,)

    class Options(BankOptions):
        """How a round of images is made."""

        latent: int = Field(
            default=256, ge=1, le=65_536, description="Length of the generator's noise."
        )
        width: int = Field(
            default=64, ge=1, le=4096, description="Channels of the generator's last hidden layer."
        )
        iterations: int = Field(default=200, ge=1, description="Adam steps of a round.")
        lr: float = Field(
            default=1e-3, gt=0, description="Learning rate of generator, noise and projection."
        )
        disagreement: float = Field(
            default=0.5,
            ge=0,
            description="Weight of KL(teacher || student), which grows, after the warm-up rounds.",
        )
        contrast: float = Field(default=0.8, ge=0, description="Weight of the contrast.")
        temperature: float = Field(default=0.2, gt=0, description="T of the contrast.")
        projection: int = Field(
            default=128, ge=1, le=65_536, description="Width of what is contrasted."
        )
        negatives: int = Field(
            default=4096, ge=0, description="Earlier images that a contrast is to, at most."
        )
        memory: int = Field(
            default=40_960, ge=1, description="Earlier images whose embeddings are remembered."
        )
        smallest: float = Field(
            default=0.25, gt=0, le=1, description="Smallest share of the area in a local view."
        )

    options: Options

    def synthesis(self, networks: Networks) -> "Contrasting":
        """Generate images that differ."""
        return Contrasting(networks, self.options)


class Contrasting:
    """Makes rounds of images, and remembers the embeddings of their local and global views."""

    def __init__(self, networks: Networks, options: Cmi.Options) -> None:
        self.networks, self.options = networks, options
        width, o = embedding_width(networks), options
        self.project = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, o.projection)
        ).to(networks.device)
        self.optimizer = torch.optim.Adam(self.project.parameters(), lr=o.lr)
        self.memory = Ring(o.memory, networks.device)
        self.keeps: dict[str, kdkit.Stateful] = {
            "projection": self.project,
            "optimizer": self.optimizer,
            "memory": self.memory,
        }

    def __call__(self, *, competing: bool) -> Tensor:
        o, networks = self.options, self.networks
        labels = networks.labels(o.round_size)
        noise = networks.noise(o.round_size, o.latent).requires_grad_(True)
        generator = Generator(o.latent, o.width, networks.shape).to(networks.device)
        learnt = torch.optim.Adam([*generator.parameters(), noise], lr=o.lr, betas=(0.5, 0.999))
        lowest, best = float("inf"), (noise, noise)
        for _ in range(o.iterations):
            images = generator(noise)
            loss, embeddings = self.loss(images, labels, competing=competing)
            if (value := finite(loss)) < lowest:
                lowest, best = value, (images.detach(), embeddings.detach())
            descend(loss, learnt, *([self.optimizer] if o.contrast else []))
        self.memory.add(best[1])
        return best[0]

    def loss(self, images: Tensor, labels: Tensor, *, competing: bool) -> tuple[Tensor, Tensor]:
        """Value random views of the images; also return the embeddings (B, 2, D) of the local and
        global ones.
        """
        o, networks = self.options, self.networks
        whole = moved(images, shift=o.shift, flip=o.flip)
        answer = networks.answer(whole)
        total = o.one_hot * F.cross_entropy(answer.logits, labels)
        if o.batch_norm:
            total = total + o.batch_norm * networks.statistics.distance(answer.features)
        if o.disagreement and competing:
            student = networks.student_logits(whole)
            total = total + o.disagreement * disagreement(answer.logits, student)
        cut = networks.answer(moved(images, flip=o.flip, smallest=o.smallest))
        pair = torch.stack([cut.features[EMBEDDING], answer.features[EMBEDDING]], 1)
        if o.contrast:
            known = (
                self.memory.draw(min(o.negatives, self.memory.count)) if self.memory.count else None
            )
            both = pair if known is None else torch.cat([pair, known])
            local, wide = F.normalize(self.project(both), dim=2).unbind(1)
            total = total + o.contrast * contrast(local, wide, len(images), o.temperature)
        return total, pair


def contrast(local: Tensor, wide: Tensor, own: int, temperature: float) -> Tensor:
    """Cross-entropy of telling which of the global views belongs to each local one: the mean over
    the first `own` images, and that over the others.

    Args:
        local: unit vectors (N, D) of the local views.
        wide: those of the global views.
        own: images of this round.
        temperature: T of the cosines.
    """
    similar = local @ wide.detach().T / temperature
    each = F.cross_entropy(similar, torch.arange(len(local), device=local.device), reduction="none")
    return each[:own].mean() + (each[own:].mean() if len(each) > own else 0.0)


def embedding_width(networks: Networks) -> int:
    """Return the width of the teacher's embedding."""
    with torch.no_grad():
        image = torch.zeros((1, *networks.shape), device=networks.device)
        return networks.answer(image).features[EMBEDDING].shape[1]


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [Cmi]
