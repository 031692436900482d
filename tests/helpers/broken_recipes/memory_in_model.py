"""Broken: the model remembers the batch before in an object of its own, which no state can hold."""

from types import SimpleNamespace

import sound

Config = sound.Config


class Remembering(sound.Network):
    def __init__(self):
        super().__init__()
        self.memory = SimpleNamespace(last=0.0)

    def forward(self, x):
        mean, self.memory.last = self.memory.last, x.detach().mean()
        return super().forward(x - 0.5 * mean)


def build(config, device):
    return sound.sound(config, device, model=Remembering())
