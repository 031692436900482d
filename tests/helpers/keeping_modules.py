"""Modules that keep or move something besides what an optimizer trains, as people write them; each takes rows of three."""

import torch
from torch import nn

# -- parameters with hooks and attributes -----------------------------------------------------------------------------


def clamp_gradient(param):
    param.grad.clamp_(-0.05, 0.05)


class Masked(nn.Module):
    """Gradient masks, a rule after the gradient, a tag, and what a hook itself holds."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.body.weight.register_hook(lambda g: g * torch.tensor([1.0, 0.0, 1.0]))
        self.body.weight.register_hook(lambda g: g + 0.01)
        self.body.bias.register_post_accumulate_grad_hook(clamp_gradient)
        self.body.weight.tag = "kept"

    def forward(self, x):
        return self.body(x)


class Tagged(nn.Parameter):
    """A parameter of a library's own class."""


class OfAnotherClass(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = Tagged(torch.randn(3))
        self.weight.axes = ("features",)

    def forward(self, x):
        return x * self.weight


class OnAFrozenOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.stem = nn.Linear(3, 3), nn.Linear(3, 3)
        self.stem.requires_grad_(requires_grad=False)
        self.stem.weight.tag = "frozen"

    def forward(self, x):
        return self.body(self.stem(x))


# -- buffers and extra state ------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """An extra state of a Python number and a tensor; it decides what comes out."""

    def __init__(self):
        super().__init__()
        self.body, self.calls, self.seen = nn.Linear(3, 3), 0, torch.zeros(())

    def get_extra_state(self):
        return {"calls": self.calls, "seen": [self.seen, "text", None]}

    def set_extra_state(self, state):
        self.calls, self.seen = state["calls"], state["seen"][0]

    def forward(self, x):
        self.calls += 1
        self.seen = self.seen + x.sum().detach()
        return self.body(x) * min(1.0, self.calls / 4) + torch.tanh(self.seen)


class LiveExtra(nn.Module):
    """Gives the very dictionary that it counts in."""

    def __init__(self):
        super().__init__()
        self.body, self.counts = nn.Linear(3, 3), {"rows": [0, torch.zeros(3)]}

    def get_extra_state(self):
        return self.counts

    def set_extra_state(self, state):
        self.counts = state

    def forward(self, x):
        self.counts["rows"][0] += len(x)
        self.counts["rows"][1] += x.detach().sum(0)
        return self.body(x - self.counts["rows"][1] / self.counts["rows"][0])


class Nested(nn.Module):
    """Two modules of that kind, one of them inside."""

    def __init__(self):
        super().__init__()
        self.first, self.rest = Counting(), nn.Sequential(nn.Tanh(), Counting())

    def forward(self, x):
        return self.rest(self.first(x))


class LateBuffer(nn.Module):
    """A mean that is None until the first pass."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.register_buffer("mean", None)
        self.register_buffer("never", None)

    def forward(self, x):
        found = x.mean(0).detach()
        self.mean = found if self.mean is None else 0.9 * self.mean + 0.1 * found
        return self.body(x - self.mean)


class GrowingQueue(nn.Module):
    """Keeps the last ten rows that it saw, and none at the beginning."""

    def __init__(self, rows=0):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.register_buffer("queue", torch.zeros(rows, 3))

    def forward(self, x):
        self.queue = torch.cat([self.queue, x.detach()])[-10:]
        return self.body(x) + self.queue.mean(0)


class Ranges(nn.Module):
    """An observer as torch.ao has them: its buffers take the shape of the data, in place."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.register_buffer("low", torch.zeros(0))

    def forward(self, x):
        if self.low.numel() == 0:
            self.low.resize_(3).copy_(x.amin(0))
        self.low.copy_(torch.minimum(self.low, x.amin(0)))
        return self.body(x - self.low)


# -- parameters that a forward pass moves -----------------------------------------------------------------------------


class Moving(nn.Module):
    """Frozen parameters that follow trained ones, as momentum encoders do, in one of the ways to write it."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(3, 3), nn.Linear(3, 3)
        self.key.requires_grad_(requires_grad=False)

    def move(self, key, query):
        with torch.no_grad():
            key.mul_(0.9).add_(query, alpha=0.1)

    def forward(self, x):
        for key, query in zip(self.key.parameters(), self.query.parameters(), strict=True):
            self.move(key, query)
        return self.query(x) - self.key(x)


class MovingByData(Moving):
    def move(self, key, query):
        key.data.mul_(0.9).add_(query.data, alpha=0.1)


class MovingByNewData(Moving):
    def move(self, key, query):
        key.data = 0.9 * key.data + 0.1 * query.data


class MovingByCopy(Moving):
    def move(self, key, query):
        key.data.copy_(0.9 * key.detach() + 0.1 * query.detach())


class MaxNorm(nn.Module):
    """An embedding that renormalises the rows that it looks up."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3, max_norm=0.7)

    def forward(self, x):
        return self.table((x.abs().sum(1) * 10).long() % 5)


class Clamped(nn.Module):
    """A trained weight that a forward pass keeps within bounds."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)

    def forward(self, x):
        with torch.no_grad():
            self.body.weight.clamp_(-0.3, 0.3)
        return self.body(x)


class ClampedByData(Clamped):
    def forward(self, x):
        self.body.weight.data.clamp_(-0.3, 0.3)
        return self.body(x)


class Spectral(nn.Module):
    """torch's own: it turns a buffer at every pass."""

    def __init__(self):
        super().__init__()
        self.body = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))

    def forward(self, x):
        return self.body(x)


# -- plain attributes -------------------------------------------------------------------------------------------------


class Annealed(nn.Module):
    """A number that every pass changes, and that decides what comes out; a layer below has one too."""

    def __init__(self):
        super().__init__()
        self.body, self.calls = nn.Sequential(nn.Linear(3, 3), Faded()), 0

    def forward(self, x):
        self.calls += 1
        return self.body(x) * min(1.0, self.calls / 4)


class Faded(nn.Module):
    factor = 1.0  # of the class, until the first pass

    def forward(self, x):
        self.factor = self.factor * 0.75
        return x + self.factor


class Remembering(nn.Module):
    """A hidden state carried from pass to pass, which is None first, and a list that grows."""

    def __init__(self):
        super().__init__()
        self.body, self.hidden, self.sums = nn.GRUCell(3, 3), None, []

    def forward(self, x):
        hidden = self.body(x, self.hidden)
        self.hidden = hidden.detach()
        self.sums.append(float(x.sum()))
        self.result = hidden  # with its graph: of this pass alone
        return hidden + torch.tanh(torch.tensor(self.sums).sum())


class Overwriting(nn.Module):
    """A running mean that is written in place, and is no buffer."""

    def __init__(self):
        super().__init__()
        self.body, self.mean = nn.Linear(3, 3), {"rows": torch.zeros(3)}

    def forward(self, x):
        with torch.no_grad():
            self.mean["rows"].lerp_(x.mean(0), 0.5)
        return self.body(x) - self.mean["rows"]


PLAINLY = [Annealed, Remembering, Overwriting]
KEEPING = [
    *PLAINLY,
    Masked, OfAnotherClass, OnAFrozenOne, Counting, LiveExtra, Nested, LateBuffer, GrowingQueue, Ranges, Spectral,
]  # fmt: skip
MOVING = [Moving, MovingByData, MovingByNewData, MovingByCopy, MaxNorm, Clamped, ClampedByData]
