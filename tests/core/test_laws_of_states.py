"""Laws 1, 2, 3 and 5: a step is a pure function of (state, batch), and a run is a fold of it."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import loops

from steploop import backward_scaled, forward_loss, optimizer_step, unscale_and_clip
from steploop.core.state import surroundings as shielding
from steploop.core.state.surroundings import shielded
from steploop.testing import (
    SURROUNDINGS,
    check_donation_equals_copy,
    check_fold_splits,
    check_input_stays_whole,
    check_runs_do_not_disturb_each_other,
    check_same_input_same_result,
    check_spent_state_refuses_use,
    check_surroundings,
    require_same,
    strategies,
)
from steploop.testing.strategies import Task, classification


@given(loop=loops())
def test_a_pure_step_leaves_its_input_whole_and_can_take_it_again(loop):
    check_input_stays_whole(partial(loop.step, donate=False), loop.state, loop.batches[0])


@given(loop=loops())
def test_after_a_donation_every_use_of_the_spent_state_raises(loop):
    check_donation_equals_copy(loop.step, partial(loop.step, donate=False), loop.state, loop.batches[0])


def test_a_state_that_is_alive_fails_the_law_of_spent_ones():
    with pytest.raises(
        AssertionError, match="params of a spent state must raise SpentStateError, but it gave a result"
    ):
        check_spent_state_refuses_use(Task().state(), Task().batch(0))


@given(loop=loops(), data=st.data())
def test_a_fold_can_be_cut_anywhere(loop, data):
    check_fold_splits(
        loop.step, loop.state, loop.batches, data.draw(strategies.cuts(len(loop.batches)), label="cut")
    )


@given(loop=loops(), donate=st.booleans())
def test_the_same_state_and_batches_give_the_same_result(loop, donate):
    check_same_input_same_result(partial(loop.step, donate=donate), loop.state, loop.batches)


@given(loop=loops(), donate=st.booleans())
def test_two_runs_over_one_model_do_not_disturb_each_other(loop, donate):
    state = loop.state
    other = loop.step(state.clone(), loop.batches[-1])
    check_runs_do_not_disturb_each_other(partial(loop.step, donate=donate), state, other, loop.batches)


@pytest.mark.parametrize("name", SURROUNDINGS)
@settings(max_examples=settings.default.max_examples // 3)
@given(loop=loops(), donate=st.booleans())
def test_the_result_does_not_depend_on_what_the_caller_left_switched_on(name, loop, donate):
    check_surroundings(partial(loop.step, donate=donate), loop.state, [*loop.batches, loop.batches[0]], name)


@given(loop=loops())
def test_a_step_that_is_skipped_changes_no_value(loop):
    """A batch that holds a nan is as if it had not been, but for the counters, the cursor and the loss scale."""
    before = loop.step(loop.state, loop.batches[0])
    kept = before.clone()
    inputs, labels = loop.batches[-1]
    after = loop.step(before, (inputs * torch.nan, labels))
    for name in ("params", "buffers", "slots", "ema", "applied_steps", "learning_rate"):
        require_same(getattr(after, name), getattr(kept, name), name)
    assert after.attempted_steps == kept.attempted_steps + 1
    assert after.batch == kept.batch + 1
    assert after.nonfinite_steps == kept.nonfinite_steps + 1


def switched_on():
    return torch.get_default_dtype(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    "name", ["torch.inference_mode()", "autocast", "float64 as the default dtype", "other random numbers"]
)
def test_a_function_of_ones_own_is_shielded_as_the_steps_are(name):
    @shielded
    def look(state, *arguments, **options):
        return switched_on(), arguments, options

    state = Task().state()
    with SURROUNDINGS[name](state):
        outside = switched_on()
        assert look(state, 1, two=2) == ((torch.float32, False, False), (1,), {"two": 2})
        assert switched_on() == outside
    assert look.__name__ == "look"


def test_a_shield_is_up_only_where_it_is_needed(monkeypatch):
    """In the usual surroundings it would cost more than the step of a small model."""

    def never(machine):
        raise AssertionError("the shield is up")

    monkeypatch.setattr(shielding, "shield", never)
    assert shielded(lambda state, x: x)(Task().state(), 3) == 3


def test_under_the_callers_autocast_the_model_computes_with_the_newest_values():
    """Autocast keeps its casts of the parameters until it ends: a step that changes them has to throw them away."""
    task = Task()
    state, inputs = task.state(precision="bf16"), task.batch(0)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = state.model(inputs)
        state = backward_scaled(forward_loss(state, task.batch(1), classification))
        state = optimizer_step(unscale_and_clip(state, max_norm=1.0))
        after = state.model(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(after, state.model(inputs))
    assert not torch.equal(after, before)
