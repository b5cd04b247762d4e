"""Deep mutual learning (DML): students that are trained together teach each other.

Zhang, Xiang, Hospedales, Lu, "Deep Mutual Learning", CVPR 2018, arXiv:1706.00384, section 2.4. With
K peers, student k learns by

    L_k = cross_entropy(z_k, y) + 1 / (K - 1) sum over l != k of KL(softmax(z_l) || softmax(z_k))

which is the recipe `cross_entropy` and `logit_kl` with temperature 1. The paper and its code update
the peers one after another, each with the others' answers after their update; here all learn from
the answers before it, so that a batch takes one forward of each.
"""

from collections.abc import Iterator, Sequence

import kdkit


class Mutual(kdkit.Schedule):
    """One stage: each of K peers learns from all the others, by the mean of each loss over them.

    A step costs K forwards and K backwards an image, one of each peer; memory K times a student's
    training.
    """

    name = "mutual"
    scheme = "online"
    needs_teacher = False
    students_teach = True

    class Options(kdkit.PeerOptions):
        """Who the peers are."""

    options: Options

    def stages(self, models: kdkit.Models) -> Iterator[kdkit.Stage]:
        peers = self.options.students(models)

        def step(batch: kdkit.Batch) -> Sequence[kdkit.Lesson]:
            # all answer before anyone learns: one forward of each serves as answer and as lesson
            answers = [peer(batch.inputs) for peer in peers]
            taught = [answer.detach() for answer in answers]
            return [
                kdkit.Lesson(own, taught[:k] + taught[k + 1 :]) for k, own in enumerate(answers)
            ]

        yield kdkit.Stage("mutual", peers, step, result=self.options.result)


@kdkit.hookimpl
def kdkit_schedules() -> list[type[kdkit.Schedule]]:
    return [Mutual]
