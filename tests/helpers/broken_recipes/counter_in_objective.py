"""Broken: the objective counts its calls in a global, and the loss depends on the count."""

import sound

Config = sound.Config

calls = 0


def objective(model, batch):
    global calls  # noqa: PLW0603  (this is the fault)
    calls += 1
    loss, outputs = sound.objective(model, batch)
    return loss * (1 + 0.1 * calls), outputs


def build(config, device):
    return sound.sound(config, device, objective=objective)
