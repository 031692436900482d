"""WGAN-GP: three critic steps to one of the generator, a penalty on the critic's gradient that is differentiated again."""

from functools import partial

import torch
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

SEED, STEPS, CRITIC_STEPS, NOISE = 13, 20, 3, 4


def networks():
    torch.manual_seed(SEED)
    generator = nn.Sequential(nn.Linear(NOISE, 16), nn.ReLU(), nn.Linear(16, 2))
    critic = nn.Sequential(
        nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)
    )
    return generator, critic


def judged_apart(critic, real, *, generator):
    with torch.no_grad():
        fake = generator(torch.randn(len(real), NOISE))
    part = torch.rand(len(real), 1)
    between = (part * real + (1 - part) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    penalty = (slope.norm(dim=1) - 1).square().mean()
    return critic(fake).mean() - critic(real).mean() + 10.0 * penalty


def praised(generator, real, *, critic):
    return -critic(generator(torch.randn(len(real), NOISE))).mean()


def batches():
    generator = torch.Generator().manual_seed(12)
    return [torch.randn(16, 2, generator=generator) * 0.3 + 1 for _ in range(STEPS)]


ADAM = {"lr": 1e-2, "betas": (0.5, 0.9)}


def by_hand(data):
    generator, critic = networks()
    generator_optimizer = torch.optim.Adam(generator.parameters(), **ADAM)
    critic_optimizer = torch.optim.Adam(critic.parameters(), **ADAM)
    for step, real in enumerate(data):
        torch.manual_seed(fold_in(SEED, step, 0))
        critic_optimizer.zero_grad()
        judged_apart(critic, real, generator=generator).backward()
        critic_optimizer.step()
        if (step + 1) % CRITIC_STEPS == 0:
            torch.manual_seed(fold_in(SEED, step // CRITIC_STEPS, 0))
            generator_optimizer.zero_grad()
            praised(generator, real, critic=critic).backward()
            generator_optimizer.step()
    return {
        **{f"generator.{n}": t for n, t in generator.state_dict().items()},
        **{f"critic.{n}": t for n, t in critic.state_dict().items()},
    }


def initial():
    adam = Optimizer(torch.optim.Adam, **ADAM)
    names = ("generator", "critic")
    return {name: TrainState.create(m, adam, seed=SEED) for name, m in zip(names, networks(), strict=True)}


def updated(state, batch, objective):
    state = backward_scaled(forward_loss(state, batch, objective))
    return optimizer_step(unscale_and_clip(state, max_norm=float("inf")))


def train_step(states, real):
    generator, critic = states["generator"], states["critic"]
    critic = updated(critic, real, partial(judged_apart, generator=generator.model))
    if critic.attempted_steps % CRITIC_STEPS == 0:
        generator = updated(generator, real, partial(praised, critic=critic.model))
    return {"generator": generator, "critic": critic}
