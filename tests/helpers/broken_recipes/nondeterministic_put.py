"""Broken: an operation of which torch has no deterministic form."""

import sound
import torch

Config = sound.Config


def objective(model, batch):
    inputs, labels = batch
    first = torch.zeros(1, dtype=torch.long, device=inputs.device)
    return sound.objective(model, (inputs.clone().put_(first, inputs[0, :1]), labels))


def build(config, device):
    return sound.sound(config, device, objective=objective)
