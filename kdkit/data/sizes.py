"""Sizes of batches and of the images in them, as a recipe asks for them."""

from __future__ import annotations

from dataclasses import replace

from kdkit.contracts.dataset_source import DataInfo
from kdkit.contracts.inputs import Shape, is_text
from kdkit.contracts.options import SIDE
from kdkit.contracts.task import Task
from kdkit.errors import DataError
from kdkit.recipe.data_section import DataSpec

LARGEST_IMAGE = 4 * SIDE**2
"""Maximum number of values in one image."""

FOR_IMAGES = ("image_size", "augment", "timm_augment", "joint_augment")


def measured_batch_size(spec: DataSpec, task: Task) -> int:
    """Return the number of samples in an evaluation batch of a process."""
    # an answer that is as large as an image takes much memory
    return min(spec.eval_batch_size, spec.batch_size) if task.moves else spec.eval_batch_size


def as_batched(spec: DataSpec, task: Task, info: DataInfo) -> DataInfo:
    """Return the properties of the data as batches have them.

    Raises:
        DataError: see `image_shape`; or the augmentation is not one for this task.
    """
    shape = image_shape(spec, info)
    for key in ("augment", "timm_augment"):
        if task.moves and getattr(spec, key) is not None:
            raise DataError(
                f"data.{key}: moves images, and would leave the targets of task '{task.name}'"
                " where they are; use `joint_augment`"
            )
    if spec.joint_augment is not None and not task.moves:
        raise DataError(
            f"data.joint_augment: the targets of task '{task.name}' do not move with images; use"
            " `augment` or `timm_augment`"
        )
    crop = spec.joint_augment.crop if spec.joint_augment else None
    if spec.synthetic_batches is not None:
        if is_text(shape):
            raise DataError("data.synthetic_batches: schedules make images, and no texts")
        info = replace(info, num_train=0, labelled=False)
    return replace(info, image_shape=shape, crop=None if crop == shape[1:] else crop)


def image_shape(spec: DataSpec, info: DataInfo) -> Shape:
    """Return the shape (C, H, W) of measured images; for texts, at most N tokens (N,).

    Raises:
        DataError: the dataset's images have many sizes and `data.image_size` is not set, or are too
            large; image options are set for texts.
    """
    if is_text(info.image_shape):
        if asked := [key for key in FOR_IMAGES if getattr(spec, key) is not None]:
            raise DataError(
                f"data.{asked[0]}: is for images, and dataset '{spec.dataset.use}' has texts"
            )
        return info.image_shape
    channels, height, width = info.image_shape
    if spec.size is not None:
        height, width = spec.size
    if not height or not width:
        raise DataError(
            f"data.image_size: dataset '{spec.dataset.use}' has images of many sizes, so it must"
            " be set"
        )
    if channels * height * width > LARGEST_IMAGE:
        raise DataError(
            f"images {(channels, height, width)} have more than {LARGEST_IMAGE:,} values"
        )
    return channels, height, width


def unshared(spec: DataSpec, world: int) -> tuple[str, str] | None:
    """Explain why processes cannot share a batch equally: the key below `data`, and the reason;
    None if they can.
    """
    if spec.synthetic_batches is not None and world > 1:
        return "synthetic_batches", f"one process makes the images, and these are {world}"
    equally = f"cannot be shared equally by {world} processes"
    if spec.batch_size % world:
        return "batch_size", f"{spec.batch_size} images {equally}"
    if spec.labelled_size % world:
        labelled = f"{spec.labelled_size} of {spec.batch_size} images have labels"
        return "unlabelled.share", f"{labelled}, which {equally}"
    return None
