"""Every module of torch's own test database trains as in a loop by hand, and goes on from a checkpoint."""

import sys
import warnings
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from module_samples import own, samples_of
from torch_databases import module_db

from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    checkpoint,
    fold_in,
    forward_loss,
    optimizer_step,
    unscale_and_clip,
)
from steploop.errors import SteploopError

SGD = {"lr": 0.01, "momentum": 0.9}


def by_hand(make, inputs):
    """Three steps, or None where the module does not train at all."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    model.train()
    try:
        for step in range(3):
            torch.manual_seed(fold_in(0, step, 0))
            optimizer.zero_grad()
            model(*own(inputs)).backward()
            optimizer.step()
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return None
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def step(state, inputs):
    state = forward_loss(state, own(inputs), lambda model, batch: model(*batch))
    return optimizer_step(unscale_and_clip(backward_scaled(state), max_norm=float("inf")))


def with_our_steps(make, inputs):
    """The same three steps with ours, and the same with a checkpoint after the second."""
    state = step(step(TrainState.create(make(), Optimizer(torch.optim.SGD, **SGD)), inputs), inputs)
    with TemporaryDirectory() as folder:
        checkpoint.save(state, Path(folder) / "second", require_finite=False)
        like = TrainState.create(make(), Optimizer(torch.optim.SGD, **SGD))
        resumed = checkpoint.load(Path(folder) / "second", like=like)
    return [{**s.params, **s.buffers} for s in (step(state, inputs), step(resumed, inputs))]


def same(found, expected):
    return list(found) == list(expected) and all(
        torch.equal(torch.nan_to_num(found[name]), torch.nan_to_num(t)) and found[name].dtype == t.dtype
        for name, t in expected.items()
    )


def judge(info):
    """description -> "equal", "unequal", "untrainable by hand" or why our steps refuse it."""
    verdicts = {}
    for name, make, inputs in samples_of(info):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about the modules themselves
            expected = by_hand(make, inputs)
            if expected is None:
                verdicts[name] = "untrainable by hand"
                continue
            try:
                found = with_our_steps(make, inputs)
            except SteploopError as error:
                verdicts[name] = f"refused: {type(error).__name__}: {error}"
            else:
                verdicts[name] = "equal" if all(same(f, expected) for f in found) else "unequal"
    return verdicts


@pytest.mark.parametrize("info", module_db, ids=lambda info: info.name)
def test_a_module_trains_and_resumes_as_in_a_loop_by_hand(info):
    """Three steps of SGD with momentum, the last one also from a checkpoint; bit for bit."""
    verdicts = judge(info)
    assert verdicts
    assert {name: verdict for name, verdict in verdicts.items() if verdict != "equal"} == {}


if __name__ == "__main__":
    every = [(name, verdict) for info in module_db for name, verdict in judge(info).items()]
    lines = [str(Counter(verdict.split(":")[0] for _, verdict in every))]
    lines += [f"{name}: {verdict}" for name, verdict in every if verdict != "equal"]
    sys.stdout.write("\n".join(lines) + "\n")
