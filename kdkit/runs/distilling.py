"""Distils the dataset of a recipe: a file of a few images, and a picture of them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from kdkit import files
from kdkit.contracts.data_distiller import DataDistiller, Material
from kdkit.contracts.records import Batch
from kdkit.contracts.task import serves
from kdkit.data import loaders
from kdkit.engine.accelerator import build_accelerator
from kdkit.errors import DataError
from kdkit.models.tapped import TappedModel
from kdkit.randomness import reseed
from kdkit.recipe import Recipe, distilled_data
from kdkit.runs import checks, training
from kdkit.runs.networks import ModelFactory
from kdkit.runs.progress import Reporter
from kdkit.runs.trained_teachers import TrainedTeacher

PICTURED = 10
"""Images of each class in the picture, at most."""
LEVELS = 255


@dataclass(frozen=True)
class Written:
    """What was written: the file, the picture, the number of images, and what was measured."""

    file: Path
    picture: Path
    images: int
    figures: Mapping[str, float]


def distill(recipe: Recipe, *, quiet: bool = False) -> Written:
    """Carry out `distill_data`. An interrupted run leaves no file, and starts over.

    Raises:
        RecipeError: the recipe has no such section, or it does not fit task or data.
    """
    spec, entry = recipe.spec, recipe.spec.distill_data
    if entry is None:
        raise recipe.error([], "has no `distill_data:` that says how")
    if spec.data.distilled is not None:
        raise recipe.error(["data", "distilled"], "is what this command makes; leave it out")
    method: DataDistiller = recipe.plugins.distillers[entry.use](entry)
    if not serves(method.tasks, recipe.task):
        says = f"is for one class of each image, and task '{recipe.task.name}' asks something else"
        raise recipe.error(["distill_data"], says)
    if method.needs_teacher and len(spec.all_teachers()) != 1:
        says = f"'{entry.use}' needs one `teacher:`, and a schedule that has one, such as `offline`"
        raise recipe.error(["distill_data", "use"], says)
    # a file that cannot be written must not be found out after hours
    path = entry.path(spec.run.folder, spec.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise recipe.error(["distill_data"], f"{path} is a folder, not a file")
    reporter = Reporter(quiet=quiet)
    checks.make(recipe, reporter.say)
    trained = training.trained_teachers(recipe, spec.run.folder / spec.name, quiet=quiet)
    try:
        material = _material(recipe, trained, reporter)
        reseed(spec.seed, "distill data", entry.use)
        found = method.distill(material)
        if not (found.images.isfinite().all() and found.labels.isfinite().all()):
            raise DataError("its images or labels are not finite: lower the learning rate")
    except DataError as error:
        raise recipe.error(["distill_data"], str(error)) from error
    images = _as_pixels(found.images).cpu()
    labels = found.labels.float() if found.labels.ndim == 2 else found.labels
    about = {
        "method": entry.use,
        "options": entry.model_dump(mode="json", exclude={"file"}),
        "seed": spec.seed,
        "recipe": recipe.fingerprint,
        "dataset": spec.data.dataset.use,
        "samples": len(material.labels),
        "outputs": material.classes,
        "figures": dict(found.figures),
    }
    distilled_data.write(path, images, labels, about)
    picture = path.with_suffix(".png")
    files.write_atomically(picture, _picture(images, found.labels, material.classes))
    reporter.say(f"{path}: {len(images):,} images by '{entry.use}'; {picture} shows them")
    for name, value in found.figures.items():
        reporter.say(f"  {name}: {value:.2f}")
    return Written(path, picture, len(images), found.figures)


def _material(
    recipe: Recipe, trained: Mapping[str, TrainedTeacher], reporter: Reporter
) -> Material:
    """Read the images as they are, without augmentation, and offer the networks."""
    spec = recipe.spec
    device = build_accelerator(spec.train).device
    plain = {"augment": None, "timm_augment": None, "joint_augment": None, "validation": None}
    once = {"repeats": 1, "sampling": "all", "drop_last": False, "unlabelled": None}
    prepared = loaders.prepare(
        spec.data.model_copy(update={**plain, **once}),
        recipe.dataset(),
        recipe.task,
        seed=spec.seed,
        device=device,
    )
    factory = ModelFactory(recipe, prepared.info, trained, device=device)
    images, labels = _held(prepared.train.epoch(0))
    test_images, test_labels = _held(prepared.test)

    def teacher() -> TappedModel:
        found = factory.teacher()
        found.needs_logits = True  # whatever the losses read
        return found

    return Material(
        images,
        labels,
        test_images,
        test_labels,
        recipe.task.row_width(prepared.info),
        lambda: factory.student(taps=["penultimate"]),
        teacher,
        reporter.distilling,
    )


def _held(batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Hold the images of all batches, in the order of the dataset, and their classes."""
    found = [(batch.index, _as_pixels(_images(batch)), batch.classes) for batch in batches]
    index, images, labels = (torch.cat(column) for column in zip(*found, strict=True))
    order = index.argsort()
    return images[order], labels[order]


def _images(batch: Batch) -> Tensor:
    if not isinstance(batch.inputs, Tensor):
        raise DataError("is for images, and the data are texts")
    return batch.inputs


def _as_pixels(images: Tensor) -> Tensor:
    """Round images in [0, 1] to uint8."""
    if images.dtype == torch.uint8:
        return images
    return (images.detach().clamp(0, 1) * LEVELS).round().to(torch.uint8)


def _picture(images: Tensor, labels: Tensor, classes: int) -> bytes:
    """Draw the images as PNG, a row for each class, in the order of the file."""
    classes_of = (
        labels.cpu() if labels.ndim == 1 else torch.arange(len(images)) * classes // len(images)
    )
    rows = [images[classes_of == number][:PICTURED] for number in range(classes)]
    columns = max(len(row) for row in rows)
    channels, height, width = images.shape[1:]
    sheet = torch.full(
        (channels, classes * (height + 1), columns * (width + 1)), LEVELS, dtype=torch.uint8
    )
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            y, x = i * (height + 1), j * (width + 1)
            sheet[:, y : y + height, x : x + width] = image
    pixels = sheet[:3] if channels >= 3 else sheet[:1].expand(3, -1, -1)
    written = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(written, "PNG")
    return written.getvalue()
