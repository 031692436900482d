"""Steps in a row (``fold``, ``scan``) are the single compiled steps, bit for bit, whatever comes in between."""

import functools
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.nn.functional as F
from compiled_runs import (
    batches,
    decaying,
    first_state,
    mlp,
    objective,
    run_as_it_is,
    train_step,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from steploop import (
    LossScale,
    Optimizer,
    TrainState,
    accumulate,
    backward_scaled,
    checkpoint,
    compile,  # noqa: A004  (steploop.compile, as in torch.compile)
    forward_loss,
    one_cycle,
    optimizer_step,
    schedule,
    unscale_and_clip,
    update_ema,
)
from steploop.compilation import CompiledStep
from steploop.compilation.stretches import Row
from steploop.errors import CompileError, ConfigError, NonFiniteError, SpentStateError
from steploop.testing.state_comparison import require_same

RESULTS = ("loss", "outputs", "grad_norm", "clipped_norm", "finite")
BAD = (torch.full((10, 6), float("nan")), torch.zeros(10, dtype=torch.int64))


@pytest.fixture(autouse=True)
def _graphs_run_as_they_are(monkeypatch):
    run_as_it_is(monkeypatch)


def members(state):
    return {"": state} if isinstance(state, TrainState) else dict(state)


def assert_same(a, b):
    """All that the next step depends on, and all that this one computed, to the bit."""
    require_same(a, b, "steps in a row must be single steps")
    for name, one in members(a).items():
        other = members(b)[name]
        assert one.generation == other.generation
        assert one.flight.known == other.flight.known
        assert_same_results(one.flight, other.flight)


def assert_same_results(a, b):
    for name in RESULTS:
        require_same(getattr(a, name), getattr(b, name), f"{name} must be the single step's")


def cut(items, lengths):
    """The items in groups of these lengths, again and again."""
    groups, rest, turn = [], list(items), 0
    while rest:
        length = lengths[turn % len(lengths)]
        groups.append(rest[:length])
        rest, turn = rest[length:], turn + 1
    return groups


def both(step, state, items, lengths=(4,), kind=list):
    """Fold single compiled steps, and steps in a row in groups; compare the states and each step's results."""
    one, many = (step, step) if isinstance(step, CompiledStep) else (compile(step), compile(step))
    first = state.clone() if isinstance(state, TrainState) else {n: s.clone() for n, s in state.items()}
    states, results = [], []
    for batch in items:
        state = one(state, batch)
        states.append(state)
    folded = first
    for group in cut(items, lengths):
        folded, found = many.scan(folded, kind(group))
        results += found
    assert_same(state, folded)
    assert len(results) == len(states)
    for found, after in zip(results, states, strict=True):
        for name, flight in ({"": found} if isinstance(after, TrainState) else found).items():
            assert_same_results(flight, members(after)[name].flight)
    return many


def rows_of(monkeypatch):
    """How many steps each row had, as they are taken."""
    rows = []
    for name in ("listed", "fetched"):
        take = getattr(Row, name)

        def watched(*args, take=take):
            taken = take(*args)
            rows.append(taken.steps)
            return taken

        monkeypatch.setattr(Row, name, watched)
    return rows


ADAMW = Optimizer(torch.optim.AdamW, lr=0.01, amsgrad=True)
GROUPS = Optimizer(torch.optim.RMSprop, lr=0.01, groups=[("4.weight", {"lr": 0.02})])
FP16 = {"precision": "fp16", "loss_scale": LossScale(scale=8.0, growth_interval=2)}
# optimizer, schedule, whether it comes first in the step, model, state
CASES = {
    "plain": (None, decaying, False, {}, {}),
    "no schedule, norm, average": (None, None, False, {"norm": True}, {"ema": True}),
    "adamw, momentum cycled, dropout, fp16": (
        ADAMW,
        one_cycle(max_lr=0.05, total_steps=60),
        False,
        {"dropout": 0.4},
        FP16,
    ),
    "groups, schedule first, bf16": (
        GROUPS,
        decaying,
        True,
        {"dropout": 0.4, "norm": True},
        {"precision": "bf16"},
    ),
}


@functools.cache
def compiled_case(name):
    """A compiled step whose graphs are there for both forms of batch, and a state in the middle of training."""
    optimizer, curve, first, model, settings = CASES[name]

    def step(state, batch):
        if curve and first:
            state = schedule(state, curve)
        state = unscale_and_clip(backward_scaled(forward_loss(state, batch, objective)), max_norm=1.0)
        state = optimizer_step(state)
        if state.ema is not None:
            state = update_ema(state, decay=lambda n: min(0.9, n / 10))
        return schedule(state, curve) if curve and not first else state

    fast = compile(step)
    warm = [*batches(2), *(batches(1, 7) * 4)]
    return fast, functools.reduce(fast, warm, first_state(mlp(**model), optimizer, seed=3, **settings))


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.sampled_from(["good", "good", "good", "bad", "short"]), min_size=1, max_size=14),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    kind=st.sampled_from([list, tuple, iter]),
)
@example(["good"] * 6 + ["bad", "bad"] + ["good"] * 4, [5], iter)
@example(["good"] * 3 + ["short"] * 3 + ["bad"], [7], list)
def test_steps_in_a_row_are_single_steps(case, kinds, lengths, kind):
    """Whatever the optimizer, schedule, precision and group length; with skipped steps and other forms of batches."""
    forms = {"good": batches(len(kinds)), "short": batches(len(kinds), 7), "bad": [BAD] * len(kinds)}
    fast, state = compiled_case(case)
    both(fast, state.clone(), [forms[what][i] for i, what in enumerate(kinds)], lengths, kind)


def test_rows_are_taken_and_end_where_something_is_unusual(monkeypatch):
    """The first step is eager, the second compiles; a row ends behind a skipped step and before another form of batch."""
    rows = rows_of(monkeypatch)
    items = batches(20)
    items[7], items[12] = BAD, tuple(t[:3] for t in items[12])
    both(train_step, first_state(), items, [20])
    assert rows == [6, 4, 6]  # batches 2 to 7, 8 to 11; 12 is eager; 13 finds its graph again; 14 to 19


def test_a_group_costs_a_row_from_its_first_batch_on(monkeypatch):
    rows = rows_of(monkeypatch)
    both(train_step, first_state(), batches(14), [2, 4])
    assert rows == [4, 2, 4, 2]


def test_a_branch_ends_a_row_and_a_step_that_may_decide_otherwise_is_single(monkeypatch):
    """A phase by attempted steps, and every fourth applied one: skipped steps move the second and not the first."""
    rows = rows_of(monkeypatch)

    def step(state, batch):
        late = state.attempted_steps >= 6
        state = backward_scaled(forward_loss(state, batch, objective))
        state = optimizer_step(unscale_and_clip(state, max_norm=0.1 if late else 1.0))
        return update_ema(state, decay=0.5) if state.step % 4 == 0 else state

    items = batches(24)
    items[8] = items[15] = BAD
    both(step, first_state(ema=True), items, [24])
    assert max(rows) == 2


def test_several_states_are_taken_in_a_row(monkeypatch):
    rows = rows_of(monkeypatch)

    def step(states, batch):
        new = {name: train_step(one, batch) for name, one in states.items()}
        return new | {"b": new["b"].with_carry(None)}

    items = batches(9)
    items[5] = BAD
    both(step, {"a": first_state(), "b": first_state(mlp(norm=True), ADAMW)}, items, [9])
    assert rows == [4, 3]


def test_what_the_step_before_left_is_read_by_single_steps(monkeypatch):
    """A carry and the results of the step before are other tensors at each step: no row, and the same numbers."""
    rows = rows_of(monkeypatch)

    def step(state, batch):
        total = state.carry["total"] if state.loss is None else state.carry["total"] + state.loss
        return train_step(state.with_carry({"total": total}), batch)

    both(step, first_state(carry={"total": torch.zeros(())}), batches(6), [3])
    assert rows == []


def test_a_copying_step_leaves_every_state_whole():
    def step(state, batch):
        state = unscale_and_clip(backward_scaled(forward_loss(state, batch, objective)), max_norm=1.0)
        return optimizer_step(state, donate=False)

    fast, state = compile(step), first_state()
    state = fast.fold(state, batches(3))
    kept = {name: p.clone() for name, p in state.params.items()}
    assert fast.fold(state, batches(3)).step == 6
    require_same(dict(state.params), kept, "the state that went in stays whole")


def test_numbers_of_batches_and_of_counters_are_fed_at_each_step_of_a_row(monkeypatch):
    rows = rows_of(monkeypatch)

    def step(state, batch):
        weight = batch["weight"] + state.attempted_steps / 10

        def weighted(model, b):
            return F.cross_entropy(model(b["x"]), b["y"]) * weight, {"weight": weight}

        state = backward_scaled(forward_loss(state, batch, weighted))
        return optimizer_step(unscale_and_clip(state, max_norm=float("inf")))

    items = [{"x": x, "y": y, "weight": 0.5 * i} for i, (x, y) in enumerate(batches(7))]
    both(step, first_state(), items, [7])
    assert rows == [5]


def test_two_passes_draw_in_a_row_as_in_single_steps():
    """Several seeds in one step: the host draws for the graph, for each step with its own number."""

    def step(state, batch):
        state = accumulate(state, [batch, batch], objective)
        return optimizer_step(unscale_and_clip(state, max_norm=1.0))

    state = first_state(mlp(dropout=0.5))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    both(step, state, batches(6), [6])
    assert torch.equal(before, torch.get_rng_state())


def limited(state, batch):
    state = unscale_and_clip(backward_scaled(forward_loss(state, batch, objective)), max_norm=1.0)
    return optimizer_step(state, max_nonfinite_steps=3)


def test_too_many_steps_that_are_not_finite_end_a_row():
    fast = compile(limited)
    state = fast.fold(first_state(), batches(3))
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        fast.fold(state, [*batches(2), BAD, BAD, BAD, *batches(2)])


def test_the_state_that_went_into_a_row_is_spent_and_an_error_in_between_says_so():
    fast, items = compile(train_step), batches(9)
    state = fast.fold(first_state(), items[:3])

    def failing():
        yield from items[3:6]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        fast.fold(state, failing())
    assert not state.alive
    with pytest.raises(SpentStateError, match="this state is spent"):
        _ = state.params


def test_a_row_that_is_cut_off_in_the_middle_of_a_step_leaves_no_state(monkeypatch):
    fast, items = compile(train_step), batches(9)
    state = fast.fold(first_state(), items[:3])
    (graph,) = fast._store.all()
    run, calls = graph.run, iter(range(9))

    def interrupted(inputs):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return run(inputs)

    monkeypatch.setattr(graph, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fast.fold(state, items)
    with pytest.raises(SpentStateError, match="cut off in the middle"):
        _ = state.params


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.factor = nn.Linear(6, 4), 1.0

    def forward(self, x):
        return self.layer(x) * self.factor


def test_code_that_fetches_a_batch_may_change_what_a_step_reads():
    """A generator that changes an attribute of the model, or trains another state, is seen at the next step of a row."""
    ways = []
    for kind in ("single", "row"):
        model, items = Scaled(), batches(10)
        fast, state = compile(train_step), first_state(model)
        other = functools.reduce(fast, items[:2], state.clone())

        def fetched(model=model, items=items, fast=fast, other=other):
            for index, batch in enumerate(items):
                model.factor = 1.0 if index < 5 else 2.0
                if index == 7:
                    other = fast.fold(other, items[:3])
                with torch.autocast("cpu", enabled=index == 8):
                    yield batch
            ways.append(other)

        ways.append(
            functools.reduce(fast, fetched(), state) if kind == "single" else fast.fold(state, fetched())
        )
    assert_same(ways[1], ways[3])
    assert_same(ways[0], ways[2])


def test_another_tensor_in_the_model_is_refused_in_the_middle_of_a_row():
    model, items = mlp(), batches(8)
    fast, state = compile(train_step), first_state(model)

    def fetched():
        yield from items[:5]
        model[4].weight = nn.Parameter(torch.zeros(4, 8))
        yield items[5]

    with pytest.raises(ConfigError, match=r"4\.weight was replaced"):
        fast.fold(state, fetched())


def test_auto_folds_in_eager_what_cannot_be_compiled():
    def step(state, batch):
        state = train_step(state, batch)
        state.loss.item()
        return state

    fast, items = compile(step, mode="auto"), batches(6)
    state, results = fast.scan(first_state(), items)
    require_same(state, functools.reduce(step, items, first_state()), "auto goes on in eager")
    assert [r.loss.item() for r in results][-1] == state.loss.item()
    with pytest.raises(CompileError, match="reads a tensor"):
        compile(step).fold(first_state(), items)


def test_no_batches_leave_the_state_as_it_is():
    state = first_state()
    assert compile(train_step).fold(state, []) is state
    assert compile(train_step).scan(state, ()) == (state, [])


def test_a_checkpoint_between_two_rows_is_exact():
    """Where a fold is cut, and whether what follows are rows, changes no bit."""
    items, fast = batches(12), compile(train_step)
    whole = functools.reduce(fast, items, first_state(mlp(dropout=0.3)))
    for at in (4, 7):
        state = fast.fold(first_state(mlp(dropout=0.3)), items[:at])
        with TemporaryDirectory() as folder:
            checkpoint.save(state, Path(folder) / "half")
            loaded = checkpoint.load(Path(folder) / "half", like=first_state(mlp(dropout=0.3)))
        require_same(fast.fold(loaded, items[at:]), whole, "a resumed fold must be the whole one")
