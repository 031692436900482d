"""The states whose checkpoints 0.1.0 wrote (tests/golden/0.1.0), and the steps that go on with them.

Written under 0.1.0 and not to be changed: the recorded digests are those of these models, optimizers, batches and steps.

    KINDS                    names of the checkpoints
    build(kind)              a first state, or several by name: the ``like`` of ``checkpoint.load``; other weights than the saved ones
    go_on(kind, state)       the state after further steps of the kind's own train step
    values_digest(state)     SHA-256 of names, dtypes, shapes and bits of all tensors and of the counters, in no file format
"""

import hashlib
import math
from functools import reduce

import attrs
import torch
import torch.nn.functional as F
from torch import nn

from steploop import (
    EarlyStopping,
    LossScale,
    Optimizer,
    ReduceLROnPlateau,
    TrainState,
    accumulate,
    backward_scaled,
    forward_loss,
    optimizer_step,
    schedule,
    unscale_and_clip,
    update_ema,
    warmup_cosine,
)

EARLY = EarlyStopping(patience=3, min_delta=0.001)
PLATEAU = ReduceLROnPlateau(lr=0.02, factor=0.5, patience=0, cooldown=1)
RATE = warmup_cosine(0.05, warmup_steps=3, total_steps=20)


# -- models ---------------------------------------------------------------------------------------------------------


def images(number):
    """Batch ``number`` of a fixed sequence: images (6, 3, 4, 4), labels (6,)."""
    g = torch.Generator().manual_seed(1000 + number)
    return torch.randn(6, 3, 4, 4, generator=g), torch.randint(0, 5, (6,), generator=g)


def cnn():
    """Convolution, BatchNorm, dropout, linear."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(16, 5)
    )


class Frozen(nn.Module):
    """A frozen stem, a body, a head; a buffer that is not persistent, and an integer one."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(48, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.stem.requires_grad_(requires_grad=False)
        self.register_buffer("mask", torch.rand(6).round(), persistent=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.seen.add_(len(x))
        x = torch.tanh(self.stem(x.flatten(1))) * (0.5 + self.mask)
        return self.head(torch.relu(self.body(x))) * self.scale


class Tied(nn.Module):
    """An embedding whose weight is the head's too, with LayerNorm between."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, codes):
        return self.head(self.norm(self.embedding(codes)))


class Strange(nn.Module):
    """float64, complex64, complex128 and float32 parameters; a uint8, a bool and a nan-holding buffer."""

    def __init__(self):
        super().__init__()
        self.real64 = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.real32 = nn.Parameter(torch.randn(2, 3))
        self.complex64 = nn.Parameter(torch.randn(2, dtype=torch.complex64))
        self.complex128 = nn.Parameter(torch.randn(2, 2, dtype=torch.complex128))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("bytes", torch.arange(5, dtype=torch.uint8))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("odd", torch.tensor([math.nan, math.inf, -math.inf, -0.0]))

    def forward(self, x):
        y = (self.real32 @ x).double().sum() + (self.real64 * x[:, 0]).sum() + self.empty.sum().double()
        return y**2 + (self.complex64.abs() ** 2).sum().double() + (self.complex128.abs() ** 2).sum()


# -- objectives and steps -------------------------------------------------------------------------------------------


def classified(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def squared(model, batch):
    return model(batch)


def plain_step(state, batch, objective=classified, max_norm=1.0):
    state = backward_scaled(forward_loss(state, batch, objective))
    return optimizer_step(unscale_and_clip(state, max_norm=max_norm))


def full_step(state, batch):
    """With an average, and folds of the loss every second step."""
    state = update_ema(plain_step(state, batch), decay=0.9)
    if state.attempted_steps % 2 == 0 and math.isfinite(float(state.loss)):
        loss = float(state.loss)
        early = EARLY.update(state.early_stopping or EARLY.init(), loss)
        plateau = PLATEAU.update(state.plateau or PLATEAU.init(), loss)
        state = attrs.evolve(state, early_stopping=early, plateau=plateau)
    return schedule(state, lambda _: state.plateau.learning_rate) if state.plateau else state


def grouped_step(state, batch):
    return schedule(plain_step(state, batch), RATE)


def parts_step(state, batch):
    """Micro-batches of unequal size."""
    parts = [tuple(t[:4] for t in batch), tuple(t[4:] for t in batch)]
    return update_ema(
        optimizer_step(unscale_and_clip(accumulate(state, parts, classified), max_norm=0.5)), decay=0.99
    )


def codes(number):
    g = torch.Generator().manual_seed(2000 + number)
    return torch.randint(0, 7, (8,), generator=g), torch.randint(0, 7, (8,), generator=g)


def vectors(number):
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(3000 + number))


def rows(number):
    batch, labels = images(number)
    return batch.flatten(1)[:, :6], labels % 3


def each(step):
    """The step over several states by name."""

    def all_of_them(states, batch):
        return {name: step(state, batch) for name, state in states.items()}

    return all_of_them


def mixed_step(states, batch):
    return {
        "teacher": plain_step(states["teacher"], batch, max_norm=math.inf),
        "student": update_ema(plain_step(states["student"], batch), decay=0.5),
        "tied": plain_step(states["tied"], codes(states["tied"].attempted_steps)),
    }


# -- first states ---------------------------------------------------------------------------------------------------


def full(seed):
    torch.manual_seed(seed)
    return TrainState.create(
        cnn(), Optimizer(torch.optim.AdamW, lr=0.02, betas=(0.8, 0.95), weight_decay=0.1, no_decay=True),
        seed=11, precision="fp16", ema=True, memory_format=torch.channels_last,
        loss_scale=LossScale(scale=2.0**20, growth_interval=3, backoff_factor=0.25, floor=2.0),
    )  # fmt: skip


def sgd_groups(seed):
    torch.manual_seed(seed)
    optimizer = Optimizer(
        torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01, no_decay=True,
        groups=[("head.*", {"lr": 0.5}), (["scale"], {"momentum": 0.5, "nesterov": False})],
    )  # fmt: skip
    return schedule(TrainState.create(Frozen(), optimizer, seed=2**63 - 1), RATE)


def lbfgs(seed):
    torch.manual_seed(seed)
    return TrainState.create(
        nn.Linear(6, 3), Optimizer(torch.optim.LBFGS, lr=0.2, max_iter=1, history_size=3)
    )


def bf16_parts(seed):
    torch.manual_seed(seed)
    return TrainState.create(
        cnn(),
        Optimizer(torch.optim.RMSprop, lr=1e-3, centered=True, momentum=0.5),
        precision="bf16",
        ema=True,
        seed=3,
    )


def strange(seed):
    torch.manual_seed(seed)
    return TrainState.create(Strange(), Optimizer(torch.optim.Adam, lr=0.01, amsgrad=True), seed=4)


def several(seed):
    torch.manual_seed(seed)
    teacher = TrainState.create(cnn(), Optimizer(torch.optim.SGD, lr=0.01), seed=5)
    student = TrainState.create(
        cnn(), Optimizer(torch.optim.AdamW, lr=0.01, amsgrad=True), seed=6, precision="fp16", ema=True,
        loss_scale=LossScale(scale=1024.0),
    )  # fmt: skip
    return {
        "teacher": teacher,
        "student": student,
        "tied": TrainState.create(Tied(), Optimizer(torch.optim.Adam, lr=0.1)),
    }


OPTIMIZERS = {
    "adadelta": Optimizer(torch.optim.Adadelta, lr=0.5),
    "adagrad": Optimizer(torch.optim.Adagrad, lr=0.05, lr_decay=0.01),
    "adamax": Optimizer(torch.optim.Adamax, lr=0.01),
    "asgd": Optimizer(torch.optim.ASGD, lr=0.05, t0=3),
    "nadam": Optimizer(torch.optim.NAdam, lr=0.01, decoupled_weight_decay=True, weight_decay=0.1),
    "radam": Optimizer(torch.optim.RAdam, lr=0.01),
    "rprop": Optimizer(torch.optim.Rprop, lr=0.01),
    "adafactor": Optimizer(torch.optim.Adafactor, lr=0.05),
    "muon": Optimizer(torch.optim.Muon, lr=0.05),
    "adam_tensor_lr": Optimizer(torch.optim.Adam, lr=torch.tensor(0.01), capturable=False, foreach=False),
}


def optimizers(seed):
    torch.manual_seed(seed)
    return {
        name: TrainState.create(nn.Linear(6, 3, bias=name != "muon"), optimizer, seed=7)
        for name, optimizer in OPTIMIZERS.items()
    }


def untouched(seed):
    """A state before its first step: no slots yet."""
    torch.manual_seed(seed)
    return TrainState.create(nn.Linear(6, 3), Optimizer(torch.optim.Adam, lr=0.01), ema=True)


# kind: the first state, the step, its batches, how many steps were taken before it was saved
_KINDS = {
    "full": (full, full_step, images, 9),
    "sgd_groups": (sgd_groups, grouped_step, images, 6),
    "lbfgs": (lbfgs, plain_step, rows, 6),
    "bf16_parts": (bf16_parts, parts_step, images, 4),
    "strange": (strange, lambda state, batch: plain_step(state, batch, squared), vectors, 4),
    "several": (several, mixed_step, images, 4),
    "optimizers": (optimizers, each(plain_step), rows, 4),
    "untouched": (untouched, plain_step, rows, 0),
}
KINDS = tuple(_KINDS)


def build(kind):
    """A first state, with other weights than the saved one's."""
    return _KINDS[kind][0](1)


def go_on(kind, state, count):
    """``count`` further steps, on the batches that follow those that were seen."""
    _, step, batches, taken = _KINDS[kind]
    return reduce(step, (batches(number) for number in range(taken, taken + count)), state)


def values_digest(state):
    """What the state holds, in no file format: a digest that a new format of files leaves as it is."""
    hasher = hashlib.sha256()
    for name, one in sorted((state if isinstance(state, dict) else {"": state}).items()):
        leaves = [(f"params.{n}", t) for n, t in one.params.items()] + [
            (f"buffers.{n}", t) for n, t in one.buffers.items()
        ]
        leaves += [(f"ema.{n}", t) for n, t in (one.ema or {}).items()]
        leaves += [
            (f"slots.{n}.{key}", value)
            for n, slots in one.slots.items()
            for key, value in sorted(slots.items())
        ]
        leaves += [
            (f"hyper.{n}.{key}", value)
            for n, group in enumerate(one.hyper)
            for key, value in sorted(group.items())
        ]
        leaves += [
            (key, getattr(one, key))
            for key in (
                "seed",
                "epoch",
                "batch",
                "attempted_steps",
                "applied_steps",
                "nonfinite_steps",
                "precision",
            )
        ]
        for key, value in leaves:
            hasher.update(f"{name}|{key}|{_text(value)}\n".encode())
        for fold in (one.scale, one.early_stopping, one.plateau, one.best):
            hasher.update(f"{None if fold is None else _text(attrs.asdict(fold))}\n".encode())
    return hasher.hexdigest()


def _text(value):
    if isinstance(value, torch.Tensor):
        bits = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(bits).hexdigest()}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_text(v)}" for key, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(map(_text, value))})"
    return repr(value)
