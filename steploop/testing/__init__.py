"""Test training loops, steploop's and yours, against laws on generated cases.

A law is a plain function that raises AssertionError and names the first tensor that differs, and by how much; it works
under Hypothesis, under plain pytest and in ``steploop check`` alike. Its docstring states it as an equation.

    purity       a step leaves its input whole, a spent state refuses use, no surrounding matters      laws 1, 2, 5
    folds        a run can be cut, saved, loaded and interleaved anywhere                              laws 3, 4
    clipping     bounds, direction, torch's bits, nothing that is not finite is stepped on             laws 6, 7
    scaling      powers of two change no bit; any overflows give what GradScaler gives                 laws 8, 9
    stopping     early stopping and plateau over any history                                           laws 10, 11
    rates        schedules are torch's, and functions of the step                                      law 12
    partitions   accumulation and evaluation do not depend on how samples are cut into batches         laws 13, 14
    orders       each epoch is a permutation, for any workers, ranks and cursor                        law 15
    torch_loops  each optimizer is bit-equal to itself in a loop written by hand                       law 16
    determinism  no operation is one that torch knows to give other bits every time
    learning     every parameter is reached by a gradient, and one batch can be learned by heart
    strategies   what to test them on

Test a loop of your own::

    from hypothesis import given
    from steploop.testing import check_fold_splits, check_same_input_same_result, strategies

    @given(task=strategies.tasks(), cut=strategies.cuts(3))
    def test_my_loop(task, cut):
        state, batches = task.state(), task.batches(3)
        check_same_input_same_result(my_step, state, batches)
        check_fold_splits(my_step, state, batches, cut)
"""

from steploop.testing import strategies as strategies
from steploop.testing.clipping_laws import (
    check_a_batch_of_nan_changes_nothing,
    check_adaptive_clip_bounds_each_unit,
    check_clip_keeps_direction,
    check_clip_leaves_small_gradients,
    check_clip_norm_equals_torch,
    check_clip_value_equals_torch,
    check_clipping_twice_is_clipping_once,
    check_norm_is_bounded,
    check_only_finite_gradients_are_stepped_on,
    holding,
    steploop_clip,
)
from steploop.testing.determinism_laws import check_operations_are_deterministic
from steploop.testing.loss_scale_laws import (
    check_scale_changes_no_bit,
    check_scale_follows_torch,
    check_scaled_steps_follow_torch,
    in_float32,
)
from steploop.testing.objective_laws import (
    check_every_parameter_is_reached,
    check_one_batch_is_learned,
    check_step_lowers_the_loss,
)
from steploop.testing.optimizer_laws import check_optimizer_equals_its_loop
from steploop.testing.order_laws import (
    check_batches_do_not_depend_on_workers,
    check_cursor_continues_the_epoch,
    check_epoch_is_a_permutation,
    check_ranks_partition_the_epoch,
)
from steploop.testing.partition_laws import (
    check_evaluation_changes_nothing,
    check_evaluation_ignores_order,
    check_evaluation_ignores_partition,
    check_partition_gives_the_whole_gradient,
    split,
)
from steploop.testing.purity_laws import (
    SURROUNDINGS,
    check_all_surroundings,
    check_donation_equals_copy,
    check_input_stays_whole,
    check_same_input_same_result,
    check_spent_state_refuses_use,
    check_surroundings,
    pure,
)
from steploop.testing.resume_laws import (
    check_fold_splits,
    check_resume_is_exact,
    check_runs_do_not_disturb_each_other,
)
from steploop.testing.schedule_laws import (
    check_schedule_equals_torch,
    check_schedule_is_a_function,
    check_scheduling_is_idempotent,
)
from steploop.testing.state_comparison import clone, copied, fold, require_same, values
from steploop.testing.stopping_laws import (
    check_best_is_the_running_best,
    check_max_is_min_of_the_negative,
    check_metric_fold_splits,
    check_more_min_delta_never_stops_later,
    check_more_patience_never_stops_earlier,
    check_plateau_equals_torch,
    check_stops_at_the_patience_th_bad_check,
    stop_check,
)

__all__ = [
    "SURROUNDINGS",
    "check_a_batch_of_nan_changes_nothing",
    "check_adaptive_clip_bounds_each_unit",
    "check_all_surroundings",
    "check_batches_do_not_depend_on_workers",
    "check_best_is_the_running_best",
    "check_clip_keeps_direction",
    "check_clip_leaves_small_gradients",
    "check_clip_norm_equals_torch",
    "check_clip_value_equals_torch",
    "check_clipping_twice_is_clipping_once",
    "check_cursor_continues_the_epoch",
    "check_donation_equals_copy",
    "check_epoch_is_a_permutation",
    "check_evaluation_changes_nothing",
    "check_evaluation_ignores_order",
    "check_evaluation_ignores_partition",
    "check_every_parameter_is_reached",
    "check_fold_splits",
    "check_input_stays_whole",
    "check_max_is_min_of_the_negative",
    "check_metric_fold_splits",
    "check_more_min_delta_never_stops_later",
    "check_more_patience_never_stops_earlier",
    "check_norm_is_bounded",
    "check_one_batch_is_learned",
    "check_only_finite_gradients_are_stepped_on",
    "check_operations_are_deterministic",
    "check_optimizer_equals_its_loop",
    "check_partition_gives_the_whole_gradient",
    "check_plateau_equals_torch",
    "check_ranks_partition_the_epoch",
    "check_resume_is_exact",
    "check_runs_do_not_disturb_each_other",
    "check_same_input_same_result",
    "check_scale_changes_no_bit",
    "check_scale_follows_torch",
    "check_scaled_steps_follow_torch",
    "check_schedule_equals_torch",
    "check_schedule_is_a_function",
    "check_scheduling_is_idempotent",
    "check_spent_state_refuses_use",
    "check_step_lowers_the_loss",
    "check_stops_at_the_patience_th_bad_check",
    "check_surroundings",
    "clone",
    "copied",
    "fold",
    "holding",
    "in_float32",
    "pure",
    "require_same",
    "split",
    "steploop_clip",
    "stop_check",
    "strategies",
    "values",
]
