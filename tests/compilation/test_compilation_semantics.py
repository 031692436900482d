"""A compiled step means what the step means: owners, counters, checkpoints between eager and compiled, shapes, choices."""

import functools
import warnings
from itertools import pairwise

import attrs
import pytest
import torch
import torch.nn.functional as F
from compiled_runs import (
    assert_alike,
    batches,
    decaying,
    first_state,
    folded,
    mlp,
    objective,
    run_as_it_is,
    train_step,
)
from torch import nn

from steploop import (
    LossScale,
    Optimizer,
    ReduceLROnPlateau,
    backward_scaled,
    checkpoint,
    compile,  # noqa: A004  (steploop.compile, as in torch.compile)
    constant,
    evaluate,
    forward_loss,
    one_cycle,
    optimizer_step,
    schedule,
    unscale_and_clip,
    update_ema,
)
from steploop.compilation import auto_choice as choosing
from steploop.compilation import compiled_step
from steploop.compilation import graph_calls as running
from steploop.compilation import graph_outputs as collecting
from steploop.compilation import step_trace as tracing
from steploop.errors import ConfigError, NonFiniteError, SpentStateError
from steploop.runs.layer_norms import LayerNorms


@pytest.fixture(autouse=True)
def _graphs_run_as_they_are(monkeypatch):
    run_as_it_is(monkeypatch)


def test_a_compiled_step_folds():
    given = batches(6)
    eager, compiled = first_state(), first_state(mlp())
    assert_alike(
        functools.reduce(train_step, given, eager),
        functools.reduce(compile(train_step), given, compiled),
        1e-5,
    )


def test_the_state_that_went_in_is_spent():
    step, given = compile(train_step), batches(3)
    state = folded(step, first_state(), given[:2])
    new = step(state, given[2])
    with pytest.raises(
        SpentStateError, match="this state is spent: a compiled train step at attempted step 2"
    ) as excinfo:
        step(state, given[2])
    assert "state.clone()" in str(excinfo.value)
    with pytest.raises(SpentStateError):
        _ = state.params
    assert new.alive


def test_a_clone_is_not_touched_by_what_is_done_to_the_original():
    step, given = compile(train_step), batches(6)
    state = folded(step, first_state(mlp(norm=True)), given[:3])
    kept = state.clone()
    before = {name: value.clone() for name, value in kept.params.items()}
    after = folded(step, state, given[3:])
    assert all(torch.equal(value, kept.params[name]) for name, value in before.items())
    assert_alike(after, folded(step, kept, given[3:]), 0.0)


def test_turns_of_two_states_do_not_mix():
    step, given = compile(train_step), batches(8)
    one, two = first_state(mlp(), seed=1), first_state(mlp(), seed=1)
    two = two.clone()
    for batch in given:
        one = step(one, batch)
    alone = two.clone()
    for batch in given:
        two, one = step(two, batch), step(one, batch)
    assert_alike(two, folded(step, alone, given), 0.0)


def test_a_step_that_does_not_donate_leaves_the_old_state_whole():
    def pure(state, batch):
        state = backward_scaled(forward_loss(state, batch, objective))
        return schedule(optimizer_step(unscale_and_clip(state, max_norm=1.0), donate=False), decaying)

    step, given = compile(pure), batches(6)
    eager = first_state(mlp(norm=True), Optimizer(torch.optim.Adam, lr=0.05))
    states = [eager]
    for batch in given:
        states.append(step(states[-1], batch))
    assert all(state.alive for state in states)
    assert_alike(folded(pure, eager, given), states[-1], 1e-4)
    again = step(states[3], given[3])
    assert_alike(again, states[4], 0.0)
    assert isinstance(again.params["0.weight"], torch.nn.Parameter)


def test_eager_and_compiled_steps_take_turns_on_one_state():
    """Whatever a checkpoint holds, either form goes on with it."""
    step, given = compile(train_step), batches(10)
    eager = first_state(mlp(norm=True, dropout=0.2), Optimizer(torch.optim.AdamW, lr=0.05))
    mixed = eager.clone()
    for number, batch in enumerate(given):
        eager = train_step(eager, batch)
        mixed = (step if number % 3 else train_step)(mixed, batch)
    assert_alike(eager, mixed, 1e-4)


@pytest.mark.parametrize("form", ["eager", "compiled"])
def test_a_checkpoint_of_one_form_resumes_in_the_other(form, tmp_path):
    given = batches(8)
    compiled = compile(train_step)
    first, then = (train_step, compiled) if form == "eager" else (compiled, train_step)
    start = first_state(mlp(norm=True), Optimizer(torch.optim.AdamW, lr=0.05), ema=True)
    whole = folded(train_step, start.clone(), given)
    half = folded(first, start.clone(), given[:4])
    checkpoint.save(half, tmp_path / "half")
    loaded = checkpoint.load(tmp_path / "half", like=start)
    assert_alike(whole, folded(then, loaded, given[4:]), 1e-4)


def test_the_model_and_evaluation_see_the_newest_values():
    step, given = compile(train_step), batches(6)
    state = folded(step, first_state(mlp(norm=True)), given)
    twin = folded(train_step, first_state(mlp(norm=True)), given)
    assert evaluate(state, given, objective)["loss"] == pytest.approx(
        evaluate(twin, given, objective)["loss"], rel=1e-4
    )
    assert state.model.get_parameter("0.weight") is state.params["0.weight"]
    assert not isinstance(next(state.model.buffers()), torch._subclasses.FakeTensor)


def test_an_epoch_moved_by_hand_costs_no_graph():
    step, given = compile(train_step), batches(6)
    state = first_state()
    for epoch in range(3):
        state = folded(step, state, given)
        state = attrs.evolve(state, epoch=epoch + 1, batch=0)
    assert (state.epoch, state.batch, len(step.figures.compile_s)) == (3, 0, 1)


def test_a_step_that_reads_the_epoch_is_traced_again_when_it_changes():
    def step(state, batch):
        bound = 1.0 if state.epoch < 1 else 0.01
        return optimizer_step(
            unscale_and_clip(backward_scaled(forward_loss(state, batch, objective)), max_norm=bound)
        )

    fast, given = compile(step), batches(4)
    eager = first_state()
    compiled = eager.clone()
    for epoch in range(3):
        eager = attrs.evolve(folded(step, eager, given), epoch=epoch + 1)
        compiled = attrs.evolve(folded(fast, compiled, given), epoch=epoch + 1)
    assert_alike(eager, compiled, 1e-5)
    assert len(fast.figures.compile_s) == 2  # epochs 1 and 2 are on one side of the comparison


def test_a_rate_from_the_plateau_follows_the_plateau():
    plateau = ReduceLROnPlateau(lr=0.1, patience=0, factor=0.5)

    def step(state, batch):
        state = backward_scaled(forward_loss(state, batch, objective))
        state = optimizer_step(unscale_and_clip(state, max_norm=1.0))
        return schedule(state, constant(state.plateau.learning_rate))

    fast, given = compile(step), batches(3)
    state = attrs.evolve(first_state(), plateau=plateau.init())
    rates = []
    for metric in (1.0, 2.0, 3.0, 0.5):
        state = folded(fast, state, given)
        rates.append(state.learning_rate)
        state = attrs.evolve(state, plateau=plateau.update(state.plateau, metric))
    assert rates == [0.1, 0.1, 0.05, 0.025]


def test_another_weight_decay_is_not_ignored():
    optimizer = Optimizer(torch.optim.SGD, lr=0.05, momentum=0.9)
    step, given = compile(train_step), batches(6)
    eager = first_state(mlp(), optimizer)
    compiled = eager.clone()
    for _ in range(2):
        eager, compiled = folded(train_step, eager, given), folded(step, compiled, given)
        eager = attrs.evolve(eager, hyper=tuple({**g, "weight_decay": 0.3} for g in eager.hyper))
        compiled = attrs.evolve(compiled, hyper=tuple({**g, "weight_decay": 0.3} for g in compiled.hyper))
    eager, compiled = folded(train_step, eager, given), folded(step, compiled, given)
    assert_alike(eager, compiled, 1e-5)


def test_tensors_of_the_surroundings_are_read_at_every_step():
    weights = torch.ones(4)

    def weighted(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], weight=weights)

    def step(state, batch):
        return optimizer_step(
            unscale_and_clip(backward_scaled(forward_loss(state, batch, weighted)), max_norm=1.0)
        )

    fast, given = compile(step), batches(6)
    eager = first_state()
    compiled = eager.clone()
    for batch in given:
        compiled = fast(compiled, batch)
        eager = step(eager, batch)
        weights[0] += 1.0
    assert_alike(eager, compiled, 1e-5)


def test_outputs_may_hold_the_batch_itself_and_plain_numbers():
    def with_outputs(model, batch):
        logits = model(batch["inputs"])
        loss = F.cross_entropy(logits, batch["labels"])
        return loss, {
            "labels": batch["labels"],
            "parts": [logits, loss],
            "count": len(batch["labels"]),
            "none": None,
        }

    def step(state, batch):
        return optimizer_step(
            unscale_and_clip(backward_scaled(forward_loss(state, batch, with_outputs)), max_norm=1.0)
        )

    fast = compile(step)
    given = [{"inputs": x, "labels": y, "name": "train"} for x, y in batches(3)]
    state = folded(fast, first_state(), given)
    twin = folded(step, first_state(), given)
    assert state.outputs["labels"] is given[-1]["labels"]
    assert (state.outputs["count"], state.outputs["none"]) == (10, None)
    assert torch.allclose(state.outputs["parts"][0], twin.outputs["parts"][0], atol=1e-5)
    assert torch.equal(state.outputs["parts"][1], state.loss)


def test_too_many_steps_that_are_not_finite_raise_with_the_culprit():
    def step(state, batch):
        state = unscale_and_clip(backward_scaled(forward_loss(state, batch, objective)), max_norm=1.0)
        return optimizer_step(state, max_nonfinite_steps=3)

    fast, given = compile(step), batches(4)
    state = folded(fast, first_state(), given[:2])
    bad = (given[0][0] * float("nan"), given[0][1])
    state = folded(fast, state, [bad, bad])
    with pytest.raises(
        NonFiniteError, match=r"3 steps in a row .* The first gradient that is not finite: 0\.weight"
    ):
        fast(state, bad)


# -- shapes -----------------------------------------------------------------------------------------------------


def test_a_short_last_batch_runs_in_eager_until_it_pays():
    step = compile(train_step)
    epoch = [*batches(4), *batches(1, 3)]
    eager = first_state()
    state = eager.clone()
    graphs = []
    for _ in range(6):
        state = folded(step, state, epoch)
        graphs.append(len(step.figures.compile_s))
    assert graphs == [1, 1, 2, 2, 2, 2]
    assert_alike(folded(train_step, eager, epoch * 6), state, 1e-5)


def test_a_third_shape_is_compiled_with_a_warning_that_names_it():
    step, state = compile(train_step), first_state()
    for size in (10, 7):
        state = folded(step, state, batches(4, size))
    with pytest.warns(
        UserWarning, match=r"batches of 3 shapes have come .*\(10, 6\).*\(7, 6\).*\(5, 6\).* Pad them"
    ):
        state = folded(step, state, batches(4, 5))
    assert len(step.figures.compile_s) == 3


def test_endless_shapes_end_up_in_eager():
    step, state = compile(train_step), first_state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for size in range(10, 20):
            state = folded(step, state, batches(3, size))
    assert sum("is run in eager" in str(w.message) for w in caught) == 1
    assert len(step.figures.compile_s) == 8
    assert state.applied_steps == 30


def test_a_batch_that_becomes_channels_last_is_another_graph():
    step, state = compile(train_step), first_state()
    given = batches(3)
    state = folded(step, state, given)
    turned = [(x.t().contiguous().t(), y) for x, y in given]
    eager = state.clone()
    assert_alike(folded(train_step, eager, turned), folded(step, state, turned), 1e-5)


def test_a_view_of_what_lies_otherwise_once_it_is_decomposed():
    """torch's fake GroupNorm says that its result is contiguous; its kernel and its decomposition keep channels_last."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(24, 4))
    given = [(x.reshape(-1, 1, 2, 3).to(memory_format=torch.channels_last), y) for x, y in batches(4, 16)]
    state = first_state(model, memory_format=torch.channels_last)
    eager = state.clone()
    assert_alike(folded(train_step, eager, given), folded(compile(train_step), state, given), 1e-5)


# -- mode="auto" ------------------------------------------------------------------------------------------------


def _times(monkeypatch, eager_us, compiled_us):
    monkeypatch.setattr(
        compiled_step, "measure", lambda forms, state, batch: {"eager": eager_us, "compiled": compiled_us}
    )


def test_auto_takes_the_faster_form_and_records_the_figures(monkeypatch):
    _times(monkeypatch, 200.0, 50.0)
    said = []
    step = compile(train_step, mode="auto", report=said.append)
    folded(step, first_state(), batches(4))
    assert (step.figures.form, step.figures.eager_us, step.figures.compiled_us) == ("compiled", 200.0, 50.0)
    assert step.figures.reason == "measured: 50 us a step compiled, 200 us in eager"
    assert any("compiling: " in line for line in said)
    assert said[-1] == "compiled is the faster: 50 us a step compiled, 200 us in eager"


def test_auto_goes_on_in_eager_where_that_is_faster(monkeypatch):
    _times(monkeypatch, 50.0, 200.0)
    step, given = compile(train_step, mode="auto"), batches(6)
    eager = first_state()
    state = eager.clone()
    assert_alike(folded(train_step, eager, given), folded(step, state, given), 0.0)
    assert step.figures.form == "eager"


def test_auto_says_why_a_step_cannot_be_captured_and_goes_on():
    def step(state, batch):
        state = train_step(state, batch)
        return state if state.loss.item() < 1e9 else None

    said = []
    fast, given = compile(step, mode="auto", report=said.append), batches(4)
    state = folded(fast, first_state(), given)
    assert state.applied_steps == 4
    assert fast.figures.form == "eager"
    assert "state.loss.item() < 1e9" in said[-1]


def test_measuring_disturbs_nothing():
    step, given = compile(train_step, mode="auto"), batches(8)
    eager = first_state(mlp(norm=True, dropout=0.3))
    state = eager.clone()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    state = folded(step, state, given)
    assert torch.equal(before, torch.get_rng_state())
    assert step.figures.eager_us > 0
    assert step.figures.compiled_us > 0
    assert_alike(folded(train_step, eager, given), state, 1e-5)


def test_measuring_takes_turns():
    order = []

    def form(name):
        def step(state, batch):
            order.append(name)
            return train_step(state, batch)

        return step

    took = choosing.measure(
        {"a": form("a"), "b": form("b")}, folded(train_step, first_state(), batches(1)), batches(1)[0]
    )
    assert set(took) == {"a", "b"}
    changes = sum(x != y for x, y in pairwise(order))
    assert changes >= 9


@pytest.mark.parametrize("mode", [False, "fast", None])
def test_an_unknown_mode_is_refused(mode):
    with pytest.raises(ConfigError, match="mode must be True or 'auto'"):
        compile(train_step, mode=mode)


def test_something_else_than_a_step_is_refused():
    with pytest.raises(ConfigError, match="expected a train step"):
        compile(3)


def test_layer_norms_that_are_wanted_while_tracing_are_not_found():
    given, step = batches(4), compile(train_step)
    state = folded(step, first_state(), given[:1])
    with LayerNorms(state) as norms:
        norms.request()
        state = folded(step, state, given)
        assert norms.read() == {}
    assert state.applied_steps == 5


# -- a device's path, walked on the CPU ---------------------------------------------------------------------------


def test_where_reading_costs_a_wait_the_graph_counts_and_scales_and_nothing_is_read(monkeypatch):
    """Counters, loss scale and rates stay tensors from step to step; settled, they are eager's."""
    for module in (collecting, running, tracing):
        monkeypatch.setattr(module, "counted_on_host", lambda _: False)
    scale = LossScale(scale=2.0**10, growth_interval=3)
    rate = one_cycle(0.1, total_steps=40)
    optimizer = Optimizer(torch.optim.AdamW, lr=0.1)

    def step(state, batch):
        state = backward_scaled(forward_loss(state, batch, objective))
        state = optimizer_step(unscale_and_clip(state, max_norm=1.0))
        return schedule(update_ema(state, decay=0.9), rate)

    eager = schedule(
        first_state(mlp(norm=True), optimizer, precision="fp16", loss_scale=scale, ema=True), rate
    )
    compiled, fast, given = eager.clone(), compile(step), batches(12)
    for bad in (2, 5, 6):
        given[bad] = (given[bad][0] * 1e30, given[bad][1])
    for number, batch in enumerate(given):
        eager, compiled = step(eager, batch), fast(compiled, batch)
        if number > 1:
            assert isinstance(compiled.applied_steps, torch.Tensor)
            assert isinstance(compiled.scale.scale, torch.Tensor)
            assert isinstance(compiled.finite, torch.Tensor)
            assert isinstance(compiled.hyper[0]["lr"], torch.Tensor)
    settled = compiled.settle()
    assert float(settled.hyper[0]["lr"]) == pytest.approx(eager.learning_rate, rel=1e-5)
    assert (settled.applied_steps, settled.attempted_steps) == (9, 12)
    assert_alike(eager, settled.replace(hyper=eager.hyper), 3e-2)
