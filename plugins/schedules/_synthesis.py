"""What the schedules share that make images from a frozen teacher: a generator, the losses of
synthesis, random views.

Images are in [0, 1], before any network's normalisation. All losses are minimised.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kdkit

SMALLEST = 1e-12
"""Below it, a probability counts as this when its logarithm is taken."""


class Generator(nn.Module):
    """Noise (B, `latent`) to images (B, C, H, W) in [0, 1].

    A linear layer to maps of a quarter of the height and width, then two doublings with 3x3
    convolutions, batch norm and leaky ReLU, as in DAFL and its successors; images of other sizes
    than multiples of 4 are cut out.

    Args:
        latent: length of the noise.
        width: channels of the last hidden layer; those before it have twice as many.
        shape: (C, H, W).
    """

    def __init__(self, latent: int, width: int, shape: Sequence[int]) -> None:
        super().__init__()
        channels, self.height, self.breadth = shape
        self.start = (2 * width, math.ceil(self.height / 4), math.ceil(self.breadth / 4))
        self.linear = nn.Linear(latent, math.prod(self.start))
        self.layers = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, noise: Tensor) -> Tensor:
        images: Tensor = self.layers(self.linear(noise).view(-1, *self.start))
        return images[:, :, : self.height, : self.breadth]


class Networks:
    """The student and the frozen teacher of a recipe, as a synthesis sees them.

    Args:
        models: of the recipe.
        taps: layers of the teacher that the synthesis reads.
        batch_norm: whether it reads the inputs of the teacher's batch norms.

    Attributes:
        student, teacher: as they train.
        answer: the teacher's answer to images, with gradients with respect to them.
        statistics: of the teacher's batch norms.
        shape: (C, H, W) of an image.
        classes: their number.
        device: of the networks.

    Raises:
        RunError: the teacher has no batch norm, and that is needed.
    """

    def __init__(
        self, models: kdkit.Models, taps: Sequence[str] = (), *, batch_norm: bool = False
    ) -> None:
        self.student, self.teacher = models.student(), models.teacher()
        self.statistics = BatchNorms(self.teacher.module)
        if batch_norm and not self.statistics.layers:
            raise kdkit.RunError(
                "the teacher has no batch norms whose statistics the images could have; set"
                " `batch_norm: 0` (a teacher with `fold_batchnorm: true` has none left)"
            )
        read = [*taps, *(self.statistics.layers if batch_norm else ())]
        self.answer = models.differentiable(self.teacher, read)
        self._student = models.differentiable(self.student)
        self.shape, self.classes = models.info.image_shape, models.info.outputs
        self.device = next(self.teacher.module.parameters()).device

    def student_logits(self, images: Tensor) -> Tensor:
        """Return the student's logits in eval mode, with gradients with respect to the images."""
        with kdkit.in_eval_mode(self.student.module):
            return self._student(images).logits

    def noise(self, *shape: int) -> Tensor:
        """Draw standard normal noise."""
        return torch.randn(shape, device=self.device)

    def labels(self, count: int) -> Tensor:
        """Draw classes (count,), in ascending order."""
        return torch.randint(self.classes, (count,), device=self.device).sort().values


class BatchNorms:
    """The statistics that the batch norms of a frozen network remember of its training images.

    Args:
        network: the network.
        keep: share of earlier batches in the statistics of a batch (0: none, each by itself).

    Attributes:
        layers: the batch norms by the names of their inputs.
    """

    def __init__(self, network: nn.Module, keep: float = 0.0) -> None:
        self.layers = {
            f"{name}@input": layer
            for name, layer in network.named_modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None
        }
        self.keep = keep
        self._earlier: dict[str, tuple[Tensor, Tensor]] = {}

    def distance(self, features: Mapping[str, Tensor]) -> Tensor:
        """Sum |mean - running mean| + |variance - running variance| over the layers (Euclidean
        norms, not squared; biased variances).

        Args:
            features: the inputs of the layers, by name.
        """
        terms = []
        for name, layer in self.layers.items():
            own = self._mixed(name, features[name])
            known = (layer.running_mean, layer.running_var)
            terms += [(a - b).norm() for a, b in zip(own, known, strict=True) if b is not None]
        return torch.stack(terms).sum()

    @torch.no_grad()
    def remember(self, features: Mapping[str, Tensor]) -> None:
        """Mix a batch's statistics into those of earlier batches."""
        self._earlier = {name: self._mixed(name, features[name]) for name in self.layers}

    def _mixed(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        axes = [i for i in range(x.ndim) if i != 1]
        mean, variance = x.mean(axes), x.var(axes, unbiased=False)
        if name not in self._earlier:
            return mean, variance
        before, share = self._earlier[name], 1 - self.keep
        return before[0].lerp(mean, share), before[1].lerp(variance, share)

    def state_dict(self) -> dict[str, Any]:
        return {name: list(pair) for name, pair in self._earlier.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._earlier = {}
        for name, pair in state.items():
            known = self.layers[name].running_mean
            assert known is not None
            self._earlier[name] = (pair[0].to(known.device), pair[1].to(known.device))


def balance(logits: Tensor) -> Tensor:
    """Sum p ln p over the classes, with p the mean of the predictions: smallest where all classes
    are predicted equally often, -ln K.
    """
    mean = logits.softmax(1).mean(0)
    return (mean * mean.clamp_min(SMALLEST).log()).sum()


def disagreement(teacher: Tensor, student: Tensor) -> Tensor:
    """Negative mean of KL(teacher || student), in nats, over the images; those on whose class they
    disagree count as 0, as they teach enough.
    """
    divergence = F.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    agree = teacher.argmax(1) == student.argmax(1)
    return -(divergence * agree).mean()


def competition(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """1 - JS(teacher, student) of predictions at a temperature, in nats, mean over the images."""
    p, q = (logits / temperature for logits in (teacher, student))
    p, q = p.log_softmax(1), q.log_softmax(1)
    middle = torch.logaddexp(p, q) - math.log(2)
    both = [F.kl_div(middle, x, reduction="batchmean", log_target=True) for x in (p, q)]
    return 1 - (both[0] + both[1]) / 2


def total_variation(images: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels, horizontally and vertically."""
    return images.diff(dim=2).square().mean() + images.diff(dim=3).square().mean()


def moved(images: Tensor, *, shift: int = 0, flip: float = 0.0, smallest: float = 1.0) -> Tensor:
    """Return a random view of each image, with gradients.

    Args:
        images: (B, C, H, W).
        shift: largest shift in pixels, horizontally and vertically; zeros come in.
        flip: probability of a horizontal flip.
        smallest: smallest share of the area that is cut out and enlarged; 1 keeps all.
    """
    if not shift and not flip and smallest == 1:
        return images
    count, _, height, width = images.shape
    device = images.device
    side = (smallest + (1 - smallest) * torch.rand(count, device=device)).sqrt()
    pixels = torch.randint(-shift, shift + 1, (2, count), device=device)
    # the grid spans [-1, 1]: a pixel is 2 / width, and a cut-out may lie anywhere inside
    room = (1 - side) * (2 * torch.rand(2, count, device=device) - 1)
    across, down = (room[i] + 2 * pixels[i] / size for i, size in enumerate((width, height)))
    mirrored = torch.where(torch.rand(count, device=device) < flip, -side, side)
    zero = torch.zeros_like(side)
    maps = torch.stack(
        [torch.stack([mirrored, zero, across], 1), torch.stack([zero, side, down], 1)], 1
    )
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


class Every:
    """Tells when a step is an n-th one, once, however many batches the step has (`accumulate`)."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._last = -1

    def __call__(self, step: int) -> bool:
        due = step % self.steps == 0 and step != self._last
        self._last = step
        return due


def finite(loss: Tensor) -> float:
    """Return a loss of synthesis as a number.

    Raises:
        RunError: it is NaN or infinite.
    """
    if not math.isfinite(value := loss.item()):
        raise kdkit.RunError(
            f"the loss of the images that are made is {value}; a smaller `lr` of the schedule may"
            " help"
        )
    return value


def descend(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    """Take a step on the loss; no other parameter gets a gradient."""
    for parameter, gradient in gradients(loss, *optimizers):
        parameter.grad = gradient
    for optimizer in optimizers:
        optimizer.step()


def gradients(loss: Tensor, *optimizers: torch.optim.Optimizer) -> Iterable[tuple[Tensor, Tensor]]:
    """Return the optimizers' parameters with the loss's gradients."""
    groups = itertools.chain(*(optimizer.param_groups for optimizer in optimizers))
    parameters = [parameter for group in groups for parameter in group["params"]]
    return zip(parameters, torch.autograd.grad(loss, parameters), strict=True)
