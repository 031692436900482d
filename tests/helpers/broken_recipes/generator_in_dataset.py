"""Broken: the dataset augments with a generator of its own, of which every worker has a copy."""

import sound
import torch

from steploop.data import Loader

Config = sound.Config


class Noisy(sound.Points):
    def __init__(self, n, seed):
        super().__init__(n, seed)
        self.generator = torch.Generator().manual_seed(seed)

    def __getitem__(self, index):
        return self.x[index] + torch.randn(5, generator=self.generator), self.y[index]


def build(config, device):
    batches = Loader(Noisy(60, 1), batch_size=config.batch_size, seed=config.seed, device=device)
    return sound.sound(config, device, batches=batches)
