"""Broken: the loss is a sum over the batch, and its evaluation depends on how many samples that has."""

import sound
import torch.nn.functional as F

Config = sound.Config


def objective(model, batch):
    logits = model(batch[0])
    return F.cross_entropy(logits, batch[1], reduction="sum"), {"logits": logits}


def build(config, device):
    return sound.sound(config, device, objective=objective)
