"""A compiled step gives what eager gives, to a stated tolerance: optimizers, precisions, clips, averages, layers.

The graphs run here as they were captured; ``test_compilation_inductor`` compiles some of them.
"""

import math

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
    Rates,
    TrainState,
    accumulate,
    backward_scaled,
    compile,  # noqa: A004  (steploop.compile, as in torch.compile)
    forward_loss,
    optimizer_step,
    schedule,
    unscale_and_clip,
    update_ema,
)


@pytest.fixture(autouse=True)
def _graphs_run_as_they_are(monkeypatch):
    run_as_it_is(monkeypatch)


# Relative to the largest entry of each tensor, after 100 steps. The bias corrections of Adam and its kin are computed
# in float32 tensors instead of Python's float64; RAdam's cancel most. Muon orthogonalizes in bfloat16.
TOLERANCES = {
    "SGD": 1e-5, "Adam": 1e-4, "AdamW": 1e-4, "Adamax": 1e-5, "NAdam": 1e-4, "RAdam": 5e-3, "RMSprop": 1e-4,
    "Rprop": 1e-5, "ASGD": 1e-5, "Adagrad": 1e-5, "Adadelta": 1e-5, "Muon": 1e-1,
}  # fmt: skip
SETTINGS = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "AdamW": {"amsgrad": True},
    "RMSprop": {"momentum": 0.5},
}


@pytest.mark.parametrize("name", list(TOLERANCES))
def test_100_steps_of_every_traceable_optimizer_agree_with_eager(name):
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=name != "Muon"))
    optimizer = Optimizer(getattr(torch.optim, name), lr=0.05, weight_decay=0.01, **SETTINGS.get(name, {}))
    if name == "Rprop":
        optimizer = Optimizer(torch.optim.Rprop, lr=0.05)
    eager = first_state(model, optimizer)
    compiled = eager.clone()
    step = compile(train_step)
    given = batches(5) * 20
    assert_alike(folded(train_step, eager, given), folded(step, compiled, given), TOLERANCES[name])
    assert step.figures.form == "compiled"
    assert len(step.figures.compile_s) == 1


def test_groups_keep_their_own_rates_and_decays():
    optimizer = Optimizer(
        torch.optim.AdamW, lr=0.05, weight_decay=0.1, no_decay=True, groups=[("4.*", {"lr": 0.01})]
    )
    eager = first_state(mlp(), optimizer)
    compiled, given = eager.clone(), batches(12)
    assert_alike(folded(train_step, eager, given), folded(compile(train_step), compiled, given), 1e-4)


@pytest.mark.parametrize(
    "bound", [{"max_norm": 0.3}, {"max_value": 0.01}, {"adaptive": 0.05}, {"max_norm": math.inf}]
)
def test_every_way_of_clipping_agrees_with_eager(bound):
    def step(state, batch):
        state = backward_scaled(forward_loss(state, batch, objective))
        return optimizer_step(unscale_and_clip(state, **bound))

    eager = first_state()
    compiled, given = eager.clone(), batches(10)
    a, b = folded(step, eager, given), folded(compile(step), compiled, given)
    assert_alike(a, b, 1e-5)
    assert float(b.grad_norm) == pytest.approx(float(a.grad_norm), rel=1e-4)
    assert float(b.clipped_norm) == pytest.approx(float(a.clipped_norm), rel=1e-4)
    assert torch.allclose(a.outputs["logits"], b.outputs["logits"], atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_batch_norm_and_dropout_agree_with_eager_in_every_precision(precision):
    """The masks are eager's own: the same generator, seeded from (seed, attempted step)."""
    eager = first_state(mlp(dropout=0.5, norm=True), seed=3, precision=precision)
    compiled, given = eager.clone(), batches(10)
    a, b = folded(train_step, eager, given), folded(compile(train_step), compiled, given)
    assert_alike(a, b, 2e-2 if precision != "fp32" else 1e-5)
    assert int(b.buffers["1.num_batches_tracked"]) == b.applied_steps > 8


def test_a_seed_decides_the_masks_and_the_callers_generator_does_not():
    state = first_state(mlp(dropout=0.5), seed=3)
    step, (batch, other) = compile(train_step), batches(2)
    state = step(state, batch)
    torch.manual_seed(77)
    first = step(state.clone(), other).loss
    before = torch.get_rng_state()
    torch.manual_seed(78)
    second = step(state.clone(), other).loss
    assert first == second
    torch.manual_seed(77)
    assert torch.equal(before, torch.get_rng_state())
    assert step(state.clone().replace(seed=4), other).loss != first


def test_fp16_skips_the_steps_that_eager_skips_and_keeps_the_same_scale():
    def blown(batch):
        return batch[0] * 1e30, batch[1]

    given = batches(12)
    for bad in (1, 4, 5, 9):
        given[bad] = blown(given[bad])
    scale = LossScale(scale=2.0**10, growth_interval=3)
    eager = first_state(
        mlp(norm=True), Optimizer(torch.optim.AdamW, lr=0.05), precision="fp16", loss_scale=scale
    )
    compiled, step = eager.clone(), compile(train_step)
    pattern = []
    for batch in given:
        eager, compiled = train_step(eager, batch), step(compiled, batch)
        pattern.append((eager.finite, compiled.finite, eager.scale == compiled.scale))
        assert eager.hyper == compiled.hyper
    assert [finite for finite, _, _ in pattern].count(False) == 4
    assert all(a is b and same for a, b, same in pattern)
    assert_alike(eager, compiled, 2e-2)
    assert all(t.isfinite().all() for t in compiled.buffers.values())


def test_a_skipped_step_changes_no_bit_but_the_counters():
    state, step = first_state(mlp(norm=True), Optimizer(torch.optim.Adam, lr=0.05)), compile(train_step)
    given = batches(3)
    state = folded(step, state, given)
    before = state.clone()
    after = step(state, (given[0][0] * float("nan"), given[0][1]))
    assert after.finite is False
    assert (after.applied_steps, after.attempted_steps, after.nonfinite_steps, after.batch) == (3, 4, 1, 4)
    for name, value in before.params.items():
        assert torch.equal(value, after.params[name])
        assert all(torch.equal(v, after.slots[name][k]) for k, v in before.slots[name].items())
    for name, value in before.buffers.items():
        assert torch.equal(value, after.buffers[name])


def test_accumulated_micro_batches_agree_with_eager():
    def step(state, parts):
        state = accumulate(state, parts, objective)
        return schedule(optimizer_step(unscale_and_clip(state, max_norm=1.0)), decaying)

    given = batches(6) + batches(6, 7)
    windows = [(given[i], given[i + 6]) for i in range(6)]  # ragged: 10 and 7 samples
    eager = first_state()
    compiled = eager.clone()
    assert_alike(folded(step, eager, windows), folded(compile(step), compiled, windows), 1e-5)


def test_weights_of_the_objective_agree_with_eager():
    def weighted(model, batch):
        inputs, labels = batch
        kept = (labels > 0).float()
        losses = F.cross_entropy(model(inputs), labels, reduction="none")
        return (losses * kept).sum() / kept.sum(), None, kept.sum()

    def step(state, parts):
        return optimizer_step(unscale_and_clip(accumulate(state, parts, weighted), max_norm=1.0))

    given = batches(8)
    windows = [tuple(given[i : i + 2]) for i in range(0, 8, 2)]
    eager = first_state()
    compiled = eager.clone()
    assert_alike(folded(step, eager, windows), folded(compile(step), compiled, windows), 1e-5)


@pytest.mark.parametrize("decay", [0.9, lambda step: min(0.99, (1 + step) / (10 + step))])
def test_averaged_weights_agree_with_eager_with_a_decay_that_warms_up_too(decay):
    def step(state, batch):
        return update_ema(train_step(state, batch), decay=decay)

    given = batches(10)
    given[5] = (given[5][0] * float("inf"), given[5][1])  # a skipped step does not move the average
    eager = first_state(ema=True)
    compiled = eager.clone()
    assert_alike(folded(step, eager, given), folded(compile(step), compiled, given), 1e-5)


@pytest.mark.parametrize(
    "optimizer",
    [Optimizer(torch.optim.SGD, lr=0.05, momentum=0.9), Optimizer(torch.optim.AdamW, lr=0.05)],
    ids=["momentum", "betas"],
)
def test_a_schedule_that_cycles_the_momentum_costs_one_graph(optimizer):
    def rates(step):
        return Rates(0.05 / (1 + step), 0.85 + 0.01 * (step % 10))

    def step(state, batch):
        state = backward_scaled(forward_loss(state, batch, objective))
        return schedule(optimizer_step(unscale_and_clip(state, max_norm=1.0)), rates)

    eager = schedule(first_state(mlp(), optimizer), rates)
    compiled, given, fast = eager.clone(), batches(12), compile(step)
    assert_alike(folded(step, eager, given), folded(fast, compiled, given), 1e-4)
    assert len(fast.figures.compile_s) == 1


def test_a_schedule_at_the_beginning_of_a_step_sets_the_rate_of_this_one():
    def step(state, batch):
        state = forward_loss(schedule(state, decaying), batch, objective)
        return optimizer_step(unscale_and_clip(backward_scaled(state), max_norm=1.0))

    eager = TrainState.create(mlp(), Optimizer(torch.optim.SGD, lr=9.0))
    compiled, given = eager.clone(), batches(8)
    assert_alike(folded(step, eager, given), folded(compile(step), compiled, given), 1e-5)


def test_two_states_train_in_one_graph():
    """A generator and a discriminator, say: each state keeps its own counts, rates and buffers."""

    def step(states, batch):
        left = train_step(states["left"], batch)
        right = train_step(states["right"], (left.outputs["logits"].repeat(1, 2)[:, :6], batch[1]))
        return {"left": left, "right": right}

    eager = {
        "left": first_state(mlp(norm=True)),
        "right": first_state(mlp(), Optimizer(torch.optim.Adam, lr=0.05)),
    }
    compiled = {name: one.clone() for name, one in eager.items()}
    given = batches(8)
    a, b = folded(step, eager, given), folded(compile(step), compiled, given)
    for name in a:
        assert_alike(a[name], b[name], 1e-4)


def test_float64_models_keep_their_precision():
    eager = first_state(mlp().double(), Optimizer(torch.optim.SGD, lr=0.05, momentum=0.9))
    compiled = eager.clone()
    given = [(x.double(), y) for x, y in batches(20)]
    assert_alike(folded(train_step, eager, given), folded(compile(train_step), compiled, given), 1e-12)


def test_an_optimizer_that_replaces_its_slots_agrees_with_eager():
    class Replacing(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    before = self.state[p].get("mean", torch.zeros_like(p))
                    self.state[p]["mean"] = 0.9 * before + p.grad
                    p.sub_(self.state[p]["mean"], alpha=group["lr"])

    eager = first_state(mlp(), Optimizer(Replacing, lr=0.05))
    compiled, given = eager.clone(), batches(10)
    a, b = folded(train_step, eager, given), folded(compile(train_step), compiled, given)
    assert_alike(a, b, 1e-5)
    assert float(b.slots["0.weight"]["mean"].abs().max()) > 0
