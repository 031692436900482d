"""Broken: the order of an epoch is drawn from torch's global generator whenever the epoch is read."""

import sound
import torch

Config = sound.Config


class Batches:
    def __len__(self):
        return 6

    def epoch(self, epoch, start=0):
        points, order = sound.Points(60, 1), torch.randperm(60)
        for n in range(start, len(self)):
            rows = order[10 * n : 10 * (n + 1)]
            yield points.x[rows], points.y[rows]


def build(config, device):
    return sound.sound(config, device, batches=Batches())
