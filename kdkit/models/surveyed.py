"""Shows images to a frozen teacher, for a survey of its answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from kdkit.contracts.inputs import first_tensor
from kdkit.contracts.known_answers import AnswersAlone
from kdkit.contracts.layers import resolve
from kdkit.contracts.records import Batch, Outputs
from kdkit.contracts.survey import Survey
from kdkit.errors import TapError
from kdkit.models.freezing import in_eval_mode
from kdkit.models.tapped import TappedModel
from kdkit.randomness import seeded


def surveyed(survey: Survey, teacher: TappedModel, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Return what a survey finds in the teacher's answers to these batches.

    The teacher answers as it is measured: in eval mode, without autocast but for its own
    `precision`, and sees the same part of an image each time.

    Raises:
        TapError: it has no such layer, or no network.
        PluginError: the survey's function gives no tensors.
    """
    # a stand-in's answers to these are random
    if isinstance(teacher.module, AnswersAlone):
        raise TapError(
            f"{survey.name} shows {teacher.role} all training images before the first step, and"
            " answers alone have no network"
        )
    # a twin is neither compiled nor answers from a cache, and has no taps of other losses
    asked = teacher.twin()
    try:
        asked.layers = {
            name: teacher.layers.get(name) or resolve(name, teacher.module)
            for name in survey.layers
        }
    except TapError as error:
        raise TapError(f"{teacher.role}: {error}") from None
    # what is drawn afterwards must not depend on whether a survey was made or read
    with in_eval_mode(teacher.module), torch.no_grad(), seeded("survey"):
        return survey.of(_answers(asked, batches))


def _answers(asked: TappedModel, batches: Iterable[Batch]) -> Iterator[tuple[Outputs, Batch]]:
    for batch in batches:
        answer = asked(batch.inputs)
        device = first_tensor(batch.inputs).device.type
        # MPS has no double precision, in which sums are computed
        if device == "mps":
            answer, batch = answer.map(Tensor.cpu), batch.map(Tensor.cpu)
        yield (answer.map(_random_numbers) if device == "meta" else answer), batch


def _random_numbers(shapes_only: Tensor) -> Tensor:
    """Draw numbers in the place of those that a network on the meta device does not compute."""
    return torch.randn(shapes_only.shape, generator=torch.Generator().manual_seed(0))
