"""Finds the student parameters that the losses of a stage reach, from the graph that a backward
pass would walk.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor, nn

from kdkit.contracts.records import Batch, Outputs, tensors
from kdkit.contracts.schedule import Lesson
from kdkit.engine.objective import Objective


def reached(objective: Objective, lesson: Lesson, pretended: Lesson, batch: Batch) -> set[int]:
    """Return the ids of all parameters that receive a gradient from the objective.

    Args:
        objective: set up.
        lesson: the networks' answers, with their graph. It may be on the meta device, where no loss
            can be computed.
        pretended: a lesson of the same shapes, for which losses can be computed.
        batch: the batch of `pretended`.
    """
    leaves = _on_leaves(pretended)
    found = _leaves_behind([objective(leaves, batch).total])
    answers = zip(_student_says(leaves), _student_says(lesson), strict=True)
    return found | _leaves_behind([real for leaf, real in answers if id(leaf) in found])


def names_of(parameters: set[int], network: nn.Module) -> tuple[str, ...]:
    """List the largest parts of a network that contain only these parameters; `""` for the whole of
    it.
    """
    found: list[str] = []
    for name, part in network.named_modules():
        own = {id(p) for p in part.parameters()}
        is_inside = any(above == "" or name.startswith(f"{above}.") for above in found)
        if own and own <= parameters and not is_inside:
            found.append(name)
    return tuple(found)


def _on_leaves(lesson: Lesson) -> Lesson:
    """Return the lesson with the student's answers as leaves of a graph."""

    def leaf(outputs: Outputs) -> Outputs:
        # detached, so that the walk ends at the answers; only floating-point tensors can have a
        # gradient
        return outputs.map(lambda value: value.detach().requires_grad_(value.is_floating_point()))

    own = lesson.supervised
    return replace(
        lesson,
        student=leaf(lesson.student),
        supervised=replace(own, student=leaf(own.student)) if own else None,
    )


def _student_says(lesson: Lesson) -> list[Tensor]:
    own = lesson.supervised
    return [*tensors(lesson.student), *(tensors(own.student) if own else ())]


def _leaves_behind(values: Iterable[Tensor]) -> set[int]:
    """Return the ids of the leaves on which values depend, through operations that have a
    gradient.
    """
    values = list(values)
    found = {id(value) for value in values if value.is_leaf and value.requires_grad}
    waiting = [value.grad_fn for value in values if value.grad_fn is not None]
    met = set(waiting)
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        for before, _ in node.next_functions:
            if before is not None and before not in met:
                met.add(before)
                waiting.append(before)
    return found
