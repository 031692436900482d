"""Detection: images of any size in a list, a dict of losses, SGD with a linear warmup and milestones."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LinearLR, MultiStepLR, SequentialLR

from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    forward_loss,
    from_torch,
    optimizer_step,
    schedule,
    unscale_and_clip,
)

SEED, STEPS, CLASSES = 7, 20, 3


class Detector(nn.Module):
    """For each cell of 4 x 4 pixels: a class (0 is background) and a box, as offsets from the cell's centre."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(SEED)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.classes, self.boxes = nn.Conv2d(12, CLASSES + 1, 1), nn.Conv2d(12, 4, 1)

    def forward(self, images, targets):
        classification, box = [], []
        for image, target in zip(images, targets, strict=True):
            features = self.body(image.unsqueeze(0))
            logits, boxes = self.classes(features)[0].flatten(1).T, self.boxes(features)[0].flatten(1).T
            rows, columns = features.shape[2:]
            centres = (target["boxes"][:, :2] + target["boxes"][:, 2:]) / 2
            cells = (centres[:, 1] // 4).long().clamp(max=rows - 1) * columns + (centres[:, 0] // 4).long()
            wanted = torch.zeros(len(logits), dtype=torch.long)
            wanted[cells] = target["labels"]
            classification.append(F.cross_entropy(logits, wanted))
            box.append(F.smooth_l1_loss(boxes[cells], target["boxes"] / 16))
        return {"classification": torch.stack(classification).mean(), "box": torch.stack(box).mean()}


def batches():
    generator = torch.Generator().manual_seed(6)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    def sample():
        height, width, count = draw(12, 25), draw(12, 25), draw(1, 4)
        corners = torch.rand(count, 4, generator=generator) * torch.tensor([width, height, width, height])
        boxes = torch.cat(
            [torch.minimum(corners[:, :2], corners[:, 2:]), torch.maximum(corners[:, :2], corners[:, 2:])], 1
        )
        labels = torch.randint(1, CLASSES + 1, (count,), generator=generator)
        return torch.randn(3, height, width, generator=generator), {"boxes": boxes, "labels": labels}

    return [tuple(zip(*(sample() for _ in range(3)), strict=True)) for _ in range(STEPS)]


def warmup_and_milestones(optimizer):
    warmup, later = LinearLR(optimizer, 0.1, total_iters=5), MultiStepLR(optimizer, [7, 11], gamma=0.3)
    return SequentialLR(optimizer, [warmup, later], milestones=[5])


def by_hand(data):
    model = Detector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    scheduler = warmup_and_milestones(optimizer)
    model.train()
    for images, targets in data:
        losses = model(images, targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return model.state_dict()


RATES = from_torch(warmup_and_milestones, STEPS + 1, lr=0.05)


def objective(model, batch):
    losses = model(*batch)
    return sum(losses.values()), losses, len(batch[0])


def initial():
    optimizer = Optimizer(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-4)
    return schedule(TrainState.create(Detector(), optimizer, seed=SEED), RATES)


def train_step(state, batch):
    state = forward_loss(state, batch, objective)
    state = backward_scaled(state)
    state = unscale_and_clip(state, max_norm=float("inf"))
    state = optimizer_step(state)
    return schedule(state, RATES)
