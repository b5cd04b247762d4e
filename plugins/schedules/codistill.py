"""Codistillation: students learn from each other's weights of some steps ago.

Anil, Pereyra, Passos, Ormandi, Dahl, Hinton, "Large scale distributed neural network training
through online distillation", ICLR 2018, arXiv:1804.03235, algorithm 1. Each of K students learns
from the labels and from the mean over the others' predictions, made with weights that are exchanged
every n steps only, so that students on different machines need to talk seldom. The paper switches
distillation on after a burn-in; here a loss's weight does: `weight: {from: 0, to: 1, start: 2,
epochs: 1}`. It averages the others' predictions, here each loss is averaged over them. No code was
released.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from pydantic import Field

import kdkit


class Codistill(kdkit.Schedule):
    """One stage: each of K students learns from frozen copies of the others, renewed every n
    steps.

    In one process all are trained there: a step costs K forwards and K backwards an image, and K
    forwards of copies; memory K times a student's training and its weights once more. In K
    processes (`torchrun`, `accelerate launch`) each trains one of them, on its own share of every
    batch (so give `data.batch_size` K times what a student should see), and every n steps they
    exchange weights: one forward and backward and K - 1 forwards of copies a process. All are
    measured; the first process's student is exported. Until the first exchange the copies have the
    others' initial weights.
    """

    name = "codistill"
    scheme = "online"
    needs_teacher = False
    students_teach = True

    class Options(kdkit.PeerOptions):
        """Who the students are, and how often they see each other."""

        every: int = Field(
            default=50, ge=1, description="n: optimizer steps between two exchanges of weights."
        )

    options: Options

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        peers = self.options.students(models)
        copies = [copy.deepcopy(peer).freeze() for peer in peers]
        mine = range(len(peers))
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            if (world := dist.get_world_size()) != len(peers):
                raise kdkit.RunError(
                    f"codistill: {len(peers)} students cannot be trained by {world} processes, one"
                    " in each; set `size`"
                )
            mine = range(dist.get_rank(), dist.get_rank() + 1)

        def step(batch: kdkit.Batch) -> Sequence[kdkit.Lesson]:
            with torch.no_grad():
                # the copy of the only student of a process teaches nobody there
                wanted = [k for k in range(len(peers)) if [*mine] != [k]]
                taught = {k: copies[k](batch.inputs).detach() for k in wanted}
            return [
                kdkit.Lesson(
                    peers[k](batch.inputs), [answer for j, answer in taught.items() if j != k]
                )
                for k in mine
            ]

        def exchange(moment: kdkit.Moment) -> None:
            if moment.step % self.options.every == 0:
                for k in mine:
                    # into the tensors that are there: a recorded step goes on with them
                    copies[k].module.load_state_dict(peers[k].module.state_dict())
                # each process has only trained its own: that one goes to all the others
                if len(mine) < len(peers):
                    for k, other in enumerate(copies):
                        for value in other.module.state_dict().values():
                            dist.broadcast(value, src=k)

        # apart: each process trains students of its own, so no gradients are averaged
        yield kdkit.Stage(
            "codistill",
            [peers[k] for k in mine],
            step,
            after_step=exchange,
            buffers=copies,
            apart=True,
            result=self.options.result,
        )


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [Codistill]
