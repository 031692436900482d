"""What an objective does to Python's generator besides drawing from it."""

import random

import torch

from steploop import Optimizer, TrainState, forward_loss


def test_a_seed_in_an_objective_stays_there():
    """A generator that was just seeded has the position that a new seed gives it, and the same first word."""
    state = TrainState.create(torch.nn.Linear(2, 1), Optimizer(torch.optim.SGD, lr=0.1))

    def plain(model, batch):
        return model(batch).square().mean()

    def seeding(model, batch):
        random.seed(2)
        return plain(model, batch)

    batch = torch.ones(3, 2)
    forward_loss(state, batch, plain)  # from now on the generator is watched only
    random.seed(1)
    before = random.getstate()
    forward_loss(state, batch, seeding)
    assert random.getstate() == before
    random.seed(3)
    expected = random.random()
    random.seed(3)
    forward_loss(state, batch, seeding)
    assert random.random() == expected
