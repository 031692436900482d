"""Broken: the gradients have the wrong sign, as if a likelihood were a loss."""

import sound
import torch

from steploop import Optimizer, TrainState

Config = sound.Config


def build(config, device):
    optimizer = Optimizer(torch.optim.SGD, lr=0.1, maximize=True)
    return sound.sound(config, device, state=TrainState.create(sound.Network(), optimizer, device=device))
