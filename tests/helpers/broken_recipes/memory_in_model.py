"""Broken: the model remembers the batch before in an attribute that is neither parameter nor buffer."""

import sound

Config = sound.Config


class Remembering(sound.Network):
    last = 0.0

    def forward(self, x):
        mean, self.last = self.last, x.detach().mean()
        return super().forward(x - 0.5 * mean)


def build(config, device):
    return sound.sound(config, device, model=Remembering())
