"""Training runs that tests take on one process and on several: each gives all that a state holds afterwards."""

import random
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from steploop import (
    LossScale,
    Optimizer,
    Ranks,
    TrainState,
    accumulate,
    accuracy,
    backward_scaled,
    evaluate,
    forward_loss,
    optimizer_step,
    schedule,
    split_parts,
    unscale_and_clip,
    update_ema,
    warmup_cosine,
)
from steploop.core.steps.by_parts import part_exchange
from steploop.core.trees import named_leaves

ADAMW = Optimizer(torch.optim.AdamW, lr=1e-2)
MOMENTUM = Optimizer(torch.optim.SGD, lr=1e-2, momentum=0.9)
INF = float("inf")


def batches(count=4, samples=24):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(samples, 6, generator=generator), torch.randint(3, (samples,), generator=generator))
        for _ in range(count)
    ]


def network(norm=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 17),
        nn.BatchNorm1d(17) if norm else nn.Identity(),
        nn.Tanh(),
        nn.Dropout(0.3),
        nn.Linear(17, 3),
    )


def objective(model, batch):
    x, y = batch
    logits = model(x)
    return F.cross_entropy(logits, y), {"logits": logits}


def tokens(model, batch):
    """Weighted by what is no padding, of which a part may have nothing."""
    x, y = batch
    weight = (y != 0).sum()
    loss = F.cross_entropy(model(x), y, ignore_index=0, reduction="sum") / weight
    return loss, None, weight


def step(state, batch, chosen=objective, *, donate=True, **bound):
    state = forward_loss(state, split_parts(batch, state.ranks), chosen)
    state = unscale_and_clip(backward_scaled(state), **(bound or {"max_norm": 1.0}))
    return optimizer_step(state, donate=donate)


def values(state):
    """All that a state holds, the newest loss and norm too."""
    tensors = {
        "params": dict(state.params), "buffers": dict(state.buffers), "slots": {k: dict(v) for k, v in state.slots.items()},
        "ema": dict(state.ema or {}), "carry": state.carry,
    }  # fmt: skip
    found = {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in named_leaves(tensors)}
    scale = None if state.scale is None else (float(state.scale.scale), int(state.scale.growth_tracker))
    steps = (state.applied_steps, state.attempted_steps, state.nonfinite_steps)
    results = {
        "loss": state.loss,
        "norm": state.grad_norm,
        "clipped": state.clipped_norm,
        "finite": state.finite,
    }
    return {**found, "scale": scale, "steps": steps, **results}


def create(model, optimizer, parts, *, exact=True, **others):
    return TrainState.create(model, optimizer, ranks=Ranks.here(parts=parts, exact=exact), **others)


def train(
    parts, *, optimizer=ADAMW, chosen=objective, samples=24, model=network, bound=None, exact=True, **others
):
    state = create(model(), optimizer, parts, exact=exact, **others)
    for batch in batches(samples=samples):
        state = step(state, batch, chosen, **(bound or {}))
    return values(state)


def adamw(parts, **others):
    return train(parts, **others)


def fast(parts):
    """Small buckets, of which everything goes to everybody."""
    return train(parts, optimizer=MOMENTUM, exact=False)


def fast_by_all_reduce(parts):
    with patch.multiple(part_exchange, SMALL_BYTES=0):
        return train(parts, optimizer=MOMENTUM, exact=False)


def momentum_of_ragged_batches(parts):
    return train(parts, optimizer=MOMENTUM, samples=19)


def tokens_as_weights(parts):
    return train(parts, chosen=tokens)


def fewer_samples_than_parts(parts):
    return train(parts, samples=3, model=partial(network, norm=False))


def muon_and_adamw(parts):
    groups = [(lambda name, p: p.dim() == 2, Optimizer(torch.optim.Muon, lr=1e-2))]
    return train(parts, optimizer=Optimizer(torch.optim.AdamW, lr=1e-2, groups=groups))


def many_buckets(parts):
    """Every tensor but the smallest in a bucket of its own, sent while the backward pass goes on."""
    with patch.multiple(part_exchange, BUCKET_BYTES=200, SMALL_BYTES=0):
        return train(parts, samples=19)


def many_buckets_of_unused_parameters(parts):
    with patch.multiple(part_exchange, BUCKET_BYTES=100, SMALL_BYTES=0):
        return train(parts, model=Branches, samples=19)


def half_parameters(parts):
    with patch.multiple(part_exchange, SMALL_BYTES=0):
        return train(parts, model=lambda: network(norm=False).bfloat16(), chosen=in_bfloat16)


def in_bfloat16(model, batch):
    return objective(model, (batch[0].bfloat16(), batch[1]))


def bfloat16(parts):
    return train(parts, precision="bf16")


def float16_that_overflows_first(parts):
    return train(parts, precision="fp16", loss_scale=LossScale(scale=2.0**40), samples=19)


def clipped_by_value(parts):
    return train(parts, bound={"max_value": 0.01})


def clipped_by_unit(parts):
    return train(parts, bound={"adaptive": 0.02})


def nan_in_one_part(parts):
    state = create(network(), ADAMW, parts)
    for index, (x, y) in enumerate(batches()):
        if index == 1:
            x[-1] = float("nan")
        state = step(state, (x, y))
    assert state.applied_steps == 3
    return values(state)


def averages_and_rates(parts):
    state = create(network(), ADAMW, parts, ema=True, ema_buffers=True)
    for batch in batches():
        state = schedule(
            update_ema(step(state, batch), decay=0.9), warmup_cosine(1e-2, warmup_steps=2, total_steps=8)
        )
    return values(state)


def clones_and_pure_steps(parts):
    state = create(network(), ADAMW, parts).clone()
    first, *rest = batches()
    before = state
    state = step(state, first, donate=False)
    again = step(before.clone(), first)
    assert values(again)["loss"].equal(values(state)["loss"])
    for batch in rest:
        state = step(state.clone(), batch, donate=False)
    return values(state)


def accumulated(parts, chosen=objective, precision="fp32"):
    state = create(network(), ADAMW, parts, precision=precision)
    for x, y in batches(samples=37):
        micros = [split_parts((x[lo:hi], y[lo:hi]), state.ranks) for lo, hi in ((0, 12), (12, 29), (29, 37))]
        state = accumulate(state, micros, chosen)
        state = optimizer_step(unscale_and_clip(state, max_norm=1.0))
    return values(state)


def accumulated_tokens(parts):
    return accumulated(parts, tokens)


def accumulated_tokens_in_float16(parts):
    return accumulated(parts, tokens, "fp16")


def accumulated_by_unpacking(parts):
    """As a recipe cuts a batch into micro-batches: parts of too few samples have fewer."""
    state = create(network(norm=False), ADAMW, parts)
    for batch in batches(samples=11):
        chunks = split_parts(batch, state.ranks).map(
            lambda b: list(zip(*(t.chunk(2) for t in b), strict=True))
        )
        state = optimizer_step(unscale_and_clip(accumulate(state, chunks, objective), max_norm=INF))
    return values(state)


def several_passes(parts):
    """The two networks of a GAN; the second is given what the first has made."""
    torch.manual_seed(0)
    g = create(nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 4)), ADAMW, parts)
    d = create(
        nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Dropout(0.2), nn.Linear(9, 1)), ADAMW, parts
    )

    def fooled(model, batch):
        made = model(batch[0] + torch.randn(len(batch[0]), 1))
        return -made.mean(), {"made": made}

    def judged(model, batch):
        real, made = batch
        return (model(made) - model(real)).mean()

    for batch in batches():
        cut = split_parts(batch, g.ranks)
        g = forward_loss(g, cut, fooled)
        d = backward_scaled(forward_loss(d, (cut[0].map(lambda x: x[:, :4]), g.outputs["made"]), judged))
        g = optimizer_step(unscale_and_clip(backward_scaled(g), max_norm=1.0))
        d = optimizer_step(unscale_and_clip(d, max_norm=1.0))
    return {"g": values(g), "d": values(d)}


def two_passes_of_one_state(parts):
    state = create(network(), ADAMW, parts)
    for batch in batches():
        cut = split_parts(batch, state.ranks)
        state = forward_loss(state, cut, objective)
        state = step(state, batch)
    return values(state)


class Branches(nn.Module):
    """A layer that only some batches use, one that no batch uses, and a count of the samples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(6, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("largest", torch.zeros(3))
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x):
        y = self.first(x)
        self.seen += len(x)
        if x[0, 0] > 0:
            self.largest = torch.maximum(self.largest, y.detach().amax(0))
            y = y + self.second(x)
        return y


def unused_parameters(parts):
    found = train(parts, model=Branches, samples=19)
    assert found["buffers.table"].equal(torch.arange(4.0))
    assert "slots.third.weight.step" not in found
    return found


def channels_last(parts):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 2), nn.Flatten(), nn.LazyLinear(3)
    )
    model(torch.zeros(2, 3, 6, 6))
    state = create(model, MOMENTUM, parts, memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x = torch.randn(16, 3, 6, 6, generator=generator).to(memory_format=torch.channels_last)
        state = step(state, (x, torch.randint(3, (16,), generator=generator)))
    return values(state)


def draws_from_python(parts):
    def noisy(model, batch):
        return objective(model, (batch[0] * random.random(), batch[1]))

    return train(parts, chosen=noisy)


class Recomputed(nn.Module):
    """A layer whose forward pass, BatchNorm included, is computed again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def recomputed(parts):
    return train(parts, model=Recomputed, samples=19)


def kept_graphs(parts):
    """A batch that one state makes, which the loss of another is differentiated through."""
    torch.manual_seed(0)
    maker, judge = create(nn.Linear(6, 6), ADAMW, parts), create(network(), ADAMW, parts)
    for batch in batches():
        cut = split_parts(batch, maker.ranks)
        made = forward_loss(maker, cut, lambda model, b: ((out := model(b[0])).mean(), out), keep_graph=True)
        judge = backward_scaled(forward_loss(judge, (made.outputs, cut[1]), objective), keep_graph=True)
        judge = optimizer_step(unscale_and_clip(judge, max_norm=INF))
        maker = optimizer_step(unscale_and_clip(backward_scaled(made), max_norm=INF))
    return {"maker": values(maker), "judge": values(judge)}


def closure(parts):
    state = create(network(norm=False), Optimizer(torch.optim.LBFGS, lr=0.1, max_iter=3), parts)
    for batch in batches(3):
        cut = split_parts(batch, state.ranks)
        state = optimizer_step(
            state, closure=lambda s, cut=cut: backward_scaled(forward_loss(s, cut, objective))
        )
    return values(state)


def evaluated(parts):
    state = create(network(), ADAMW, parts, ema=True)
    for batch in batches():
        state = update_ema(step(state, batch), decay=0.9)

    def per_class(outputs, batch):
        hits = torch.zeros(3).index_add(0, batch[1], (outputs["logits"].argmax(1) == batch[1]).float())
        return hits, torch.bincount(batch[1], minlength=3)

    tests = [*batches(6, 7), *batches(1, 3)]
    metrics = {"accuracy": accuracy, "class": per_class}
    whole = evaluate(state, tests, objective, metrics)
    cut = [split_parts(batch, state.ranks) for batch in tests]
    in_parts = evaluate(state, cut, objective, metrics)
    assert in_parts == pytest.approx(whole)
    assert evaluate(state, [(x, y) for x, y in cut], objective, metrics) == in_parts
    return {
        "raw": whole,
        "parts": in_parts,
        "tokens": evaluate(state, tests, tokens),
        "averaged": evaluate(state, tests, objective, metrics, use_ema=True),
        "one": evaluate(state, tests[:1], objective),
        "none": evaluate(state, [], objective),
    }


def by_torchmetrics(parts):
    """More batches than ranks, and fewer; one metric adds numbers, the other keeps all scores."""
    import torchmetrics

    kinds = torchmetrics.classification
    every = {"hinge": kinds.MulticlassHingeLoss(3), "curve": kinds.MulticlassAUROC(3)}
    metrics = {
        "all": torchmetrics.MetricCollection(every),
        "top": kinds.MulticlassAccuracy(3, average="micro"),
    }
    state, tests = create(network(), ADAMW, parts), batches(5, 7)
    whole = [evaluate(state, tests[:count], objective, metrics) for count in (5, 1, 5, 0)]
    return [*whole, evaluate(state, [split_parts(tests[0], state.ranks)], objective, metrics)]


class Hits:
    """What ``evaluate`` takes for a metric of torchmetrics, and which gathers nothing."""

    def update(self, logits, labels):
        pass

    reset = compute = update


def by_a_metric_that_gathers_nothing(parts):
    return evaluate(create(network(), ADAMW, parts), batches(), objective, {"hits": Hits()})


CASES = (
    adamw, many_buckets, many_buckets_of_unused_parameters, half_parameters, momentum_of_ragged_batches, tokens_as_weights, fewer_samples_than_parts, muon_and_adamw, bfloat16,
    float16_that_overflows_first, clipped_by_value, clipped_by_unit, nan_in_one_part, averages_and_rates,
    clones_and_pure_steps, accumulated, accumulated_tokens, accumulated_tokens_in_float16, accumulated_by_unpacking,
    several_passes, two_passes_of_one_state, unused_parameters, recomputed, kept_graphs, channels_last, draws_from_python, closure, evaluated,
)  # fmt: skip
