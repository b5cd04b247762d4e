"""Online distillation with diverse peers (OKDDip): peers learn from mixtures that each weighs
for itself, and a leader from them all.

Chen, Mei, Wang, Feng, Chen, "Online Knowledge Distillation with Diverse Peers", AAAI 2020,
arXiv:1912.00350, section 3. Peers 1..M - 1 have embeddings h_a and logits z_a; student M is the
group's leader. For each image

    w_ab = softmax over b of (W_L h_a)^T (W_E h_b)       (b runs over all peers, a among them)
    t_a  = sum_b w_ab z_b                                  what peer a learns from
    t_M  = 1 / (M - 1) sum_b z_b                           what the leader learns from

Losses are the recipe's: `cross_entropy`, and `logit_kl` with a ramped weight, as in `branches`. As
in the released code, logits are mixed, not probabilities, and W_L, W_E learn from the peers'
distillation losses. There gradients also reach the other peers through t and h; here a target's
only ones are those of W_L and W_E. Peers whose networks differ have matrices of their own.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import kdkit


class DiversePeers(kdkit.Schedule):
    """One stage: peers learn from attention-weighted mixtures of their logits, and one leader
    from the mean of them.

    The leader is the recipe's `student`, and what is exported. Losses that read layers see those of
    the other peers (of the leader: all peers), and their mean counts. With M students, a step costs
    M forwards and M backwards an image; memory M times a student's training.
    """

    name = "okddip"
    scheme = "online"
    needs_teacher = False
    # peers are weighed for each sample, whose answer is one row
    tasks = frozenset(
        {"classes of samples", "labels of samples", "numbers of samples", "embeddings of samples"}
    )
    students_teach = True

    class Options(kdkit.PeerOptions):
        """Who the leader and the peers are, and how they attend to each other."""

        size: int = Field(
            default=4,
            ge=3,
            le=64,
            description="M: how many students train together, the leader included.",
        )
        peers: tuple[kdkit.ModelOptions, ...] = Field(
            default=(),
            description=(
                "Networks of the peers, two or more, in place of copies of the recipe's `student`,"
                " the leader."
            ),
        )
        width: int = Field(
            default=8,
            ge=1,
            description=(
                "Length of the projected embeddings (the paper: an eighth of the embedding's)."
            ),
        )
        layer: str = Field(
            default="penultimate", description="The embedding that attention compares."
        )
        result: Literal["first", "best"] = Field(
            default="first", description="Which student is exported: the leader, or the best one."
        )

    options: Options

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        layer = self.options.layer
        students = self.options.students(models, taps=(layer,))
        alike = not self.options.peers
        # peers of one network embed alike; others may have embeddings of another length
        attention = Attention(
            [kdkit.channels(peer, layer) for peer in students[1:]], self.options.width, shared=alike
        )

        def step(batch: kdkit.Batch) -> Sequence[kdkit.Lesson]:
            leader, *peers = (student(batch.inputs) for student in students)
            said = [peer.detach() for peer in peers]
            # detached before they are mixed: a target's gradient reaches W_L and W_E alone
            logits = torch.stack([peer.logits.float() for peer in said], 1)
            targets = attention(
                [kdkit.as_vectors(peer.features[layer], peer.mask) for peer in said], logits
            )
            lessons = [
                # one answer for each peer, with one mean of logits: losses that read layers see all
                # peers
                kdkit.Lesson(leader, [kdkit.with_logits(peer, logits.mean(1)) for peer in said])
            ]
            for a, own in enumerate(peers):
                lessons.append(
                    kdkit.Lesson(
                        own,
                        [
                            # the same target with each other peer's own layers, for losses that
                            # read layers
                            kdkit.with_logits(peer, targets[:, a])
                            for b, peer in enumerate(said)
                            if b != a
                        ],
                    )
                )
            return lessons

        yield kdkit.Stage("okddip", students, step, parts=attention, result=self.options.result)


class Attention(nn.Module):
    """Mixes the peers' logits for each of them, by how its projected embedding agrees with
    theirs.
    """

    def __init__(self, lengths: Sequence[int], width: int, *, shared: bool) -> None:
        super().__init__()
        kinds = lengths[:1] if shared else lengths
        self.asks = nn.ModuleList(nn.Linear(length, width, bias=False) for length in kinds)
        self.shows = nn.ModuleList(nn.Linear(length, width, bias=False) for length in kinds)

    def forward(self, embeddings: Sequence[Tensor], logits: Tensor) -> Tensor:
        """Targets (B, M - 1, C) from the peers' embeddings and logits (B, M - 1, C)."""
        # matrices are one for all peers, or one for each
        times = len(embeddings) // len(self.asks)
        asked = torch.stack(
            [ask(h) for ask, h in zip([*self.asks] * times, embeddings, strict=True)], 1
        )
        shown = torch.stack(
            [show(h) for show, h in zip([*self.shows] * times, embeddings, strict=True)], 1
        )
        weights = (asked.unsqueeze(2) * shown.unsqueeze(1)).sum(3).softmax(2)
        return (weights.unsqueeze(3) * logits.unsqueeze(1)).sum(2)


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [DiversePeers]
