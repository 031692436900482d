"""On a GPU: the same numbers as torch's own parts, and a step that never makes the host wait."""

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
    cosine_annealing,
    evaluate,
    forward_loss,
    optimizer_step,
    schedule,
    unscale_and_clip,
    update_ema,
)
from steploop.core.trees import first_difference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

STEPS = 40
RATE = cosine_annealing(2.0**-7, total_steps=STEPS)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4))


def plain_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))


def batches(count=STEPS):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 16, generator=generator).cuda(), torch.randint(4, (8,), generator=generator).cuda())
        for _ in range(count)
    ]


def objective(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def step(state, batch, **options):
    state = unscale_and_clip(backward_scaled(forward_loss(state, batch, objective)), max_norm=0.5)
    return schedule(optimizer_step(state, **options), RATE)


def values(state):
    return {"params": dict(state.params), "buffers": dict(state.buffers), "slots": dict(state.slots)}


def create(model, *, fused=True, **options):
    optimizer = Optimizer(torch.optim.AdamW, lr=2.0**-7, fused=fused)
    return schedule(TrainState.create(model, optimizer, device="cuda", **options), RATE)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_with_a_fused_optimizer_never_makes_the_host_wait(precision):
    data = batches()
    state = create(network(), precision=precision, ema=True)
    for index in range(3):  # whatever allocates or compiles for the first time may wait
        state = update_ema(step(state, data[index]), decay=0.9)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in data[3:]:
            state = update_ema(step(state, batch), decay=0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    settled = state.settle()
    assert settled.applied_steps == STEPS
    assert settled.nonfinite_steps == 0
    assert settled.learning_rate == pytest.approx(RATE(STEPS), abs=1e-9)


def test_fp16_with_overflows_follows_grad_scaler_on_the_device():
    data = batches()
    for index in (5, 6, 20):
        data[index] = (data[index][0] * 1e30, data[index][1])
    state = create(plain_network(), precision="fp16", loss_scale=LossScale(scale=2.0**18, growth_interval=7))
    model = plain_network().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2.0**-7, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**18, growth_interval=7)
    taken = 0
    for batch in data:
        state = step(state, batch)
        for group in optimizer.param_groups:
            # the state's rate lives on the device in float32; the loop by hand gets the same one
            group["lr"] = torch.tensor(RATE(taken), dtype=torch.float32, device="cuda") if taken else RATE(0)
        with torch.autocast("cuda", dtype=torch.float16):
            loss = objective(model, batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        taken += all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        settled = state.settle()
        assert settled.scale.scale == scaler.get_scale()
        assert settled.applied_steps == taken
    for name, param in model.named_parameters():
        torch.testing.assert_close(state.params[name], param, rtol=1e-5, atol=1e-7)
    assert taken < STEPS


@pytest.mark.parametrize("fused", [True, False])
def test_the_pure_form_and_the_donated_form_agree_to_the_bit(fused):
    pure, donated = create(network(), fused=fused), create(network(), fused=fused)
    for batch in batches(10):
        kept = {n: p.detach().clone() for n, p in pure.params.items()}
        old = pure
        pure, donated = step(pure, batch, donate=False), step(donated, batch)
        assert first_difference(dict(old.params), kept) is None
    assert first_difference(values(pure), values(donated)) is None


def test_two_runs_are_equal_and_do_not_depend_on_the_ambient_generator():
    def run(noise):
        state = create(network())
        for batch in batches(10):
            torch.cuda.manual_seed_all(noise)
            torch.rand(noise, device="cuda")
            state = step(state, batch)
        return values(state)

    assert first_difference(run(1), run(7)) is None


def test_the_ambient_generators_stand_where_they_stood():
    state = create(network())
    before = torch.cuda.get_rng_state()
    state = step(state, batches(1)[0])
    evaluate(state, batches(2), objective)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    state = create(plain_network())
    inputs, labels = batches(1)[0]
    whole = backward_scaled(forward_loss(state, (inputs, labels), objective)).grads
    parts = [(inputs[a:b], labels[a:b]) for a, b in ((0, 3), (3, 7), (7, 8))]
    split = accumulate(state, parts, objective).grads
    for name, grad in whole.items():
        torch.testing.assert_close(split[name], grad)
