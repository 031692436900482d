"""Ranks are parts: the number of processes that take a step together changes no bit of it."""

import pytest
import torch
import torch.nn.functional as F
from rank_processes import RankProcesses
from torch import nn

from steploop import (
    Optimizer,
    Ranks,
    TrainState,
    backward_scaled,
    forward_loss,
    optimizer_step,
    split_parts,
    unscale_and_clip,
)
from steploop.core.ranks import Parts
from steploop.core.trees import first_difference
from steploop.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def two():
    ranks = RankProcesses(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four():
    ranks = RankProcesses(4)
    yield ranks
    ranks.close()


def batches(count=4, samples=24):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(samples, 6, generator=generator), torch.randint(3, (samples,), generator=generator))
        for _ in range(count)
    ]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 17), nn.BatchNorm1d(17), nn.Tanh(), nn.Dropout(0.3), nn.Linear(17, 3))


def objective(model, batch):
    x, y = batch
    logits = model(x)
    return F.cross_entropy(logits, y), logits


def tokens(model, batch):
    x, y = batch
    weight = (y != 0).sum()
    loss = F.cross_entropy(model(x), y, ignore_index=0, reduction="sum") / weight
    return loss, None, weight


def step(state, batch, chosen=objective):
    state = forward_loss(state, split_parts(batch, state.ranks), chosen)
    return optimizer_step(unscale_and_clip(backward_scaled(state), max_norm=1.0))


def values(state):
    """All tensors of a state, and what of it a log would show."""
    tensors = {"params": state.params, "buffers": state.buffers, "slots": state.slots, "loss": state.loss}
    found = {name: t.detach().clone() for name, t in first_leaves(tensors)}
    return {**found, "steps": (state.applied_steps, state.nonfinite_steps, state.attempted_steps)}


def first_leaves(tree, name=""):
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif hasattr(tree, "items"):
        for key, value in tree.items():
            yield from first_leaves(value, f"{name}.{key}")


def train(parts, optimizer, chosen, samples):
    state = TrainState.create(network(), optimizer, ranks=Ranks.here(parts=parts))
    for batch in batches(samples=samples):
        state = step(state, batch, chosen)
    return values(state)


@pytest.mark.parametrize("samples", [24, 19])
@pytest.mark.parametrize("chosen", [objective, tokens])
def test_the_number_of_ranks_changes_no_bit(two, four, chosen, samples):
    optimizer = Optimizer(torch.optim.AdamW, lr=1e-2)
    alone = train(4, optimizer, chosen, samples)
    for ranks in (two, four):
        for found in ranks.run(train, 4, optimizer, chosen, samples):
            assert first_difference(found, alone) is None


def test_a_number_of_ranks_that_does_not_divide_the_parts_is_refused():
    with pytest.raises(ConfigError, match="3 parts cannot be shared equally by 2 ranks"):
        Ranks(size=2, parts=3)


def test_a_state_with_ranks_takes_parts_only():
    state = TrainState.create(nn.Linear(2, 1), Optimizer(torch.optim.SGD, lr=0.1), ranks=Ranks.here(parts=2))
    with pytest.raises(ConfigError, match=r"takes the parts of a global batch.*split_parts"):
        forward_loss(state, torch.ones(4, 2), lambda model, x: model(x).mean())
    with pytest.raises(ConfigError, match=r"expected the parts range\(0, 2\) of 2 on rank 0 of 1"):
        forward_loss(state, split_parts(torch.ones(4, 2), Ranks(parts=4)), lambda model, x: model(x).mean())


def test_a_state_without_ranks_takes_no_parts():
    state = TrainState.create(nn.Linear(2, 1), Optimizer(torch.optim.SGD, lr=0.1))
    with pytest.raises(ConfigError, match="made without ranks"):
        forward_loss(state, split_parts(torch.ones(4, 2), Ranks(parts=2)), lambda model, x: model(x).mean())


@pytest.mark.parametrize("samples", range(9))
def test_parts_are_cut_as_evenly_as_can_be_and_hold_every_sample_once(samples):
    batch = {"x": torch.arange(samples), "names": [str(i) for i in range(samples)], "note": 7}
    found = [
        part for rank in range(2) for part in split_parts(batch, Ranks(rank=rank, size=2, parts=4)).batches
    ]
    there = [part for part in found if part is not None]
    assert [name for part in there for name in part["names"]] == batch["names"]
    assert [int(x) for part in there for x in part["x"]] == list(range(samples))
    assert all(part["note"] == 7 for part in there)
    sizes = [0 if part is None else len(part["x"]) for part in found]
    assert max(sizes) - min(sizes) <= 1


def test_samples_that_cannot_be_counted_are_refused():
    with pytest.raises(DataError, match="split_parts: cannot count the samples"):
        split_parts((torch.ones(3), torch.ones(4)), Ranks(parts=2))


def test_fields_of_parts_are_parts():
    parts = Parts([(1, 2), None, (3,)], range(3), 3)
    assert [field.batches for field in parts] == [(1, None, 3), (2, None, None)]
    assert parts[0].batches == (1, None, 3)
    assert parts.map(len).batches == (2, None, 1)
