"""Averages of weights: complex ones, buffers, every k-th step, equal weights; against torch's AveragedModel."""

import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    checkpoint,
    evaluate,
    forward_loss,
    optimizer_step,
    unscale_and_clip,
    update_ema,
)
from steploop.core.trees import first_difference

SGD = Optimizer(torch.optim.SGD, lr=0.2, momentum=0.9)


def batches(count=7):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(6, 3, generator=generator) for _ in range(count)]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


def square(model, batch):
    return model(batch).abs().square().mean()


def step(state, batch, objective=square):
    return optimizer_step(
        unscale_and_clip(backward_scaled(forward_loss(state, batch, objective)), max_norm=math.inf)
    )


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.v = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.register_buffer("phase", torch.ones(1, dtype=torch.complex64))

    def forward(self, x):
        with torch.no_grad():
            self.phase.mul_(1j)
        return x * self.w * self.phase + self.v


@pytest.mark.parametrize("make", [network, Complex])
@pytest.mark.parametrize("buffers", [False, True])
def test_an_average_is_its_formula_for_every_kind_of_tensor(make, buffers):
    """a <- d a + (1 - d) w, in the precision of each tensor; of integers the newest."""
    state = TrainState.create(make(), SGD, ema=True, ema_buffers=buffers)
    names = [*state.params, *(state.buffers if buffers else ())]
    expected = {n: t.detach().clone() for n, t in {**state.params, **state.buffers}.items() if n in names}
    for batch in batches():
        state = update_ema(step(state, batch), decay=0.75)
        new = {**state.params, **state.buffers}
        for name in names:
            value = new[name].detach()
            if value.is_floating_point() or value.is_complex():
                expected[name] = expected[name] + 0.25 * (value - expected[name])
            else:
                expected[name] = value.clone()
    assert list(state.ema) == names
    for name in names:
        assert state.ema[name].dtype == expected[name].dtype
        torch.testing.assert_close(state.ema[name], expected[name], rtol=1e-5, atol=1e-6)


def test_averaged_buffers_are_those_of_torchs_averaged_model(tmp_path):
    """Whose buffers are averaged too with use_buffers; the evaluation uses them, and a checkpoint holds them."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True)
    averaged.update_parameters(model)  # torch's first update is a copy; ours begins with one
    state = TrainState.create(network(), SGD, ema_buffers=True)
    for batch in batches():
        model.train()
        optimizer.zero_grad()
        square(model, batch).backward()
        optimizer.step()
        averaged.update_parameters(model)
        state = update_ema(step(state, batch), decay=0.75)
    theirs = dict(averaged.module.state_dict())
    counted = (
        "1.num_batches_tracked"  # an integer, whose average torch rounds and of which ours has the newest
    )
    assert state.ema[counted] == 7
    ours = {name: a for name, a in state.ema.items() if name != counted}
    assert first_difference(ours, {name: theirs[name] for name in ours}) is None
    averaged.eval()
    with torch.no_grad():
        expected = square(averaged, batches()[0]).item()
    assert evaluate(state, batches(1), square, use_ema=True)["loss"] == pytest.approx(expected, rel=1e-6)
    checkpoint.save(state, tmp_path / "a")
    loaded = checkpoint.load(tmp_path / "a", like=TrainState.create(network(), SGD, ema_buffers=True))
    assert first_difference(dict(loaded.ema), dict(state.ema)) is None


def test_without_averaged_buffers_an_evaluation_of_the_average_uses_the_states_own():
    state = TrainState.create(network(), SGD, ema=True)
    for batch in batches():
        state = update_ema(step(state, batch), decay=0.75)
    model = network()
    model.load_state_dict({**state.ema, **state.buffers})
    model.eval()
    with torch.no_grad():
        expected = square(model, batches()[0]).item()
    assert evaluate(state, batches(1), square, use_ema=True)["loss"] == pytest.approx(expected, rel=1e-6)


def test_a_decay_of_1_leaves_the_average_and_the_state_alone():
    state = step(TrainState.create(network(), SGD, ema=True), batches()[0])
    assert update_ema(state, decay=1.0) is state
    assert update_ema(state, decay=lambda t: 1) is state
    assert state.alive


def test_a_decay_of_0_makes_the_average_the_weights():
    state = update_ema(step(TrainState.create(network(), SGD, ema=True), batches()[0]), decay=0)
    assert first_difference(dict(state.ema), {n: p.detach() for n, p in state.params.items()}) is None


def test_every_kth_step_is_a_function_of_the_step():
    state = TrainState.create(network(), SGD, ema=True)
    average = {n: p.detach().clone() for n, p in state.params.items()}
    for number, batch in enumerate(batches(), start=1):
        state = update_ema(step(state, batch), decay=lambda t: 0.5 if t % 3 == 0 else 1.0)
        if number % 3 == 0:
            average = {n: torch.lerp(a, state.params[n].detach(), 0.5) for n, a in average.items()}
    assert first_difference(dict(state.ema), average) is None


def test_an_average_of_equal_weights_is_torchs_swa():
    """From step s on, each state counts as much as the others."""
    begin = 3
    state = TrainState.create(network(), SGD, ema=True)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    averaged = AveragedModel(model)
    for number, batch in enumerate(batches(), start=1):
        model.train()
        optimizer.zero_grad()
        square(model, batch).backward()
        optimizer.step()
        if number >= begin:
            averaged.update_parameters(model)
        state = update_ema(
            step(state, batch), decay=lambda t: (t - begin) / (t - begin + 1) if t >= begin else 0.0
        )
    for name, value in averaged.module.named_parameters():
        torch.testing.assert_close(state.ema[name], value.detach(), rtol=1e-5, atol=1e-6)


def explosive(model, batch):
    return square(model, batch) * math.inf


@pytest.mark.parametrize("on_device", [False, True])
def test_a_skipped_step_moves_no_average(on_device):
    fused = {"fused": True} if on_device else {}
    state = TrainState.create(network(), Optimizer(torch.optim.SGD, lr=0.2, **fused), ema_buffers=True)
    state = update_ema(step(state, batches()[0]), decay=0.5)
    before = {n: a.clone() for n, a in state.ema.items()}
    state = unscale_and_clip(backward_scaled(forward_loss(state, batches()[1], explosive)), max_norm=math.inf)
    if on_device:
        state = state.replace(flight=state.flight.replace(finite=torch.zeros(()) > 0))
    state = update_ema(optimizer_step(state), decay=0.5).settle()
    assert state.finite is False
    assert first_difference(dict(state.ema), before) is None


def test_the_average_of_a_state_that_is_left_whole_is_left_whole():
    state = update_ema(step(TrainState.create(network(), SGD, ema=True), batches()[0]), decay=0.5)
    before = {n: a.clone() for n, a in state.ema.items()}
    ready = unscale_and_clip(backward_scaled(forward_loss(state, batches()[1], square)), max_norm=math.inf)
    after = update_ema(optimizer_step(ready, donate=False), decay=0.5)
    assert first_difference(dict(state.ema), before) is None
    assert first_difference(dict(after.ema), before) is not None
