"""Laws 1, 2, 3 and 5: a step is a pure function of (state, batch), and a run is a fold of it."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steploop import accumulate, backward_scaled, forward_loss, optimizer_step, schedule, unscale_and_clip, update_ema
from steploop.testing import (
    SURROUNDINGS,
    check_donation_equals_copy,
    check_fold_splits,
    check_input_stays_whole,
    check_runs_do_not_disturb_each_other,
    check_same_input_same_result,
    check_surroundings,
    split,
    strategies,
)
from steploop.testing.strategies import classification

# what a step computes in; fp16 and bf16 by autocast on the CPU too
precisions = ("fp32", "bf16", "fp16")


def train_step(state, batch, *, rate, donate=True, bound=("max_norm", 1.0), accumulated=False):
    """Every step function in its place, as a recipe has them."""
    if accumulated:
        size = len(batch[0])
        state = accumulate(state, split(batch, [2, size - 2] if size > 3 else [size]), classification)
    else:
        state = backward_scaled(forward_loss(state, batch, classification))
    state = unscale_and_clip(state, **dict([bound]))
    state = optimizer_step(state, donate=donate)
    if state.ema is not None:
        state = update_ema(state, decay=0.9)
    return schedule(state, rate)


@st.composite
def loops(draw, **parts):
    """(step, state, batches) of any short run."""
    task = draw(strategies.tasks(**parts))
    step = partial(
        train_step,
        rate=draw(strategies.schedules(momentum=False)),
        bound=draw(st.sampled_from([("max_norm", 1.0), ("max_norm", 1e9), ("max_value", 0.01), ("adaptive", 0.1)])),
        accumulated=draw(st.booleans()),
    )
    return step, draw(strategies.states(task, precisions=precisions)), draw(strategies.runs(task, max_batches=3))


@given(loop=loops())
def test_a_pure_step_leaves_its_input_whole_and_can_take_it_again(loop):
    step, state, batches = loop
    check_input_stays_whole(partial(step, donate=False), state, batches[0])


@given(loop=loops())
def test_after_a_donation_every_use_of_the_spent_state_raises(loop):
    step, state, batches = loop
    check_donation_equals_copy(step, partial(step, donate=False), state, batches[0])


@given(loop=loops(), data=st.data())
def test_a_fold_can_be_cut_anywhere(loop, data):
    step, state, batches = loop
    check_fold_splits(step, state, batches, data.draw(strategies.cuts(len(batches)), label="cut"))


@given(loop=loops(), donate=st.booleans())
def test_the_same_state_and_batches_give_the_same_result(loop, donate):
    step, state, batches = loop
    check_same_input_same_result(partial(step, donate=donate), state, batches)


@given(loop=loops(), donate=st.booleans())
def test_two_runs_over_one_model_do_not_disturb_each_other(loop, donate):
    step, state, batches = loop
    other = step(state.clone(), batches[-1])
    check_runs_do_not_disturb_each_other(partial(step, donate=donate), state, other, batches)


@pytest.mark.parametrize("name", SURROUNDINGS)
@settings(max_examples=settings.default.max_examples // 3)
@given(loop=loops(), donate=st.booleans())
def test_the_result_does_not_depend_on_what_the_caller_left_switched_on(name, loop, donate):
    step, state, batches = loop
    check_surroundings(partial(step, donate=donate), state, batches, name)


@given(loop=loops(), data=st.data())
def test_a_step_that_is_skipped_changes_no_value(loop, data):
    """A batch that holds a nan is as if it had not been, but for the counters, the cursor and the loss scale."""
    step, state, batches = loop
    before = step(state, batches[0])
    kept = before.clone()
    inputs, labels = batches[-1]
    after = step(before, (inputs * torch.nan, labels))
    for name in ("params", "buffers", "slots", "ema", "applied_steps", "learning_rate"):
        assert_equal(getattr(after, name), getattr(kept, name), name)
    assert after.attempted_steps == kept.attempted_steps + 1
    assert after.nonfinite_steps == kept.nonfinite_steps + 1


def assert_equal(found, expected, name):
    from steploop.testing import require_same

    require_same(dict(found) if hasattr(found, "items") else found, dict(expected) if hasattr(expected, "items") else expected, name)
