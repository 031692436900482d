"""The path of a GPU, walked on the CPU: nothing decided on the host, counters and rates as tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steploop.core.steps.clip
import steploop.core.steps.clipping
import steploop.core.steps.set_rates
from steploop import (
    LossScale,
    Optimizer,
    TrainState,
    backward_scaled,
    cosine_annealing,
    forward_loss,
    one_cycle,
    optimizer_step,
    schedule,
    unscale_and_clip,
    update_ema,
)
from steploop.core.trees import first_difference

STEPS = 40
OVERFLOWS = (5, 6, 20)


@pytest.fixture
def unreadable(monkeypatch):
    """As if reading a tensor made the host wait: every decision has to be left to the device."""
    for module in (steploop.core.steps.clipping, steploop.core.steps.clip):
        monkeypatch.setattr(module, "on_host", lambda _: False)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def batches():
    generator = torch.Generator().manual_seed(1)
    data = []
    for index in range(STEPS):
        inputs = torch.randn(8, 6, generator=generator) * (float("inf") if index in OVERFLOWS else 1.0)
        data.append((inputs, torch.randint(3, (8,), generator=generator)))
    return data


def objective(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def run(rate, *, precision="fp16", fused=True, limit=STEPS):
    optimizer = Optimizer(torch.optim.AdamW, lr=0.01, fused=fused)
    scale = LossScale(scale=2.0**18, growth_interval=7) if precision == "fp16" else None
    state = TrainState.create(network(), optimizer, precision=precision, loss_scale=scale, ema=True)
    state = schedule(state, rate)
    for batch in batches()[:limit]:
        state = unscale_and_clip(backward_scaled(forward_loss(state, batch, objective)), max_norm=0.5)
        state = schedule(update_ema(optimizer_step(state), decay=0.9), rate)
    return state


def one_step(state, batch):
    return optimizer_step(
        unscale_and_clip(backward_scaled(forward_loss(state, batch, objective)), max_norm=0.5)
    )


def values(state):
    return {
        "params": dict(state.params),
        "buffers": dict(state.buffers),
        "slots": dict(state.slots),
        "ema": dict(state.ema),
    }


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_the_device_decides_is_what_the_host_decides(unreadable, monkeypatch, precision):
    """Parameters, slots, buffers, averages, scale and counts, with steps skipped on the way."""
    # a constant rate that float32 holds exactly, so that the two forms can agree to the bit
    rate = lambda _: 2.0**-7  # noqa: E731
    device = run(rate, precision=precision)
    assert isinstance(device.applied_steps, Tensor)
    assert isinstance(device.finite, Tensor)
    device = device.settle()
    monkeypatch.undo()
    host = run(rate, precision=precision)
    assert isinstance(host.applied_steps, int)
    assert first_difference(values(device), values(host)) is None
    assert device.scale == host.scale
    assert (device.applied_steps, device.attempted_steps) == (host.applied_steps, STEPS)
    assert host.applied_steps < STEPS


def test_counts_of_steps_in_a_row_that_are_not_finite_live_on_the_device(unreadable):
    assert run(lambda _: 0.01, limit=7).settle().nonfinite_steps == 2
    assert run(lambda _: 0.01, limit=8).settle().nonfinite_steps == 0


@pytest.mark.parametrize(
    "rate", [cosine_annealing(0.1, total_steps=30), one_cycle(0.1, total_steps=30, momentum=(0.8, 0.9))]
)
def test_a_rate_is_looked_up_by_the_count_on_the_device_and_the_table_moves_on(unreadable, monkeypatch, rate):
    monkeypatch.setattr(steploop.core.steps.set_rates, "_TABLE_STEPS", 6)
    device = run(rate)
    monkeypatch.undo()
    host = run(rate)
    assert device.learning_rate == pytest.approx(host.learning_rate, rel=1e-6)
    assert float(device.hyper[0]["betas"][0]) == pytest.approx(host.hyper[0]["betas"][0], rel=1e-6)
    for name, param in host.params.items():
        torch.testing.assert_close(device.params[name], param, rtol=1e-4, atol=1e-6)


def test_an_optimizer_that_cannot_skip_by_itself_is_decided_by_one_read(unreadable):
    state = run(lambda _: 2.0**-7, fused=False)
    assert isinstance(state.applied_steps, int)
    assert 0 < state.applied_steps < STEPS


@pytest.mark.parametrize(
    ("torch_class", "settings"),
    [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {"amsgrad": True})],
)
def test_a_first_step_that_is_skipped_leaves_no_trace_in_the_slots(unreadable, torch_class, settings):
    """Found by 10,000 examples: torch's fused SGD makes its momentum of memory that nobody wrote, and skips."""
    first = TrainState.create(network(), Optimizer(torch_class, lr=0.01, fused=True, **settings))
    good = batches()[0]
    bad = (good[0] * float("inf"), good[1])
    torch.use_deterministic_algorithms(mode=True)  # such memory is filled with nan
    try:
        straight = one_step(first.clone(), good)
        skipped = one_step(first, bad)
        assert skipped.settle().step == 0
        assert all((slot == 0).all() for slots in skipped.slots.values() for slot in slots.values())
        found = one_step(skipped, good)
    finally:
        torch.use_deterministic_algorithms(mode=False)
    assert first_difference(dict(found.params), dict(straight.params)) is None
    assert first_difference(dict(found.slots), dict(straight.slots)) is None
