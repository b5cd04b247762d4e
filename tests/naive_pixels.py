"""Pixels of maps and masks the slow way, one at a time, for losses of dense prediction."""

import torch
from naive_maps import resized
from torch import nn

import kdkit
from kdkit.testing import random_outputs

PAIR = [{"student": "a", "teacher": "b"}]
SAME, OTHER, SMALLER, LARGER = (
    ((3, 4, 6), (3, 4, 6)),
    ((3, 4, 6), (5, 4, 6)),
    ((3, 8, 6), (5, 4, 3)),
    ((3, 2, 3), (5, 5, 6)),
)
CLASSES = 4


def set_up(cls, shapes, size=2, **options):
    """A loss, set up, and what it compares: shapes are without the batch, masks 8 x 12."""
    loss = cls(cls.Options(**{"layers": PAIR, **options}))
    student, teacher = (
        random_outputs({name: shape}, size=size, seed=n, classes=CLASSES) for n, (name, shape) in enumerate(zip("ab", shapes, strict=True))
    )
    torch.manual_seed(0)
    loss.setup(student, teacher, kdkit.Context(nn.Identity(), nn.Identity(), CLASSES, 9, torch.zeros(9)))
    return loss, student, teacher, masks(size)


def masks(size, height=8, width=12, seed=0):
    """A batch of noise, with patches of classes and of pixels that do not count."""
    coarse = torch.randint(0, CLASSES + 1, (size, height // 2, width // 2), generator=torch.Generator().manual_seed(seed))
    labels = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)
    return kdkit.Batch(torch.zeros(size, 3, height, width), torch.where(labels == CLASSES, 255, labels), torch.arange(size))


def at_one_size(student, teacher):
    """The maps of a pair, the student's at the teacher's size."""
    f_t = teacher.features["b"]
    return resized(student.features["a"], f_t.shape[2:]), f_t


def unit(v):
    """Of norm 1, unless it is shorter than 1e-3."""
    return v / max(float(v.detach().norm()), 1e-3) if float(v.detach().norm()) < 1e-3 else v / (v**2).sum().sqrt()


def label_at(labels, row, column, size):
    """The label of the pixel that the middle of a map's pixel lies in."""
    (height, width), (rows, columns) = labels.shape, size
    return int(labels[int((row + 0.5) * height / rows), int((column + 0.5) * width / columns)])


def kl(z_t, z_s):
    """Of two rows of logits."""
    q, p = (z.double().exp() / z.double().exp().sum() for z in (z_t, z_s))
    return (q * (q.log() - p.log())).sum()
