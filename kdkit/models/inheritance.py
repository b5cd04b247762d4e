"""Initialises a student with tensors of its teacher, all or of selected repeated blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from kdkit.errors import ModelError


def inherit(
    student: nn.Module,
    teacher: nn.Module,
    layers: Sequence[int] | None = None,
    rename: Callable[[str], str] = str,
) -> list[str]:
    """Copy the teacher's tensors into the student, in place; return the names of the copied ones.

    Args:
        student: keeps its own values if the teacher has no tensor of that name and shape.
        teacher: not modified.
        layers: numbers of the teacher's blocks, the first one 0, in the student's order; a
            transformer's layers are such blocks.
        rename: maps the teacher's name of a tensor to the student's.

    Raises:
        ModelError: nothing fits; there is no single row of blocks, or not with such numbers.
    """
    row = _row(teacher, layers) if layers is not None else ""
    if layers is not None:
        _refuse_other_number(student, rename(f"{row}.").rstrip("."), len(layers))
    own = student.state_dict()
    theirs = {rename(name): value for name, value in _renumbered(teacher, row, layers)}
    fitting = {
        name: value
        for name, value in theirs.items()
        if name in own and own[name].shape == value.shape
    }
    # blocks were asked for: equal embeddings alone are not what `layers` means
    inside = rename(f"{row}.") if layers is not None else ""
    if not any(name.startswith(inside) for name in fitting):
        whose = f"the teacher's {row}" if row else "the teacher"
        raise ModelError(f"no tensor of {whose} has the name and the shape of one of the student's")
    # not strict: the student has further tensors of its own
    student.load_state_dict(fitting, strict=False)
    return list(fitting)


def _row(network: nn.Module, layers: Sequence[int]) -> str:
    """Find the path of the longest list of blocks with equal structure."""
    rows = {
        path: len(row)
        for path, row in network.named_modules()
        if isinstance(row, nn.ModuleList | nn.Sequential) and _alike(row)
    }
    most = max(rows.values(), default=0)
    longest: list[str] = [path for path, length in rows.items() if length == most]
    if len(longest) != 1:
        there = f"several ({', '.join(longest)})" if longest else "none"
        raise ModelError(
            f"`layers` are numbers in a row of repeated blocks, of which the teacher has {there};"
            " leave `layers` out"
        )
    if wrong := [i for i in layers if not 0 <= i < rows[longest[0]]]:
        raise ModelError(
            f"layers: {wrong[0]} is none of the teacher's {rows[longest[0]]} ('{longest[0]}'),"
            " which are numbered from 0"
        )
    return longest[0]


def _alike(row: nn.ModuleList | nn.Sequential) -> bool:
    """Check whether blocks are several, of one class, and have parameters of the same shapes."""
    kinds = {
        (type(block), tuple((name, p.shape) for name, p in block.named_parameters()))
        for block in row
    }
    return len(row) > 1 and len(kinds) == 1 and all(shapes for _, shapes in kinds)


def _refuse_other_number(student: nn.Module, row: str, expected: int) -> None:
    try:
        blocks = student.get_submodule(row)
    except AttributeError:
        raise ModelError(
            f"the student has no '{row}', where the teacher has its repeated blocks"
        ) from None
    count = len(list(blocks.children()))
    if count != expected:
        raise ModelError(
            f"layers: names {expected} of the teacher's, the student has {count} ('{row}')"
        )


def _renumbered(
    teacher: nn.Module, row: str, layers: Sequence[int] | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the teacher's tensors; in the row, chosen blocks under the student's numbers."""
    for name, value in teacher.state_dict().items():
        if layers is None or not name.startswith(f"{row}."):
            yield name, value
            continue
        number, _, rest = name.removeprefix(f"{row}.").partition(".")
        # a block may be chosen several times
        for position, chosen in enumerate(layers):
            if chosen == int(number):
                yield f"{row}.{position}.{rest}", value
