"""Broken: an evaluation without a loader, over as many samples as the Config's batch size makes whole batches of."""

import sound
import torch

Config = sound.Config


def build(config, device):
    x, y = sound.Points(30, 2).x.to(device), sound.Points(30, 2).y.to(device)
    whole = 30 - 30 % config.batch_size

    @torch.no_grad()
    def evaluate(state):
        model = state.model.eval()
        right = (model(x[:whole]).argmax(1) == y[:whole]).float().mean()
        model.train()
        return {"accuracy": float(right)}

    return sound.sound(config, device, evaluate=evaluate)
