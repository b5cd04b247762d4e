"""What losses share that read a network's classifier behind the pooling of one layer."""

from torch import nn

import kdkit


def networks(
    options: kdkit.FeatureOptions, context: kdkit.Context | None, needs: str
) -> kdkit.Context:
    """Return the context of a loss on one pair of layers.

    Args:
        options: of the loss.
        context: what its `setup` is given.
        needs: what it is needed for, such as "the teacher's classifier".

    Raises:
        ShapeError: there is no context, or another number of pairs.
    """
    if context is None:
        raise kdkit.ShapeError(f"it needs {needs}: give `setup` a context with the networks")
    if len(options.layers) != 1:
        raise kdkit.ShapeError(
            f"it reads the last layers before the classifiers: one pair, not {len(options.layers)}"
        )
    return context


def classifiers(
    options: kdkit.FeatureOptions,
    student: kdkit.Outputs,
    teacher: kdkit.Outputs,
    context: kdkit.Context | None,
) -> tuple[nn.Linear, nn.Linear]:
    """Return the student's and the teacher's classifier, each applied to the mean over its layer.

    Raises:
        ShapeError: there is no context, another number of pairs, another kind of head, or other
            classes on one side.
    """
    context = networks(options, context, "both networks' classifiers")
    ((f_s, f_t),) = options.pairs(student, teacher)
    pair = options.layers[0]
    theirs = kdkit.pooled_head(
        context.teacher_classifier(), f_t, teacher.logits, f"teacher '{pair.teacher}'"
    )
    ours = kdkit.pooled_head(
        context.student_classifier(), f_s, student.logits, f"student '{pair.student}'"
    )
    same_classes(student, teacher)
    return ours, theirs


def same_classes(student: kdkit.Outputs, teacher: kdkit.Outputs) -> None:
    """Check that both classify into as many classes.

    Raises:
        ShapeError: they do not.
    """
    if student.logits.shape != teacher.logits.shape:
        raise kdkit.ShapeError(
            f"student logits {tuple(student.logits.shape)} and teacher logits"
            f" {tuple(teacher.logits.shape)} must be over the same K classes; train both on one"
            " class set"
        )
