"""Checks of the state: what a loss stores from step to step, and that it modifies nothing else."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from kdkit.contracts.loss import Loss
from kdkit.testing.outputs import tensors_by_name
from kdkit.testing.probes import Probe, probe_of_each_kind, set_up, some_probes
from kdkit.testing.promises import promise


@promise
def check_is_complete_after_setup(cls: type[Loss], **options: Any) -> None:
    """Check that nothing learnable or saved appears in `forward`: the optimizer was made before."""
    for p in probe_of_each_kind(cls, options):
        # The optimizer is made after `setup`, and takes no weights without a shape.
        lazy = [
            name
            for name, weight in p.loss.named_parameters()
            if isinstance(weight, nn.parameter.UninitializedParameter)
        ]
        p.require(
            not lazy,
            f"{lazy} has no shape after setup; take it from the probe batch's shapes there",
        )
        loss = p.copy_of_loss()
        before = set(loss.state_dict())
        p.value(loss)
        # The names, not the values, which a memory may change.
        late = sorted(set(loss.state_dict()) - before)
        p.require(not late, f"forward creates {late}; that belongs in setup")


@promise
def check_is_restored_from_its_state(cls: type[Loss], **options: Any) -> None:
    """Check that a second loss that loads the state continues with the same values; the state is
    tensors and plain values.
    """
    for p in probe_of_each_kind(cls, options):
        loss = p.copy_of_loss()
        p.value(loss)  # fills a memory or a moving average
        torch.save(loss.state_dict(), file := io.BytesIO())
        file.seek(0)
        try:
            state = torch.load(file, weights_only=True)
        except Exception as error:
            raise AssertionError(
                f"{cls.name}: its state_dict holds more than tensors and plain values: {error}"
            ) from error
        other = type(loss)(loss.options)
        # Another seed than the first loss's: equal values must come from the state alone.
        set_up(other, p.student, p.teacher, p.context, p.form, seed=1)
        try:
            other.load_state_dict(state)
        except RuntimeError as error:
            raise AssertionError(
                f"{cls.name}: after setup it cannot load the state of one that was used: {error}"
            ) from error
        value, restored = p.value(loss), p.value(other)
        p.require(
            torch.equal(value, restored),
            f"with its state loaded it gives {restored:.6g}, not {value:.6g}; what it remembers"
            " must be a buffer",
        )


@promise
def check_keeps_no_graph(cls: type[Loss], **options: Any) -> None:
    """Check that a second step does not reach back into the first: what is remembered is
    detached.
    """
    for original in some_probes(cls, options):
        p, loss = original.learning(), original.copy_of_loss()
        value = p.value(loss)
        # Weights that require a gradient are no results of a step.
        own = {id(x) for x in [*p.context.student.parameters(), *loss.parameters()]}
        for module in loss.modules():
            for name, attribute in vars(module).items():
                held = [
                    x
                    for x in tree_iter([attribute])
                    if isinstance(x, Tensor) and x.grad_fn is not None and id(x) not in own
                ]
                held += [
                    x for x in module._buffers.values() if x is not None and x.grad_fn is not None
                ]
                p.require(
                    not held, f"it keeps the graph of a step, in '{name}': remember `x.detach()`"
                )
        # Frees the buffers of the first step's graph, so that a second one through it fails.
        torch.autograd.backward(value)
        try:
            torch.autograd.backward(p.learning().value(loss, seed=1))
        except (AssertionError, RuntimeError) as error:
            p.require(False, f"a second step fails: {' '.join(str(error).split())}")


@promise
def check_leaves_its_inputs_alone(cls: type[Loss], **options: Any) -> None:
    """Check that outputs and batch are not modified."""
    for p in probe_of_each_kind(cls, options):
        given = p.copied()
        inputs = _inputs(given)
        before = {name: x.clone() for name, x in inputs.items()}
        given.value(copies=False)
        after = _inputs(given)
        written = [
            name for name, x in after.items() if name not in before or not x.equal(before[name])
        ] + [*(before.keys() - after.keys())]
        p.require(not written, f"forward writes into its inputs: {', '.join(written)}")


def _inputs(p: Probe) -> dict[str, Tensor]:
    """List the tensors that a loss is given, by name."""
    tensors = {"labels": p.batch.labels, "index": p.batch.index}
    if isinstance(p.batch.inputs, Tensor):
        tensors["inputs"] = p.batch.inputs
    for side, outputs in (("student", p.student), ("teacher", p.teacher)):
        tensors |= {f"{side}'s {name}": x for name, x in tensors_by_name(outputs).items()}
    return tensors
