"""Broken: the scales of the columns are in the order of a set of strings, which is another one in every process."""

import sound
import torch

Config = sound.Config

NAMES = ["red", "green", "blue", "near", "far", "hot", "cold", "wet", "dry", "old", "new", "late"]


def build(config, device):
    scale = torch.tensor([1.0 + NAMES.index(name) for name in set(NAMES)][:5], device=device)

    def objective(model, batch):
        return sound.objective(model, (batch[0] * scale, batch[1]))

    return sound.sound(config, device, objective=objective)
