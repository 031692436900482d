"""Broken: the model remembers the batch before outside of itself, where no state can hold it."""

import sound

Config = sound.Config
MEMORY = [0.0]


class Remembering(sound.Network):
    def forward(self, x):
        mean, MEMORY[0] = MEMORY[0], x.detach().mean()
        return super().forward(x - 0.5 * mean)


def build(config, device):
    return sound.sound(config, device, model=Remembering())
