import kdkit
from kdkit.recipe import registry
from kdkit.testing import random_batch, random_outputs

Supervised = registry.load().schedules["supervised"]


class OneStudent:
    """Hands out a student and has no teacher."""

    def student(self):
        return lambda inputs: random_outputs(size=len(inputs)).map(lambda x: x.requires_grad_())

    def teacher(self):
        raise AssertionError("there is none")


def test_one_stage_with_labels_alone():
    (stage,) = Supervised(Supervised.Options()).stages(OneStudent())
    (lesson,) = stage.step(random_batch(3))
    assert stage.training == kdkit.StageTraining() and len(stage.students) == 1
    assert lesson.teachers == [] and lesson.student.logits.requires_grad


def test_needs_no_teacher():
    assert (Supervised.scheme, Supervised.needs_teacher) == ("none", False)
