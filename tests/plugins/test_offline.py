import torch

from kdkit import registry
from kdkit.testing import random_batch, random_outputs

Offline = registry.load().schedules["offline"]


class Pair:
    """A student and a teacher that say which of them answered, and whether a graph was being recorded."""

    def __init__(self):
        self.recorded = {}

    def answers(self, who, seed):
        def answer(inputs):
            self.recorded[who] = torch.is_grad_enabled()
            return random_outputs({"a": (3,)}, size=len(inputs), seed=seed).map(lambda x: x.requires_grad_())

        return answer

    def student(self):
        return self.answers("student", 0)

    def teacher(self):
        return self.answers("teacher", 1)


def test_one_stage_with_one_teacher():
    (stage,) = Offline(Offline.Options()).stages(Pair())
    (lesson,) = stage.step(random_batch(3))
    assert stage.losses is None and stage.epochs is None and len(stage.students) == 1
    torch.testing.assert_close(lesson.student.logits, random_outputs(size=3).logits)
    torch.testing.assert_close(lesson.teachers[0].logits, random_outputs(size=3, seed=1).logits)


def test_only_the_student_has_a_gradient():
    models = Pair()
    (stage,) = Offline(Offline.Options()).stages(models)
    (lesson,) = stage.step(random_batch(3))
    (teacher,) = lesson.teachers
    assert models.recorded == {"student": True, "teacher": False}
    assert lesson.student.features["a"].requires_grad
    assert not teacher.logits.requires_grad and not teacher.features["a"].requires_grad


def test_needs_a_teacher():
    assert (Offline.scheme, Offline.needs_teacher) == ("offline", True)
