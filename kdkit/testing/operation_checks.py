"""Checks of a loss's tensor operations: how many, of which type, on which device."""

from __future__ import annotations

from typing import Any

from kdkit.contracts.loss import Loss
from kdkit.testing.operations import Operations, run_elsewhere
from kdkit.testing.probe import readable
from kdkit.testing.probes import some_probes
from kdkit.testing.promises import promise


@promise
def check_stays_in_its_type(cls: type[Loss], **options: Any) -> None:
    """Check that forward makes no doubles from floats: doubles are slow on GPUs and unsupported on
    Apple's.
    """
    for p in some_probes(cls, options):
        with Operations() as seen:
            p.value()
        p.require(
            not seen.widening,
            f"forward makes fp64 tensors of fp32 ones (in {', '.join(sorted(seen.widening))})",
        )


@promise
def check_does_not_loop_over_the_batch(cls: type[Loss], **options: Any) -> None:
    """Check that a larger batch takes the same number of operations."""
    p = some_probes(cls, options)[0]
    counts = []
    for batch in (p, p.rows("each sample twice", [*range(6), *range(6)])):
        loss = batch.copy_of_loss()
        with Operations() as seen:
            batch.value(loss)
        counts.append(seen.count)
    says = f"{counts[0]} operations for 6 samples, {counts[1]} for 12: work on all samples at once"
    p.require(counts[1] <= counts[0], says)


@promise
def check_works_on_any_device(cls: type[Loss], **options: Any) -> list[str]:
    """Check that every tensor in forward is on the device of its inputs, or in a parameter or
    buffer that moves there with the loss.
    """
    p = some_probes(cls, options)[0]
    teacher = readable(p.loss, p.teacher)
    try:
        why = run_elsewhere(p.loss, p.student, teacher, p.batch, p.context.student)
    except RuntimeError as error:
        says = (
            "on an accelerator it mixes devices; make constants on the device of an input, or"
            " buffers of them"
        )
        raise AssertionError(f"{cls.name}: on {p.form}: {says}: {error}") from None
    if why is None:
        return []
    return [
        "whether it works on an accelerator: forward asks for values, which shapes alone do not"
        f" have ({why})"
    ]
