"""Measures of embeddings, apart from the task: torchmetrics takes long to import.

All keep the embeddings of a part, N images of D numbers in fp32, until they are computed. With
fewer than two images, or embeddings that are not finite, they are NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

TEMPERATURE = 0.07  # of a neighbour's vote, as in Wu et al., CVPR 2018, and DINO
CHUNK = 1024  # images whose cosines with all others are in memory at once


class Likeness(Metric):
    """How like a teacher's embeddings are: `cka` and `explained`."""

    students: list[Tensor]
    teachers: list[Tensor]

    def __init__(self, penalty: float) -> None:
        super().__init__()
        self.penalty = penalty
        self.add_state("students", default=[], dist_reduce_fx="cat")
        self.add_state("teachers", default=[], dist_reduce_fx="cat")

    def update(self, student: Tensor, teacher: Tensor) -> None:
        self.students.append(student)
        self.teachers.append(teacher)

    def compute(self) -> dict[str, Tensor]:
        x, y = dim_zero_cat(self.students), dim_zero_cat(self.teachers)
        if not measurable(x):
            return dict.fromkeys(("cka", "explained"), x.new_full((), torch.nan))
        return {"cka": linear_cka(x, y), "explained": explained(x, y, self.penalty)}


class Accuracies(Metric):
    """How well classes are told from embeddings: `knn` and `probe`, on labelled images."""

    embeddings: list[Tensor]
    labels: list[Tensor]

    def __init__(self, neighbours: int, penalty: float) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.penalty = penalty
        self.add_state("embeddings", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, embedding: Tensor, label: Tensor) -> None:
        self.embeddings.append(embedding)
        self.labels.append(label)

    def compute(self) -> dict[str, Tensor]:
        x, labels = dim_zero_cat(self.embeddings), dim_zero_cat(self.labels)
        known = labels >= 0
        x, labels = x[known], labels[known]
        if not measurable(x):
            return dict.fromkeys(("knn", "probe"), x.new_full((), torch.nan))
        scores = left_out(x, F.one_hot(labels), self.penalty)
        return {
            "knn": (voted(x, labels, self.neighbours) == labels).double().mean(),
            "probe": (scores.argmax(1) == labels).double().mean(),
        }


def measurable(x: Tensor) -> bool:
    """Whether there are two embeddings or more, all finite."""
    return len(x) > 1 and bool(x.isfinite().all())


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA of embeddings (N, D) and (N, E): |X'Y|^2 / (|X'X| |Y'Y|), columns centred; 0 if
    one of them is constant. Kornblith et al., ICML 2019, arXiv:1905.00414, eq. 4.
    """
    x, y = (values.double() - values.double().mean(0) for values in (x, y))
    shared = (x.T @ y).square().sum()
    value: Tensor = shared / ((x.T @ x).norm() * (y.T @ y).norm()).clamp_min(1e-30)
    return value


def explained(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """Share of the variance of y (N, E) that ridge regression on x (N, D) predicts for images that
    are left out: 1 - squared error / variance, 0 if y is constant.
    """
    y = y.double()
    total = (y - y.mean(0)).square().sum()
    errors = (y - left_out(x, y, penalty)).square().sum()
    return torch.where(total > 0, 1 - errors / total.clamp_min(1e-30), 0.0)


def left_out(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """Predictions (N, E) of y by ridge regression on standardised x (N, D), each from all rows but
    its own.

    With the hat matrix H of all rows, the error without row i is (y_i - H y_i) / (1 - H_ii). The
    intercept has no penalty. Standardisation, which reads no y, is that of all rows.
    """
    x, y = x.double(), y.double()
    x = x - x.mean(0)
    deviation = x.square().mean(0).sqrt()
    # what remains of equal numbers is rounding
    x = torch.where(deviation > 1e-12, x / deviation.clamp_min(1e-12), 0.0)
    mean = y.mean(0)
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    mapped = torch.linalg.solve(x.T @ x + penalty * eye, x.T).T  # row i is x_i (X'X + penalty)^-1
    leverage = (mapped * x).sum(1) + 1 / len(x)
    errors = y - mean - mapped @ (x.T @ (y - mean))
    predicted: Tensor = y - errors / (1 - leverage).clamp_min(1e-12)[:, None]
    return predicted


def voted(x: Tensor, labels: Tensor, neighbours: int) -> Tensor:
    """Classes (N,) that the nearest neighbours by cosine vote for, itself left out."""
    x = F.normalize(x, eps=1e-6)
    count, classes = min(neighbours, len(x) - 1), int(labels.max()) + 1
    found = []
    for rows in torch.split(torch.arange(len(x), device=x.device), CHUNK):
        cosines = x[rows] @ x.T
        cosines[torch.arange(len(rows), device=x.device), rows] = -torch.inf
        best, places = cosines.topk(count)
        votes = x.new_zeros(len(rows), classes)
        votes.scatter_add_(1, labels[places], (best / TEMPERATURE).exp())
        found.append(votes.argmax(1))
    return torch.cat(found)
