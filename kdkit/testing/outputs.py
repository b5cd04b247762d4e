"""Random answers of networks, and changes of them: those that must, or must not, affect a loss, and
edge cases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kdkit.contracts.features import is_padded
from kdkit.contracts.records import Batch, Outputs
from kdkit.contracts.task import RowMeaning
from kdkit.testing.forms import CLASSES, IMAGE, Shape


def random_outputs(
    features: Mapping[str, Shape] | None = None,
    *,
    size: int = 6,
    classes: int = CLASSES,
    seed: int = 0,
    views: Mapping[str, int] | None = None,
) -> Outputs:
    """Draw normally distributed logits (size, classes) and features (size, *shape); a layer called
    `logits` is the logits.

    `views` gives the number of copies of each sample in each view.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, classes, generator=generator)
    drawn = {
        name: torch.randn(size, *shape, generator=generator)
        for name, shape in (features or {}).items()
    }
    answers_to_views = {
        # The seeds of the two sides are neighbours: views are drawn far from both.
        name: random_outputs(features, size=n * size, classes=classes, seed=seed + 100 * n)
        for name, n in (views or {}).items()
    }
    if "logits" in drawn:
        drawn["logits"] = logits
    return Outputs(logits, drawn, answers_to_views)


def random_batch(
    size: int = 6, classes: int = CLASSES, seed: int = 0, rows: RowMeaning = "classes"
) -> Batch:
    """Draw noise images. Labels are every class in turn; for rows of labels or numbers, drawn
    (size, classes).
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(size, *IMAGE, generator=generator)
    labels = torch.arange(size) % classes
    if rows != "classes":
        drawn = torch.randn(size, classes, generator=generator)
        labels = (drawn > 0).float() if rows == "labels" else drawn
    return Batch(inputs, labels, torch.arange(size))


def tensors_by_name(outputs: Outputs) -> dict[str, Tensor]:
    """List the tensors of an answer: the logits, the features by layer, those of views with the
    view's name before.
    """
    views = {
        f"{view} {name}": x
        for view, answer in outputs.views.items()
        for name, x in tensors_by_name(answer).items()
    }
    return {"logits": outputs.logits, **outputs.features, **views}


def of_texts(outputs: Outputs, tokens: int) -> Outputs:
    """Turn it into an answer to texts of unequal lengths: the first is full, the others end with
    padding.
    """
    places = torch.arange(len(outputs.logits))[:, None]
    return outputs.masked(torch.arange(tokens) < tokens - places % tokens)


def with_other_padding(outputs: Outputs) -> Outputs:
    """Replace the numbers at padding positions."""
    mask = outputs.mask
    assert mask is not None
    # the seed depends on the answer, so that student and teacher get different noise
    noise = torch.Generator().manual_seed(round(1000 * float(outputs.logits.detach().sum())))
    return outputs.map(
        lambda x: (
            torch.where(mask[:, :, None], x, 7 * torch.randn(x.shape, generator=noise))
            if is_padded(x, mask)
            else x
        )
    )


def with_noise(outputs: Outputs, name: str) -> Outputs:
    """Change the numbers of one layer (or the logits), in all views."""

    def other(x: Tensor) -> Tensor:
        return x + torch.randn(x.shape, generator=torch.Generator().manual_seed(9))

    views = {view: with_noise(answer, name) for view, answer in outputs.views.items()}
    logits = other(outputs.logits) if name == "logits" else outputs.logits
    features = {layer: other(x) if layer == name else x for layer, x in outputs.features.items()}
    return Outputs(logits, features, views)


def with_impossible(outputs: Outputs) -> Outputs:
    """Add the same number of classes again, the new ones of probability 0."""
    return replace(
        # Not -inf: a probability of 0 times a logarithm of -inf is NaN.
        outputs,
        logits=torch.cat([outputs.logits, torch.full_like(outputs.logits, -1e4)], 1),
        views={name: with_impossible(view) for name, view in outputs.views.items()},
    )


def impossible_labels(labels: Tensor, rows: RowMeaning) -> Tensor:
    """Extend targets (R, K) to those of `with_impossible`: none of the new labels holds, and new
    numbers are predicted without an error.
    """
    return torch.cat([labels, torch.full_like(labels, 0.0 if rows == "labels" else -1e4)], 1)


def twice_as_high(outputs: Outputs) -> Outputs:
    """Make each map twice as high: it contains everything twice, one above the other."""
    return replace(
        outputs, features={name: torch.cat([x, x], 2) for name, x in outputs.features.items()}
    )


Change = Callable[[Tensor], Tensor]
LARGEST = "numbers up to 6e4"  # inputs for which a large gradient is legitimate


def as_it_is(x: Tensor) -> Tensor:
    return x


def equal_rows(x: Tensor) -> Tensor:
    return x[:1].expand_as(x).clone()


def huge_logits(x: Tensor) -> Tensor:
    # The softmax of such logits underflows to exactly 0, and its logarithm is infinite.
    return 1e4 * x.sign() if x.ndim == 2 else x


def certain(x: Tensor) -> Tensor:
    # exp(-100) is a subnormal number in fp32: not 0 yet, but its reciprocal overflows.
    return 100.0 * (x == x.amax(1, keepdim=True)) if x.ndim == 2 else x


def constant(x: Tensor) -> Tensor:
    return torch.ones_like(x) if x.ndim > 2 else x


def tiny(x: Tensor) -> Tensor:
    return 1e-6 * torch.ones_like(x) if x.ndim > 2 else x


def smallest(x: Tensor) -> Tensor:
    # The squares of such numbers vanish beside an epsilon of 1e-12 under a root.
    return 1e-8 * x


def largest(x: Tensor) -> Tensor:
    return 6e4 * x.clamp(-1, 1)  # the range of fp16


# The change of the student's tensors, and of the teacher's.
DEGENERATE: Mapping[str, tuple[Change, Change]] = {
    "equal rows": (equal_rows, as_it_is),
    "equal rows of the teacher": (as_it_is, equal_rows),
    "two equal rows": (lambda x: torch.cat([x[:1], x[:1], x[2:]]), as_it_is),
    "two rows equal but for rounding": (
        # Two steps of fp32 apart: their distance is nothing but rounding.
        lambda x: torch.cat([x[:1], x[:1] * (1 + 2e-7), x[2:]]),
        as_it_is,
    ),
    "a row of zeros": (lambda x: torch.cat([0 * x[:1], x[1:]]), as_it_is),
    "a row of zeros of the teacher": (as_it_is, lambda x: torch.cat([0 * x[:1], x[1:]])),
    "zeros": (torch.zeros_like, as_it_is),
    "zeros of the teacher": (as_it_is, torch.zeros_like),
    "zeros on both sides": (torch.zeros_like, torch.zeros_like),
    "a dead channel": (
        lambda x: torch.cat([0 * x[:, :1], x[:, 1:]], 1),
        lambda x: torch.cat([0 * x[:, :1], x[:, 1:]], 1),
    ),
    "constant maps": (constant, as_it_is),
    "constant maps on both sides": (constant, constant),
    "constant maps of 1e-6": (tiny, as_it_is),
    "numbers of 1e-8": (smallest, as_it_is),
    "numbers of 1e-8 of the teacher": (as_it_is, smallest),
    LARGEST: (largest, as_it_is),
    f"{LARGEST} on both sides, opposed": (largest, lambda x: -largest(x)),
    "logits of 1e4": (huge_logits, as_it_is),
    "logits of 1e4 of the teacher": (as_it_is, huge_logits),
    "a teacher that is certain": (as_it_is, certain),
    "logits of 1e4 on both sides, opposed": (huge_logits, lambda x: -huge_logits(x)),
}
