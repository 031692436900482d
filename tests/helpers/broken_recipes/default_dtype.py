"""Broken: the step looks at whatever dtype the caller has left as the default."""

import sound
import torch

Config = sound.Config


def build(config, device):
    recipe = sound.sound(config, device)

    def train_step(state, batch):
        smallest = torch.finfo(torch.get_default_dtype()).eps
        return recipe.train_step(state, (batch[0] + 1e4 * smallest, batch[1]))

    return sound.sound(config, device, state=recipe.state, train_step=train_step)
