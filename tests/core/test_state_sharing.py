"""Two states over one module, of which parts were exchanged or thawed in between, as transfer learning does."""

import torch
from torch import nn

from steploop import Optimizer, TrainState, backward_scaled, forward_loss, optimizer_step, unscale_and_clip

SGD = Optimizer(torch.optim.SGD, lr=0.1)


def train_step(state, batch):
    state = backward_scaled(forward_loss(state, batch, lambda model, x: (model(x) - 1).square().mean()))
    return optimizer_step(unscale_and_clip(state, max_norm=1.0))


def test_a_new_head_leaves_the_older_state_its_values():
    """A state over a module whose head was exchanged trains on copies, while the one before is alive."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    old = TrainState.create(model, SGD)
    before = {name: p.detach().clone() for name, p in old.params.items()}
    model[1] = nn.Linear(3, 5)
    new = TrainState.create(model, SGD)
    first = {name: p.detach().clone() for name, p in new.params.items()}
    for _ in range(2):
        new = train_step(new, torch.ones(4, 3))
    assert all(torch.equal(p, before[name]) for name, p in old.params.items())
    assert all(not torch.equal(p, first[name]) for name, p in new.params.items())


def test_a_new_head_over_a_state_that_is_gone_takes_the_values_as_they_are():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    TrainState.create(model, SGD)  # dropped at once
    model[1] = nn.Linear(3, 5)
    state = TrainState.create(model, SGD)
    assert state.params["0.weight"] is model[0].weight


def test_a_part_that_was_in_eval_mode_is_thawed_by_the_next_state():
    """Frozen BatchNorm in the first phase, trained in the second: each state has the modes it was made with."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].eval()
    batch = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    frozen = train_step(TrainState.create(model, SGD), batch)
    assert torch.equal(frozen.buffers["1.running_mean"], torch.zeros(3))
    thawed = train_step(TrainState.create(frozen.model.train(), SGD), batch)
    assert not torch.equal(thawed.buffers["1.running_mean"], torch.zeros(3))
    again = train_step(frozen, batch)
    assert torch.equal(again.buffers["1.running_mean"], torch.zeros(3))
