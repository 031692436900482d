"""Broken: a softmax before the cross entropy, which does one itself."""

import sound
import torch.nn.functional as F

Config = sound.Config


def objective(model, batch):
    chances = model(batch[0]).softmax(-1)
    return F.cross_entropy(chances, batch[1]), {"logits": chances}


def build(config, device):
    return sound.sound(config, device, objective=objective)
