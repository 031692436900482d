"""Broken: the step itself draws from torch's global generator, outside of the forward pass that is seeded."""

import sound
import torch

Config = sound.Config


def build(config, device):
    recipe = sound.sound(config, device)

    def train_step(state, batch):
        return recipe.train_step(state, (batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]))

    return sound.sound(config, device, state=recipe.state, train_step=train_step)
