"""DCGAN: the images are made once, and judged by the discriminator before and after its own step."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    fold_in,
    forward_loss,
    optimizer_step,
    unscale_and_clip,
)

SEED, STEPS, NOISE = 29, 20, 6


def networks():
    torch.manual_seed(SEED)
    generator = nn.Sequential(
        nn.ConvTranspose2d(NOISE, 8, 4, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1), nn.Tanh(),
    )  # fmt: skip
    discriminator = nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
        nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(32, 1),
    )  # fmt: skip
    for module in [*generator, *discriminator]:
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, 0.02)
    return generator, discriminator


def noise_for(real):
    return torch.randn(len(real), NOISE, 1, 1)


def told(logits, answer):
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, answer))


def batches():
    generator = torch.Generator().manual_seed(28)
    return [torch.randn(8, 1, 8, 8, generator=generator).tanh() for _ in range(STEPS)]


ADAM = {"lr": 2e-3, "betas": (0.5, 0.999)}


def by_hand(data):
    generator, discriminator = networks()
    generator_optimizer = torch.optim.Adam(generator.parameters(), **ADAM)
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), **ADAM)
    for step, real in enumerate(data):
        torch.manual_seed(fold_in(SEED, step, 0))
        fake = generator(noise_for(real))
        discriminator_optimizer.zero_grad()
        (told(discriminator(real), 1.0) + told(discriminator(fake.detach()), 0.0)).backward()
        discriminator_optimizer.step()
        generator_optimizer.zero_grad()
        told(discriminator(fake), 1.0).backward()
        generator_optimizer.step()
    return {
        **{f"generator.{n}": t for n, t in generator.state_dict().items()},
        **{f"discriminator.{n}": t for n, t in discriminator.state_dict().items()},
    }


def told_apart(model, batch):
    real, fake = batch
    return told(model(real), 1.0) + told(model(fake), 0.0)


def praised(model, fake, *, judge):
    """The judge's statistics of this look come out as values: the judge's own state is left alone."""
    statistics = {name: buffer.clone() for name, buffer in judge.buffers.items()}
    weights = {name: p.detach() for name, p in judge.params.items()}
    return told(functional_call(judge.model, {**weights, **statistics}, fake), 1.0), statistics


def made(model, real):
    fake = model(noise_for(real))
    return fake.mean(), fake


def initial():
    adam = Optimizer(torch.optim.Adam, **ADAM)
    names = ("generator", "discriminator")
    return {name: TrainState.create(m, adam, seed=SEED) for name, m in zip(names, networks(), strict=True)}


def updated(state):
    return optimizer_step(unscale_and_clip(backward_scaled(state), max_norm=float("inf")))


def train_step(states, real):
    generator = forward_loss(states["generator"], real, made, keep_graph=True)
    fake = generator.outputs
    discriminator = updated(forward_loss(states["discriminator"], (real, fake.detach()), told_apart))
    generator = forward_loss(generator, fake, partial(praised, judge=discriminator))
    discriminator = discriminator.with_params(generator.outputs)
    return {"generator": updated(generator), "discriminator": discriminator}
