"""What a step decides by counters and numbers of the host: a graph for each branch, and eager's results in each."""

import attrs
import pytest
import torch
import torch.nn.functional as F
from compiled_runs import assert_alike, batches, first_state, folded, mlp, objective, run_as_it_is
from torch import nn

from steploop import (
    LossScale,
    Optimizer,
    TrainState,
    backward_scaled,
    compile,  # noqa: A004  (steploop.compile, as in torch.compile)
    forward_loss,
    optimizer_step,
    schedule,
    unscale_and_clip,
    update_ema,
)
from steploop.errors import CompileError


@pytest.fixture(autouse=True)
def _graphs_run_as_they_are(monkeypatch):
    run_as_it_is(monkeypatch)


def plain(state, batch, use=objective):
    return optimizer_step(unscale_and_clip(backward_scaled(forward_loss(state, batch, use)), max_norm=1.0))


def both(step, state, given, tolerance=1e-5):
    """Eager and compiled fold from one state; the compiled step."""
    fast, compiled = compile(step), state.clone()
    assert_alike(folded(step, state, given), folded(fast, compiled, given), tolerance)
    return fast


def graphs(fast):
    return len(fast.figures.compile_s)


BAD = (torch.full((10, 6), float("nan")), torch.zeros(10, dtype=torch.int64))


def with_skips(count, at):
    given = batches(count)
    for index in at:
        given[index] = BAD
    return given


@pytest.mark.parametrize("at", [(), (3,), (4, 5), (0, 1, 7)])
def test_every_third_step_is_a_branch_of_its_own_and_skipped_steps_do_not_count(at):
    """After optimizer_step the number of steps taken depends on this one: where it decides, a skip is repeated in eager."""

    def step(state, batch):
        state = plain(state, batch)
        return update_ema(state, decay=0.5) if state.step % 3 == 0 else state

    fast = both(step, first_state(mlp(norm=True), ema=True), with_skips(12, at))
    assert graphs(fast) == 2


def test_weights_are_bounded_in_branches_that_a_skipped_step_takes_too():
    """What comes after the optimizer works on a skipped step as in eager, whichever branch it takes."""

    def step(state, batch):
        state = plain(state, batch)
        with torch.no_grad():
            factor = 0.5 if state.step % 2 else 0.25
        return state.with_carry({"total": state.carry["total"] + factor})

    state = first_state(carry={"total": torch.zeros(())})
    fast, compiled, given = compile(step), state.clone(), with_skips(9, (2, 5))
    for batch in given:
        state, compiled = step(state, batch), fast(compiled, batch)
        assert torch.equal(state.carry["total"], compiled.carry["total"])
    assert_alike(state, compiled, 1e-5)


def test_a_phase_after_n_steps_freezes_by_a_loss_of_its_own():
    def late(model, batch):
        return F.cross_entropy(model(batch[0]).detach() + model[4].bias, batch[1])

    def step(state, batch):
        return plain(state, batch, objective if state.attempted_steps < 4 else late)

    assert graphs(both(step, first_state(), batches(9))) == 2


def test_a_number_of_the_step_is_fed_to_the_arithmetic():
    """A warmup of a weight of the loss: fed while it grows, a constant afterwards."""

    def step(state, batch):
        weight = min(1.0, state.step / 5)

        def weighted(model, b):
            loss = F.cross_entropy(model(b[0]), b[1])
            return loss + weight * model[0].weight.square().sum() * (1 + state.epoch), {"weight": weight}

        return plain(state, batch, weighted)

    fast, state = compile(step), first_state()
    compiled, weights = state.clone(), []
    for number, batch in enumerate(batches(9)):
        state, compiled = step(state, batch), fast(compiled, batch)
        weights.append(compiled.outputs["weight"])
        assert compiled.outputs == state.outputs
        if number == 6:
            state, compiled = (attrs.evolve(s, epoch=3) for s in (state, compiled))
    assert_alike(state, compiled, 1e-5)
    assert weights == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0]
    assert graphs(fast) == 2


def test_a_number_after_the_optimizer_is_the_one_that_the_step_left():
    def step(state, batch):
        state = plain(state, batch)
        return state.with_carry({"h": state.carry["h"] + torch.ones(2) * state.step - state.nonfinite_steps})

    state = first_state(carry={"h": torch.zeros(2)})
    fast, compiled = compile(step), state.clone()
    for batch in with_skips(8, (2, 5, 6)):
        state, compiled = step(state, batch), fast(compiled, batch)
        assert torch.equal(state.carry["h"], compiled.carry["h"])


@pytest.mark.parametrize("read", ["if", "is", "loss"])
def test_finite_is_a_bool_to_the_step_as_in_eager(read):
    def step(state, batch):
        state = plain(state, batch)
        if read == "if":
            return (
                update_ema(state, decay=0.5)
                if state.finite
                else state.with_carry({"bad": state.carry["bad"] + 1})
            )
        if read == "is":
            return state if state.finite is True else state.with_carry({"bad": state.carry["bad"] + 1})
        return state.with_carry({"bad": state.carry["bad"] + (not state.finite)})

    state = first_state(ema=True, carry={"bad": torch.zeros(())})
    fast, compiled = compile(step), state.clone()
    for batch in with_skips(7, (2, 3, 5)):
        state, compiled = step(state, batch), fast(compiled, batch)
        assert float(state.carry["bad"]) == float(compiled.carry["bad"])
    assert_alike(state, compiled, 1e-5)


def test_a_table_by_the_step_costs_a_graph_for_each_entry():
    bounds = [1.0, 0.1, 0.01]

    def step(state, batch):
        state = backward_scaled(forward_loss(state, batch, objective))
        return optimizer_step(unscale_and_clip(state, max_norm=bounds[state.attempted_steps % 3]))

    assert graphs(both(step, first_state(), batches(10))) == 3


def test_a_value_that_never_comes_back_runs_in_eager_in_the_end_and_says_so():
    def step(state, batch):
        state = backward_scaled(forward_loss(state, batch, objective))
        return optimizer_step(unscale_and_clip(state, max_norm=0.1 + float(state.epoch)))

    fast, state = compile(step), first_state()
    compiled, given = state.clone(), batches(2)

    def epochs(one, state):
        for epoch in range(11):
            state = attrs.evolve(folded(one, state, given), epoch=epoch + 1)
        return state

    with pytest.warns(
        UserWarning, match=r"8 graphs were made .* \(state\.epoch\); the next ones run in eager"
    ):
        compiled = epochs(fast, compiled)
    state = epochs(step, state)
    assert graphs(fast) == 8
    assert_alike(state, compiled, 1e-5)


def test_rates_are_plain_numbers_to_the_step_and_noted():
    def step(state, batch):
        rate = state.hyper[0]["lr"]
        assert isinstance(rate, float)
        bound = 1.0 if rate > 0.01 else 0.01

        def pulled(model, b):
            return F.cross_entropy(model(b[0]), b[1]) + state.learning_rate * model[0].weight.square().sum()

        state = backward_scaled(forward_loss(state, batch, pulled))
        state = optimizer_step(unscale_and_clip(state, max_norm=bound))
        return schedule(state, lambda n: 0.05 if n < 5 else 0.005)

    state = schedule(first_state(), lambda n: 0.05)
    assert graphs(both(step, state, batches(9))) == 2


def test_numbers_of_a_batch_are_inputs_and_decide_by_branches():
    def weighted(model, batch):
        loss = F.cross_entropy(model(batch["x"]), batch["y"])
        weight = batch["weight"]
        return loss * weight if weight > 0.5 else loss + model[0].bias.square().sum() * batch["count"]

    def step(state, batch):
        return plain(state, batch, weighted)

    given = [
        {"x": x, "y": y, "weight": 0.1 * i + 0.01, "count": i, "name": "train"}
        for i, (x, y) in enumerate(batches(10))
    ]
    assert graphs(both(step, first_state(), given)) == 2


def test_a_number_of_a_batch_where_torch_takes_plain_numbers_only_is_built_in():
    def dropped(model, batch):
        return F.cross_entropy(F.dropout(model(batch[0]), batch[2]), batch[1])

    def step(state, batch):
        return plain(state, batch, dropped)

    given = [(x, y, (0.1, 0.5)[i % 2]) for i, (x, y) in enumerate(batches(8))]
    assert graphs(both(step, first_state(), given)) == 2


def test_zero_and_minus_zero_are_two_numbers():
    def signed(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1]) + torch.atan2(
            batch[2] * model[0].bias.sum().exp(), -model[0].bias.exp().sum()
        )

    def step(state, batch):
        return plain(state, batch, signed)

    both(step, first_state(), [(x, y, (0.0, -0.0)[i % 2]) for i, (x, y) in enumerate(batches(6))])


def test_results_of_the_step_before_are_inputs():
    """Loss, outputs, norms and finite of the step before, in the arithmetic of this one."""

    def step(state, batch):
        before = state

        def pulled(model, b):
            logits = model(b[0])
            loss = F.cross_entropy(logits, b[1])
            if before.outputs is not None:
                loss = loss + 0.1 * (logits - before.outputs["logits"]).square().mean() * before.loss
                loss = loss + before.clipped_norm * 0.01 + before.outputs["count"] * 0.001 * before.grad_norm
                if not before.finite:
                    loss = loss * 2
            return loss, {"logits": logits, "count": 3.0 + state.attempted_steps}

        return plain(state, batch, pulled)

    both(step, first_state(), with_skips(9, (4,))[:4] + batches(5))


def test_two_states_count_apart():
    """Three steps of one network for each of the other, as in WGAN."""

    def step(states, batch):
        one = plain(states["critic"], batch)
        two = plain(states["actor"], batch) if one.step % 3 == 0 else states["actor"]
        return {"critic": one, "actor": two}

    eager = {
        "critic": first_state(mlp(), seed=1),
        "actor": first_state(mlp(), Optimizer(torch.optim.Adam, lr=0.01), seed=2),
    }
    eager = {name: plain(s, batches(1)[0]) for name, s in eager.items()}
    fast, compiled = compile(step), {name: s.clone() for name, s in eager.items()}
    for batch in with_skips(10, (3, 7)):
        eager, compiled = step(eager, batch), fast(compiled, batch)
    for name in eager:
        assert_alike(eager[name], compiled[name], 1e-4)
    assert eager["actor"].step == 1 + 3


def test_a_first_step_that_is_skipped_is_followed_as_in_eager():
    scale = LossScale(scale=2.0**40)
    eager = first_state(mlp(), Optimizer(torch.optim.AdamW, lr=0.01), precision="fp16", loss_scale=scale)
    fast, compiled = compile(plain), eager.clone()
    for batch in batches(4) * 8:
        eager, compiled = plain(eager, batch), fast(compiled, batch)
        assert eager.scale == compiled.scale
    assert eager.step == compiled.step > 0


def test_heads_that_are_used_later_get_their_slots_then():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Linear(6, 4), nn.Linear(6, 4)

    def step(state, batch):
        second = state.attempted_steps >= 3

        def one_or_both(model, b):
            return F.cross_entropy(model.one(b[0]) + (model.two(b[0]) if second else 0), b[1])

        return plain(state, batch, one_or_both)

    state = TrainState.create(Two(), Optimizer(torch.optim.Adam, lr=0.01))
    both(step, state, batches(8), 1e-4)


def test_the_count_is_kept_by_the_optimizer_step():
    def step(state, batch):
        return attrs.evolve(plain(state, batch), epoch=state.epoch + 1)

    state = folded(plain, first_state(), batches(1))
    fast = compile(step)
    for epoch in range(3):
        state = fast(state, batches(1)[0])
        assert state.epoch == epoch + 1
    with pytest.raises(CompileError, match="set batch to"):
        compile(lambda s, b: attrs.evolve(plain(s, b), batch=0))(state, batches(1)[0])
