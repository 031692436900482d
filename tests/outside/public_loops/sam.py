"""SAM: climb to the sharpest place nearby, take the gradient there, and step from where one was."""

import torch
import torch.nn.functional as F
from torch import nn

from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    fold_in,
    forward_loss,
    optimizer_step,
    unscale_and_clip,
)

SEED, STEPS = 23, 20


class SAM(torch.optim.SGD):
    """Foret et al. 2021, https://arxiv.org/abs/2010.01412, over SGD."""

    def __init__(self, params, lr, rho=0.05, **options):
        super().__init__(params, lr=lr, **options)
        for group in self.param_groups:
            group["rho"] = rho
        self.defaults["rho"] = rho

    @torch.no_grad()
    def step(self, closure=None):
        params = [(p, group["rho"]) for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p, _ in params]).norm()
        climbs = [p.grad * (rho / (norm + 1e-12)) for p, rho in params]
        for (p, _), climb in zip(params, climbs, strict=True):
            p.add_(climb)
        with torch.enable_grad():
            closure()
        for (p, _), climb in zip(params, climbs, strict=True):
            p.sub_(climb)
        super().step()


def network():
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))


def loss_of(model, batch):
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, label_smoothing=0.1)


def batches():
    generator = torch.Generator().manual_seed(22)
    return [
        (torch.randn(16, 6, generator=generator), torch.randint(4, (16,), generator=generator))
        for _ in range(STEPS)
    ]


def by_hand(data):
    model = network()
    optimizer = SAM(model.parameters(), lr=0.1, momentum=0.9)
    for step, batch in enumerate(data):

        def closure(step=step, batch=batch):
            torch.manual_seed(fold_in(SEED, step, 1))
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        torch.manual_seed(fold_in(SEED, step, 0))
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step(closure)
    return model.state_dict()


def initial():
    return TrainState.create(network(), Optimizer(SAM, lr=0.1, momentum=0.9), seed=SEED)


def train_step(state, batch):
    def gradients(state):
        state = backward_scaled(forward_loss(state, batch, loss_of))
        return unscale_and_clip(state, max_norm=float("inf"))

    return optimizer_step(gradients(state), closure=gradients)
