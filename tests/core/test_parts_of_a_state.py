"""A field that somebody adds to one of the three parts of a state goes wherever the state goes, without another line.

Each part has made-up fields here: a plain value, values in tensors, and two things in flight.
"""

import copy
from functools import partial

import attrs
import compiled_runs
import pytest
import torch
from state_helpers import with_flight
from torch import Tensor

import steploop
from steploop import (
    Optimizer,
    TrainState,
    accumulate,
    backward_scaled,
    checkpoint,
    constant,
    evaluate,
    forward_loss,
    optimizer_step,
    schedule,
    unscale_and_clip,
    update_ema,
)
from steploop.core.state.parts import (
    WITHIN,
    InFlight,
    PlainValues,
    TensorValues,
    field_names,
    plain_names,
    result_names,
)
from steploop.core.trees import first_difference
from steploop.errors import ConfigError
from steploop.runs.capsules.capsule_writer import state_before
from steploop.testing import check_donation_equals_copy, check_input_stays_whole, check_resume_is_exact
from steploop.testing.state_comparison import require_same, values
from steploop.testing.strategies import Task, classification


@attrs.frozen(eq=False, kw_only=True, repr=False, slots=False, init=False)
class Wider(TrainState):
    lessons: int = 0


@attrs.frozen(eq=False, kw_only=True, slots=False)
class MoreTensors(TensorValues):
    memory: dict[str, Tensor] | None = None


@attrs.frozen(eq=False, kw_only=True, slots=False)
class MoreInFlight(InFlight):
    attention: Tensor | None = None
    scratch: Tensor | None = attrs.field(default=None, metadata=WITHIN)


TASK = Task(batch_norm=True, dropout=0.5)
ADAM = Optimizer(torch.optim.AdamW, lr=0.01)


def wider(number=0.0, *, optimizer=ADAM, lessons=3, task=TASK, **options):
    state = Wider.create(task.model(), optimizer, ema=True, **options)
    memory = {"queue": torch.arange(4.0) + number, "seen": torch.tensor(7)}
    return state.replace(
        tensors=MoreTensors(**vars(state.tensors), memory=memory),
        flight=MoreInFlight(**vars(state.flight)),
        lessons=lessons,
    )


def gradients(state, batch, objective=classification):
    """Up to the optimizer's step; the memory is moved on."""
    state = forward_loss(state, batch, objective)
    state = with_flight(state, attention=state.loss * 2, scratch=torch.ones(2))
    state = unscale_and_clip(backward_scaled(state), max_norm=1.0)
    assert state.flight.scratch is not None
    memory = {
        "queue": torch.cat([state.tensors.memory["queue"][1:], state.loss[None]]),
        "seen": state.tensors.memory["seen"] + 1,
    }
    return state.replace(tensors=state.tensors.replace(memory=memory))


def step(state, batch, *, donate=True):
    state = update_ema(optimizer_step(gradients(state, batch), donate=donate), decay=0.9)
    return schedule(state.replace(lessons=state.lessons + 1), constant(0.01))


def test_each_part_lists_its_fields_once():
    assert plain_names(Wider) == (*plain_names(TrainState), "lessons")
    assert set(plain_names(TrainState)) == {f.name for f in attrs.fields(PlainValues)}
    assert field_names(MoreTensors) == (*field_names(TensorValues), "memory")
    assert "leaves" not in field_names(TensorValues)
    assert field_names(MoreInFlight) == (*field_names(InFlight), "attention", "scratch")
    assert result_names(MoreInFlight) == (*result_names(InFlight), "attention")
    assert set(field_names(InFlight)) - set(result_names(InFlight)) == {"graph", "grads", "began", "passes"}


@pytest.mark.parametrize("copied", [TrainState.clone, copy.deepcopy, lambda state: state.with_params({})])
def test_a_copy_has_them_and_shares_no_memory(copied):
    state = step(wider(), TASK.batch(0))
    twin = copied(state)
    require_same(twin, state, "a copy is the same")
    assert (type(twin), twin.lessons) == (Wider, 4)
    for name, tensor in state.tensors.memory.items():
        assert twin.tensors.memory[name].data_ptr() != tensor.data_ptr()


def test_what_is_in_flight_goes_into_a_clone_and_results_alone_into_a_state_with_other_values():
    state = with_flight(wider(), attention=torch.tensor(0.5), scratch=3)
    assert state.clone().flight.attention is state.flight.attention
    assert type(state.with_params({}).flight) is MoreInFlight
    assert state.with_params({}).flight.attention is state.flight.attention
    assert (state.clone().flight.scratch, state.with_params({}).flight.scratch) == (3, None)


def test_a_comparison_names_them():
    state = wider()
    assert {"lessons", "memory"} < values(state).keys()
    assert values(state).keys().isdisjoint(field_names(MoreInFlight))
    found = first_difference(values(state), values(wider(1.0)))
    assert found == "memory.queue: 4 of 4 elements differ, the largest difference is 1.000e+00"
    assert first_difference(values(state), values(wider(lessons=4))) == "lessons: 3 against 4"


def test_a_digest_counts_them_and_nothing_in_flight():
    digests = {checkpoint.digest(state) for state in (wider(), wider(1.0), wider(lessons=4))}
    assert len(digests) == 3
    state = with_flight(wider(), attention=torch.tensor(0.5), scratch=torch.ones(3))
    assert checkpoint.digest(state) in digests


def test_what_is_saved_is_loaded_and_nothing_in_flight_is_saved(tmp_path):
    state = with_flight(step(wider(), TASK.batch(0)), attention=torch.tensor(0.5))
    digest = checkpoint.save(state, tmp_path / "a")
    loaded = checkpoint.load(tmp_path / "a", like=wider(9.0, lessons=0))
    assert checkpoint.digest(loaded) == digest
    require_same(loaded, state, "loading gives what was saved")
    assert (type(loaded), type(loaded.tensors), loaded.lessons) == (Wider, MoreTensors, 4)
    assert first_difference(vars(loaded.flight), vars(MoreInFlight())) is None
    assert b"attention" not in b"".join(path.read_bytes() for path in (tmp_path / "a").iterdir())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_step_function_hands_them_on(precision):
    state = wider(precision=precision)
    before, batch = copy.deepcopy(values(state)["memory"]), TASK.batch(0)
    accumulated = accumulate(state, [batch, TASK.batch(1)], classification)
    for after in (
        forward_loss(state, batch, classification),
        accumulated,
        unscale_and_clip(accumulated, max_norm=1.0),
        optimizer_step(
            unscale_and_clip(backward_scaled(forward_loss(state, batch, classification)), max_norm=1.0)
        ),
    ):
        assert (after.lessons, type(after.flight)) == (3, MoreInFlight)
        assert first_difference(after.tensors.memory, before) is None


def test_a_result_stays_in_flight_until_the_next_forward_pass_and_what_is_within_a_step_ends_with_it():
    state = step(wider(), TASK.batch(0))
    assert state.flight.attention == 2 * state.loss
    assert state.flight.scratch is None
    assert forward_loss(state, TASK.batch(1), classification).flight.attention is None


def test_a_pure_step_leaves_them_whole_and_is_the_step_that_donates():
    state = step(wider(), TASK.batch(0))
    pure = partial(step, donate=False)
    check_input_stays_whole(pure, state, TASK.batch(1))
    check_donation_equals_copy(step, pure, state, TASK.batch(1))


def test_a_resumed_run_goes_on_with_them():
    batches = [TASK.batch(index) for index in range(4)]
    other = wider(9.0, lessons=0, task=attrs.evolve(TASK, seed=1))
    check_resume_is_exact(step, wider(), batches, 2, other)


def explosive(model, batch):
    loss, *rest = classification(model, batch)
    return loss * float("inf"), *rest


@pytest.mark.parametrize("on_device", [False, True], ids=["decided on the host", "selected on the device"])
def test_a_skipped_step_brings_back_what_the_step_began_with(on_device):
    state = wider(optimizer=Optimizer(torch.optim.AdamW, lr=0.01, fused=True))
    state = step(state, TASK.batch(0)).replace(lessons=8)
    began = copy.deepcopy(values(state)["memory"])
    ready = gradients(state, TASK.batch(1), explosive)
    if on_device:
        ready = with_flight(ready, finite=torch.zeros(()) > 0)
    assert first_difference(ready.tensors.memory, began) is not None
    skipped = optimizer_step(ready).settle()
    assert (skipped.finite, skipped.lessons) == (False, 8)
    assert first_difference(skipped.tensors.memory, began) is None


def test_a_capsule_is_made_of_the_state_before_with_them():
    state = step(wider(), TASK.batch(0))
    before = state_before(state, state)
    assert before is not state
    require_same(before, state, "it is the state before")
    assert (type(before.flight), before.flight.attention) == (MoreInFlight, None)


def test_an_evaluation_looks_at_the_state_and_changes_none_of_them():
    state = step(wider(), TASK.batch(0))
    before = copy.deepcopy(values(state))
    evaluate(state, TASK.batches(2), classification, use_ema=True)
    assert first_difference(values(state), before) is None


def test_a_compiled_step_computes_with_them(monkeypatch):
    """The memory is an input and an output of the graph; a plain value that the step reads decides which graph."""
    compiled_runs.run_as_it_is(monkeypatch)
    task = attrs.evolve(TASK, dropout=0.0)

    def train(state, batch):
        state = optimizer_step(gradients(state, batch))
        return schedule(state, constant(0.01 if state.lessons < 5 else 0.02))

    graphed, eager = steploop.compile(train), wider(task=task)
    state = eager.clone()
    for index in range(6):
        if index == 4:
            state, eager = state.replace(lessons=5), eager.replace(lessons=5)
        state, eager = graphed(state, task.batch(index)), train(eager, task.batch(index))
        assert type(state.flight) is MoreInFlight
        torch.testing.assert_close(state.flight.attention, eager.flight.attention)
        assert state.flight.scratch is None
        torch.testing.assert_close(state.tensors.memory, eager.tensors.memory)
        assert (state.lessons, state.learning_rate) == (eager.lessons, eager.learning_rate)
    assert state.learning_rate == 0.02


def test_a_compiled_step_may_change_a_plain_value_once_for_all_as_the_eager_step_does(monkeypatch):
    compiled_runs.run_as_it_is(monkeypatch)
    graphed = steploop.compile(
        lambda state, batch: optimizer_step(gradients(state, batch)).replace(lessons=11)
    )
    state = wider(task=attrs.evolve(TASK, dropout=0.0))
    for index in range(3):
        state = graphed(state, TASK.batch(index))
    assert state.lessons == 11


@pytest.mark.parametrize(
    "name",
    [n for part in (TensorValues, InFlight) for n in field_names(part)],
)
def test_only_plain_values_are_changed_with_evolve(name):
    """Weights that one function sees and another does not would train the one and save the other."""
    state = Wider.create(TASK.model(), ADAM)
    assert attrs.evolve(state, lessons=2).lessons == 2
    assert attrs.evolve(state, epoch=2).epoch == 2
    with pytest.raises(ConfigError) as caught:
        attrs.evolve(state, **{name: None})
    assert str(caught.value) == (
        f"attrs.evolve: {name} of a TrainState is no plain value, and a change of it would be lost or half done. Use "
        "state.with_params({name: tensor}) or state.with_carry(tree); a step function makes the rest."
    )


def test_a_name_that_no_state_has_is_refused_with_the_names_it_has():
    with pytest.raises(
        ConfigError, match=r"^TrainState has no plain value 'lesson'\. It has: hyper, seed, .*, lessons\.$"
    ):
        attrs.evolve(wider(), lesson=2)
