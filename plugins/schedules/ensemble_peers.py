"""Collaborative learning (KDCL): students that are trained together learn from an ensemble of
their own answers.

Guo, Wang, Wu, Yu, Liang, Hu, Luo, "Online Knowledge Distillation via Collaborative Learning", CVPR
2020, doi:10.1109/CVPR42600.2020.01103, section 3. With the peers' logits z_1..z_K of a batch, all
of them learn from one target z:

    mean    z = 1/K sum_k z_k
    best    z = z_k of the peer whose cross-entropy on the batch's labels is the lowest (KDCL-Naive)
    lowest  z = sum_k w_k z_k, w the convex weights whose z has the lowest cross-entropy on the
    batch's labels (KDCL-Linear)

What they learn by is the recipe's losses (the paper: `cross_entropy` and `logit_kl`). In the paper
each peer sees an augmentation of its own, which `own_views: true` gives. KDCL-MinLogit and
KDCL-General are not offered. No code was released.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

import kdkit

ROUNDS = 20
NEWTON = (0.0, 0.5, 1.0, 2.0)  # strides tried in each round: in Newton steps along the line,
CHANGE = (0.02, 0.1, 0.5, 2.0, 8.0)  # and by how much they change the logarithms of weights
TINY = 1e-20


class EnsemblePeers(kdkit.Schedule):
    """One stage: each of K peers learns from an ensemble of all their logits, its own among
    them.

    Losses that read layers see those of the other peers, and their mean counts. A step costs K
    forwards and K backwards an image, one of each peer; memory K times a student's training.
    `lowest` adds a few passes over the logits.
    """

    name = "ensemble_peers"
    scheme = "online"
    # two of the targets are chosen by cross-entropy on labels
    tasks = frozenset({"classes of samples"})
    needs_teacher = False
    students_teach = True

    class Options(kdkit.PeerOptions):
        target: Literal["mean", "best", "lowest"] = Field(
            default="lowest",
            description=(
                "The ensemble: the mean of the logits, the best peer's, or the convex mixture of"
                " lowest loss."
            ),
        )
        own_views: bool = Field(
            default=False,
            description="Show each peer another augmentation of the images, as the paper does.",
        )

    options: Options

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        peers = self.options.students(models)

        def step(batch: kdkit.Batch) -> Sequence[kdkit.Lesson]:
            shown = (batch.inputs, *batch.views) if batch.views else (batch.inputs,) * len(peers)
            answers = [peer(images) for peer, images in zip(peers, shown, strict=True)]
            # in fp32, as losses see it too
            target = self.target(
                torch.stack([answer.logits.detach().float() for answer in answers]), batch.labels
            )
            taught = [kdkit.with_logits(answer.detach(), target) for answer in answers]
            return [
                kdkit.Lesson(own, taught[:k] + taught[k + 1 :]) for k, own in enumerate(answers)
            ]

        views = len(peers) if self.options.own_views else 1
        yield kdkit.Stage("ensemble_peers", peers, step, views=views, result=self.options.result)

    def target(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The ensemble's logits (B, C) from the peers' (K, B, C); what it chooses, it chooses by
        the whole batch of all processes.
        """
        if self.options.target == "mean":
            return logits.mean(0)
        # of all processes, so that all choose the same ensemble
        everyones = kdkit.gather(logits.transpose(0, 1).contiguous()).transpose(0, 1)
        everyones_labels = kdkit.gather(labels)
        if self.options.target == "best":
            best = loss_of(everyones, everyones_labels).argmin()
            # not `logits[best]`, for which the host would wait for the device
            return logits.index_select(0, best.reshape(1)).squeeze(0)
        return mixed(logits, lowest(everyones, everyones_labels))


def lowest(logits: Tensor, labels: Tensor) -> Tensor:
    """The convex weights (K,) of the logits (K, B, C) whose mixture has the lowest
    cross-entropy.

    The problem is convex. From equal weights, each round multiplies them by exp(- stride * slope)
    and keeps the best of a few strides.
    """
    # made once, on the device: numbers from the host would be copied in each round
    newton = kdkit.constants(NEWTON, like=logits)
    change = kdkit.constants(CHANGE, like=logits)
    log_weights = logits.new_zeros(len(logits)).log_softmax(0)
    for _ in range(ROUNDS):
        weights = log_weights.exp()
        p = mixed(logits, weights).softmax(1)
        slope = ((p - shares(logits, labels)) * logits).sum(2).mean(1)
        # what all weights have in common changes no convex weights
        slope = slope - (weights * slope).sum()
        # where the mixture goes for a small stride, up to sign
        way = mixed(logits, weights * slope)
        bend = ((p * way.square()).sum(1) - (p * way).sum(1).square()).mean()
        # peers that agree leave no curvature to divide by
        steps = newton * (weights * slope.square()).sum() / bend.clamp_min(TINY)
        strides = torch.cat([steps, change / slope.abs().amax().clamp_min(TINY)])
        tried = (log_weights - (strides[:, None] * slope).clamp(-50, 50)).log_softmax(1)
        losses = torch.stack([loss_of(mixed(logits, each), labels) for each in tried.exp()])
        log_weights = tried.index_select(0, losses.argmin().reshape(1)).squeeze(0)
    return log_weights.exp()


def mixed(logits: Tensor, weights: Tensor) -> Tensor:
    """(K, B, C) and (K,) to (B, C)."""
    return (weights[:, None, None] * logits).sum(0)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, mean over the batch, of logits (..., B, C)."""
    return -(shares(logits, labels) * logits.log_softmax(-1)).sum(-1).mean(-1)


def shares(logits: Tensor, labels: Tensor) -> Tensor:
    """Labels as shares of the classes (B, C)."""
    return (
        labels
        if labels.ndim == 2
        else torch.nn.functional.one_hot(labels, logits.shape[-1]).to(logits)
    )


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [EnsemblePeers]
