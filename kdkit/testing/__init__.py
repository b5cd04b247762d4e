"""Checks of what every loss promises, for anyone's plugin.

    from kdkit.testing import check_loss      # everything at once
    check_loss(MyLoss, temperature=2.0)       # with the options that the loss needs

    from kdkit.testing import LOSS_CHECKS     # or, under pytest, a test per promise
    @pytest.mark.parametrize("check", LOSS_CHECKS, ids=lambda check: check.__name__)
    def test_my_loss(check):
        check(MyLoss, temperature=2.0)

A loss that compares layers is tried on maps, tokens and vectors; it may refuse some of them by a
ShapeError in `setup`. A failure is an AssertionError that says which promise is broken, and on
what. `assert_agrees` compares a loss with a second derivation of its formula; `check_task` checks
a task.
"""

from kdkit.testing.contract_checks import (
    check_every_option_has_an_effect,
    check_is_documented,
    check_options_are_bounded,
    check_refuses_by_shape_error,
    check_says_its_reduction,
    check_takes_two_classes,
)
from kdkit.testing.gradient_checks import (
    check_adapters_learn,
    check_leaves_the_teacher_alone,
    check_reads_every_layer,
    check_teaches_every_part,
    check_teaches_the_student,
    check_the_gradient_is_that_of_the_value,
)
from kdkit.testing.losses import FORMULA, LOSS_CHECKS, PROCESSES, Report, check_loss
from kdkit.testing.operations import (
    check_does_not_loop_over_the_batch,
    check_stays_in_its_type,
    check_works_on_any_device,
)
from kdkit.testing.outputs import random_batch, random_outputs
from kdkit.testing.reference import assert_agrees
from kdkit.testing.state_checks import (
    check_is_complete_after_setup,
    check_is_restored_from_its_state,
    check_keeps_no_graph,
    check_leaves_its_inputs_alone,
)
from kdkit.testing.tasks import check_task
from kdkit.testing.value_checks import (
    check_averages_over_the_batch,
    check_ignores_padding,
    check_ignores_the_order_of_samples,
    check_is_a_finite_scalar,
    check_is_deterministic,
    check_survives_degenerate_inputs,
    check_takes_a_batch_of_one,
    check_takes_mixed_labels,
    check_takes_rounded_inputs,
)

__all__ = [
    "FORMULA",
    "LOSS_CHECKS",
    "PROCESSES",
    "Report",
    "assert_agrees",
    "check_adapters_learn",
    "check_averages_over_the_batch",
    "check_does_not_loop_over_the_batch",
    "check_every_option_has_an_effect",
    "check_ignores_padding",
    "check_ignores_the_order_of_samples",
    "check_is_a_finite_scalar",
    "check_is_complete_after_setup",
    "check_is_deterministic",
    "check_is_documented",
    "check_is_restored_from_its_state",
    "check_keeps_no_graph",
    "check_leaves_its_inputs_alone",
    "check_leaves_the_teacher_alone",
    "check_loss",
    "check_options_are_bounded",
    "check_reads_every_layer",
    "check_refuses_by_shape_error",
    "check_says_its_reduction",
    "check_stays_in_its_type",
    "check_survives_degenerate_inputs",
    "check_takes_a_batch_of_one",
    "check_takes_mixed_labels",
    "check_takes_rounded_inputs",
    "check_takes_two_classes",
    "check_task",
    "check_teaches_every_part",
    "check_teaches_the_student",
    "check_the_gradient_is_that_of_the_value",
    "check_works_on_any_device",
    "random_batch",
    "random_outputs",
]
