"""Several classes on one model, as groups of one Optimizer, train as several optimizers in a loop by hand."""

from functools import reduce

import pytest
import pytorch_optimizer
import schedulefree
import torch
from third_party import batches, loss_of, model_of

from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    checkpoint,
    evaluate,
    fold_in,
    forward_loss,
    optimizer_step,
    schedule,
    unscale_and_clip,
)

# name -> the class for matrices, the one for vectors; each with its hyperparameters
PAIRS = {
    "Muon and AdamW": ((torch.optim.Muon, {"lr": 0.02}), (torch.optim.AdamW, {"lr": 0.01})),
    "SGD and Adam": ((torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.Adam, {"lr": 0.01})),
    "state in groups": ((pytorch_optimizer.AdaBelief, {"lr": 0.01}), (torch.optim.SGD, {"lr": 0.1})),
    "train and eval": ((schedulefree.AdamWScheduleFree, {"lr": 0.01}), (torch.optim.SGD, {"lr": 0.1})),
    "one class twice": ((torch.optim.Adam, {"lr": 0.01}), (torch.optim.Adam, {"lr": 0.02, "amsgrad": True})),
}


def factor(step):
    return 1.0 / (1 + 0.2 * step)


def by_hand(pair, data, *, scheduled=False):
    model = model_of()
    split = [[p for p in model.parameters() if (p.dim() > 1) == matrices] for matrices in (True, False)]
    optimizers = [cls(params, **hyper) for (cls, hyper), params in zip(pair, split, strict=True)]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in optimizers if scheduled]
    for step, batch in enumerate(data):
        for optimizer in optimizers:
            if hasattr(optimizer, "train"):
                optimizer.train()
            optimizer.zero_grad()
        torch.manual_seed(fold_in(0, step, 0))
        loss_of(model.train(), batch).backward()
        for part in (*optimizers, *schedulers):
            part.step()
    params = [p.detach().clone() for p in model.parameters()]
    for optimizer in optimizers:
        if hasattr(optimizer, "eval"):
            optimizer.eval()
    with torch.no_grad():
        return params, loss_of(model.eval(), data[0]).item()


def first_state(pair):
    (matrix_class, matrix_hyper), (vector_class, vector_hyper) = pair
    vectors = Optimizer(vector_class, **vector_hyper)
    described = Optimizer(matrix_class, **matrix_hyper, groups=[("*.bias", vectors)])
    return TrainState.create(model_of(), described)


def step_of(*, donate=True, rates=None):
    def step(state, batch):
        state = unscale_and_clip(backward_scaled(forward_loss(state, batch, loss_of)), max_norm=float("inf"))
        state = optimizer_step(state, donate=donate)
        return state if rates is None else schedule(state, rates)

    return step


def run(pair, form, data, folder):
    if form == "schedule":
        at = {i: lambda t, lr=g["lr"]: lr * factor(t) for i, g in enumerate(first_state(pair).hyper)}
        return reduce(step_of(rates=at), data, schedule(first_state(pair), at))
    step = step_of(donate=form != "pure")
    half = reduce(step, data[:3], first_state(pair))
    if form == "clone":
        copy = half.clone()
        reduce(step, data[3:], half)
        half = copy
    elif form == "resume":
        checkpoint.save(half, folder / "half")
        half = checkpoint.load(folder / "half", like=first_state(pair))
    return reduce(step, data[3:], half)


@pytest.mark.parametrize("form", ["step", "pure", "clone", "resume", "schedule"])
@pytest.mark.parametrize("name", PAIRS)
def test_two_classes_train_as_two_optimizers_by_hand(name, form, tmp_path):
    pair, data = PAIRS[name], batches()
    expected, loss = by_hand(pair, data, scheduled=form == "schedule")
    state = run(pair, form, data, tmp_path)
    assert [
        n for (n, p), q in zip(state.params.items(), expected, strict=True) if not torch.equal(p, q)
    ] == []
    assert evaluate(state, data[:1], loss_of)["loss"] == pytest.approx(loss, abs=1e-6)
