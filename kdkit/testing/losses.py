"""Checks every promise of a loss, and reports the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdkit.contracts.loss import Loss
from kdkit.testing import (
    contract_checks,
    gradient_checks,
    operations,
    state_checks,
    value_checks,
)
from kdkit.testing.promises import Check
from kdkit.testing.reference import Formula, assert_agrees_on_all_forms

# Simple promises first: a loss that breaks one of them fails the later checks for no reason of
# their own.
LOSS_CHECKS: list[Check] = [
    contract_checks.check_is_documented,
    contract_checks.check_refuses_by_shape_error,
    value_checks.check_is_a_finite_scalar,
    gradient_checks.check_teaches_the_student,
    gradient_checks.check_adapters_learn,
    gradient_checks.check_leaves_the_teacher_alone,
    state_checks.check_is_complete_after_setup,
    state_checks.check_leaves_its_inputs_alone,
    value_checks.check_is_deterministic,
    value_checks.check_ignores_the_order_of_samples,
    value_checks.check_takes_a_batch_of_one,
    value_checks.check_survives_degenerate_inputs,
    value_checks.check_takes_rounded_inputs,
    value_checks.check_takes_mixed_labels,
    state_checks.check_is_restored_from_its_state,
    value_checks.check_ignores_padding,
    contract_checks.check_every_option_has_an_effect,
    contract_checks.check_options_are_bounded,
    gradient_checks.check_reads_every_layer,
    gradient_checks.check_teaches_every_part,
    gradient_checks.check_the_gradient_is_that_of_the_value,
    value_checks.check_averages_over_the_batch,
    contract_checks.check_says_its_reduction,
    contract_checks.check_takes_two_classes,
    operations.check_stays_in_its_type,
    operations.check_does_not_loop_over_the_batch,
    operations.check_works_on_any_device,
    state_checks.check_keeps_no_graph,
]
"""A check for each promise: called with the loss's class and options, it returns what it could
not verify.
"""


@dataclass(frozen=True)
class Report:
    """The result of checking a loss that broke no promise.

    Attributes:
        loss: its name.
        kept: names of the checks that passed.
        exceptions: checks that the loss declares itself an exception to, with its reasons.
        not_verified: properties that the checks do not cover, or could not.
    """

    loss: str
    kept: tuple[str, ...]
    exceptions: Mapping[str, str]
    not_verified: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.loss}: {len(self.kept)} checks passed"]
        lines += [f"  exception to {name}: {reason}" for name, reason in self.exceptions.items()]
        return "\n".join([*lines, *(f"  not verified: {what}" for what in self.not_verified)])


FORMULA = (
    "the formula itself, such as the direction of a divergence, constant factors, and whether a"
    " mean over classes or positions is meant; give `reference=` a second, naive form of it"
)
PROCESSES = "the value over several processes (`gather`)"


def check_loss(cls: type[Loss], /, *, reference: Formula | None = None, **options: Any) -> Report:
    """Check every promise of a loss that is built with these options; print the report.

    Args:
        cls: the loss.
        reference: an independent, naive implementation of its formula: called with (loss, student,
            teacher, batch), it returns the expected scalar. It may raise ShapeError on forms that
            it does not cover.
        options: of the loss.

    Raises:
        AssertionError: a promise is broken; one line for each.
    """
    # All checks run, as one mistake may break several promises and the names tell which.
    broken, unknown = [], [] if reference else [FORMULA]
    for check in LOSS_CHECKS:
        try:
            unknown += check(cls, **options)
        except AssertionError as error:
            broken.append(f"{check.__name__}: {error}")
    if reference:
        try:
            assert_agrees_on_all_forms(cls, reference, options)
        except AssertionError as error:
            broken.append(f"reference: {error}")
    if broken:
        raise AssertionError("\n".join(broken))
    # The checks run in one process, where nothing is gathered.
    if "gather" in cls.Options.model_fields:
        unknown.append(PROCESSES)
    kept = tuple(check.__name__ for check in LOSS_CHECKS if check.__name__ not in cls.exceptions)
    report = Report(cls.name, kept, dict(cls.exceptions), tuple(unknown))
    print(report)
    return report
