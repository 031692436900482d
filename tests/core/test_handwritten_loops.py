"""A hundred steps are those of a loop that a person would write by hand with torch's own parts, to the bit."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steploop import (
    LossScale,
    Optimizer,
    TrainState,
    accumulate,
    backward_scaled,
    forward_loss,
    one_cycle,
    optimizer_step,
    schedule,
    unscale_and_clip,
    update_ema,
)

STEPS = 100
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.05}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.003, "momentum": 0.5}),
}


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(6 * 4 * 4, 8), nn.Tanh(), nn.Linear(8, 5),
    )  # fmt: skip


def batches(count=STEPS, size=12):
    generator = torch.Generator().manual_seed(4)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(5, (size,), generator=generator))
        for _ in range(count)
    ]


def objective(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def train(state, data, learning_rate, step_objective=objective):
    state = schedule(state, learning_rate)
    losses = []
    for batch in data:
        state = backward_scaled(forward_loss(state, batch, step_objective))
        state = unscale_and_clip(state, max_norm=0.5)
        state = schedule(optimizer_step(state), learning_rate)
        losses.append(state.loss)
    return state, losses


def scheduler_of(optimizer, learning_rate, base):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step) / base)


def assert_same(state, model, losses, expected_losses):
    assert torch.equal(torch.stack(losses), torch.stack(expected_losses))
    for name, param in model.named_parameters():
        assert torch.equal(state.params[name], param), name
    for name, buffer in model.named_buffers():
        assert torch.equal(state.buffers[name], buffer), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_hundred_steps_are_bit_equal_to_a_handwritten_loop(name, precision):
    cls, hyper = OPTIMIZERS[name]
    state = TrainState.create(network(), Optimizer(cls, **hyper), precision=precision)
    # constant factors of a power of two keep lr * factor exact, so that LambdaLR has the rate's own bits
    learning_rate = lambda step: hyper["lr"] * 2.0 ** -(step // 25)  # noqa: E731
    state, losses = train(state, batches(), learning_rate)

    model = network()
    optimizer = cls(model.parameters(), **hyper)
    scheduler = scheduler_of(optimizer, learning_rate, hyper["lr"])
    expected = []
    for batch in batches():
        with torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext():
            loss = objective(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        expected.append(loss.detach())
    assert_same(state, model, losses, expected)
    assert (state.attempted_steps, state.applied_steps) == (STEPS, STEPS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fp16_is_bit_equal_to_grad_scaler_with_its_skipped_steps(name):
    """Some batches overflow, and the scale grows and backs off: both loops skip the same steps."""
    cls, hyper = OPTIMIZERS[name]
    data = batches()
    for index in (10, 11, 40, 77):
        images, labels = data[index]
        data[index] = (images * 1e30, labels)
    scale = LossScale(scale=2.0**20, growth_interval=7)
    state = TrainState.create(network(), Optimizer(cls, **hyper), precision="fp16", loss_scale=scale)
    learning_rate = lambda step: hyper["lr"] * 2.0 ** -(step // 25)  # noqa: E731

    model = network()
    optimizer = cls(model.parameters(), **hyper)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=7)
    state = schedule(state, learning_rate)
    taken = 0
    for index, batch in enumerate(data):
        state = backward_scaled(forward_loss(state, batch, objective))
        state = unscale_and_clip(state, max_norm=0.5)
        state = schedule(optimizer_step(state), learning_rate)

        before = {n: b.clone() for n, b in model.named_buffers()}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(taken)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = objective(model, batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        finite = all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        taken += finite
        if not finite:  # we leave BatchNorm's statistics as they were too; a loop by hand has to do so itself
            model.load_state_dict({**model.state_dict(), **before})
        assert state.finite is finite, index
        assert state.scale.scale == scaler.get_scale(), index
        assert state.scale.growth_tracker == scaler.state_dict()["_growth_tracker"], index
        assert_same(state, model, [state.loss.nan_to_num()], [loss.detach().nan_to_num()])
    assert state.applied_steps == taken < STEPS
    assert state.attempted_steps == STEPS


def test_one_cycle_with_momentum_sets_what_torch_sets():
    hyper = {"lr": 0.1, "momentum": 0.9}
    learning_rate = one_cycle(0.3, total_steps=STEPS, momentum=(0.85, 0.95))
    state, losses = train(
        TrainState.create(network(), Optimizer(torch.optim.SGD, **hyper)), batches(), learning_rate
    )
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), **hyper)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=STEPS)
    expected = []
    for index, batch in enumerate(batches()):
        loss = objective(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if index < STEPS - 1:
            scheduler.step()
        optimizer.zero_grad()
        expected.append(loss.detach())
    assert_same(state, model, losses, expected)


def test_accumulation_in_equal_parts_is_bit_equal_to_dividing_the_loss_by_hand():
    def net():
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    generator = torch.Generator().manual_seed(6)
    data = [
        [
            (torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator))
            for _ in range(4)
        ]
        for _ in range(30)
    ]
    state = TrainState.create(net(), Optimizer(torch.optim.SGD, lr=0.1, momentum=0.9))
    for parts in data:
        state = optimizer_step(unscale_and_clip(accumulate(state, parts, objective), max_norm=1.0))
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parts in data:
        for part in parts:
            (objective(model, part) / 4).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, param in model.named_parameters():
        assert torch.equal(state.params[name], param), name


def test_ema_is_bit_equal_to_torch_averaged_model():
    state = TrainState.create(network(), Optimizer(torch.optim.SGD, lr=0.1), ema=True)
    model = network()
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    averaged.update_parameters(model)  # the first update copies, as TrainState.create does
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches(20):
        state = unscale_and_clip(backward_scaled(forward_loss(state, batch, objective)), max_norm=math.inf)
        state = update_ema(optimizer_step(state), decay=0.9)
        objective(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
    for name, param in averaged.module.named_parameters():
        assert torch.equal(state.ema[name], param), name
