"""Accuracy on images that are attacked by projected gradient descent, as papers on robustness
report it: PGD-20 with epsilon 8/255.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018,
arXiv:1706.06083. The attack is that of the Adversarial Robustness Toolbox (`pip install
kdkit[robust]`), which keeps to the definition: signed steps on the cross-entropy, projected on the
box of epsilon around the image and on [0, 1], from a start that is uniform in the box.

Such a number is an upper bound: a stronger attack finds more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

import kdkit

LEVELS = 255.0
GOLDEN = (5**0.5 - 1) / 2


class RobustAccuracy(kdkit.MetricSource):
    """Share of images whose class is right although each pixel is changed against the network, by
    at most `epsilon`.

    A network is attacked by its own gradients, an ensemble by those of its one answer. Costs about
    `steps` forwards and backwards for each image: `fraction` takes a part, `train.evaluate_every`
    measures seldom.
    """

    name = "robust_accuracy"
    tasks = frozenset({"classes of samples"})

    class Options(kdkit.MetricOptions):
        steps: int = Field(default=20, ge=1, description="Number of steps of the attack.")
        epsilon: float = Field(
            default=8.0, gt=0, le=LEVELS, description="Largest change of a pixel, units of 1/255."
        )
        step: float = Field(
            default=2.0, gt=0, le=LEVELS, description="Change by a step, units of 1/255."
        )
        restarts: int = Field(
            default=1,
            ge=0,
            description="Starts drawn at random, of which the worst counts; 0: from the image.",
        )
        fraction: float = Field(
            default=1.0,
            gt=0,
            le=1,
            description="Share of the images that is attacked, the same for every network.",
        )
        seed: int = Field(default=0, ge=0, description="Seed of the starts.")

    options: Options

    def score(self, task: kdkit.Task, info: kdkit.DataInfo) -> kdkit.Score:
        if len(info.image_shape) != 3:
            raise kdkit.DataError(f"'{self.name}' changes pixels, and texts have none")
        try:
            import art  # noqa: F401
        except ImportError:
            raise kdkit.DataError(
                f"'{self.name}' needs the Adversarial Robustness Toolbox: `pip install"
                " kdkit[robust]`"
            ) from None
        options, classes = self.options, info.outputs
        changed = options.model_dump(exclude_defaults=True)

        def build() -> Any:
            from torchmetrics import MeanMetric

            return MeanMetric()  # NaN of no samples

        return kdkit.Score(
            name="_".join([self.name, *(f"{key}={value}" for key, value in changed.items())]),
            title=f"robust (PGD-{options.steps})",
            unit="%",
            scale=100.0,
            build=build,
            sees=right,
            shown=lambda ask, batch: attacked(options, ask, batch, classes),
            meaning=(
                "share of samples whose class is right when each pixel is changed against the"
                f" network by at most {options.epsilon:g}/255, in {options.steps} steps of"
                f" {options.step:g}/255"
                + (f"; of {options.fraction:.0%} of the samples" if options.fraction < 1 else "")
            ),
        )


def right(rows: kdkit.Rows) -> tuple[Tensor]:
    """Return for each row whether its class is right, as 0 or 1."""
    return ((rows.answer.argmax(1) == rows.target).float(),)


def attacked(
    options: RobustAccuracy.Options,
    ask: Callable[[Tensor], kdkit.Outputs],
    batch: kdkit.Batch,
    classes: int,
) -> kdkit.Batch:
    """Return those samples of a batch that count, their images attacked."""
    # by their numbers, evenly spread: the same ones in batches of any size
    chosen = (batch.index.double() * GOLDEN).frac() < options.fraction
    batch = batch.map(lambda x: x[chosen])
    images = batch.inputs
    assert isinstance(images, Tensor)
    if not len(batch.index):
        return batch
    pixels = images if images.is_floating_point() else images.float() / LEVELS
    with seeded(options.seed, int(batch.index[0])), torch.enable_grad():
        found = attack_of(options, ask, pixels, classes).generate(
            pixels.cpu().numpy(), batch.labels.cpu().numpy()
        )
    return replace(batch, inputs=torch.from_numpy(found).to(pixels))


def attack_of(
    options: RobustAccuracy.Options,
    ask: Callable[[Tensor], kdkit.Outputs],
    images: Tensor,
    classes: int,
) -> Any:
    """Return the library's attack against a network."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    network = PyTorchClassifier(
        Asked(ask),
        nn.CrossEntropyLoss(),
        tuple(images.shape[1:]),
        classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if images.device.type == "cuda" else "cpu",
    )
    return ProjectedGradientDescentPyTorch(
        network,
        eps=options.epsilon / LEVELS,
        eps_step=options.step / LEVELS,
        max_iter=options.steps,
        num_random_init=options.restarts,
        batch_size=len(images),
        verbose=False,
    )


class Asked(nn.Module):
    """A network as the library sees it: images (B, C, H, W) in [0, 1] to logits (B, K)."""

    def __init__(self, ask: Callable[[Tensor], kdkit.Outputs]) -> None:
        super().__init__()
        self._ask = ask

    def forward(self, images: Tensor) -> Any:
        return _Query.apply(images, self._ask)


class _Query(torch.autograd.Function):
    """The answer of a network, with a gradient for the images alone: the library's backward pass
    would otherwise add to the gradients of the network's parameters.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, ask: Callable[[Tensor], kdkit.Outputs]) -> Tensor:
        with torch.enable_grad():
            ctx.images = images.detach().requires_grad_()
            logits = ask(ctx.images).logits.float()
        ctx.logits = logits
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        found: Tensor = torch.autograd.grad(ctx.logits, ctx.images, grad)[0]
        return found, None


@contextlib.contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Seed NumPy's generator, which starts are drawn from; it and torch's, which the library's
    loader draws from, go on afterwards as if nothing had been drawn.
    """
    import numpy as np

    before = np.random.get_state()
    np.random.seed([*parts])
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        np.random.set_state(before)


@kdkit.hookimpl
def kdkit_metrics() -> list[type[kdkit.MetricSource]]:
    return [RobustAccuracy]
