"""Generate small classification tasks: networks with unusual parts, and their batches."""

from typing import Any

import attrs
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from steploop.core.optimizer import Optimizer
from steploop.core.state.train_state import TrainState
from steploop.testing.strategies.optimizers import optimizers

__all__ = ["Batch", "Network", "Task", "batches", "classification", "models", "runs", "states", "tasks"]

# inputs (B, F) float32, labels (B,) int64
Batch = tuple[Tensor, Tensor]
IGNORED = -100  # the label that cross entropy leaves out


class Network(nn.Module):
    """A perceptron with optional parts; ``Task`` describes them."""

    def __init__(self, task: "Task") -> None:
        super().__init__()
        width = task.width
        self.first = nn.Linear(task.features, width)
        self.norm = nn.BatchNorm1d(width) if task.batch_norm else nn.Identity()
        self.dropout = nn.Dropout(task.dropout)
        self.middle = nn.Linear(width, width) if task.tied or task.frozen else None
        self.again = nn.Linear(width, width) if task.tied else None
        if self.again is not None and self.middle is not None:
            self.again.weight = self.middle.weight
        self.unused = nn.Linear(2, 3) if task.unused else None
        self.temperature = nn.Parameter(torch.ones(())) if task.scalar else None
        self.head = nn.Linear(width, task.classes)
        if task.counter:
            self.register_buffer("calls", torch.zeros(()))
        self._generate(torch.Generator().manual_seed(task.seed))
        if task.frozen and self.middle is not None:
            self.middle.bias.requires_grad_(False)  # noqa: FBT003  (torch's signature)

    def _generate(self, generator: torch.Generator) -> None:
        """Draw all parameters from the seed, biases too, which torch may set to 0."""
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.empty_like(p).uniform_(-0.8, 0.8, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """(B, F) -> (B, C)."""
        x = self.dropout(torch.tanh(self.norm(self.first(x))))
        if self.middle is not None:
            x = torch.tanh(self.middle(x))
        if self.again is not None:
            x = torch.tanh(self.again(x))
        logits: Tensor = self.head(x)
        if self.training and isinstance(calls := getattr(self, "calls", None), Tensor):
            self.calls = calls + 1.0  # a buffer that is replaced, where BatchNorm's are written into
        return logits if self.temperature is None else logits * self.temperature


def classification(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Cross entropy: (loss, {"logits": (B, C)}, how many labels count); the label -100 is left out."""
    inputs, labels = batch
    logits = model(inputs)
    loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED)
    return loss, {"logits": logits}, (labels != IGNORED).sum()


@attrs.frozen(kw_only=True)
class Task:
    """A network and its data as functions of ``seed``; its repr rebuilds it.

    Attributes:
        seed: of the parameters and of the data.
        features: F, the width of an input.
        width: of the hidden layers.
        classes: C.
        batch_norm: a BatchNorm1d, whose statistics are buffers that change in training.
        dropout: the probability of a Dropout.
        tied: one weight that stands in two layers.
        frozen: a parameter that requires no gradient.
        unused: a layer that the loss does not depend on.
        scalar: a parameter of shape ().
        counter: a buffer that ``forward`` puts a new tensor in the place of.
    """

    seed: int = 0
    features: int = 3
    width: int = 4
    classes: int = 3
    batch_norm: bool = False
    dropout: float = 0.0
    tied: bool = False
    frozen: bool = False
    unused: bool = False
    scalar: bool = False
    counter: bool = False

    def model(self) -> Network:
        """Make a new network, the same at every call, without moving the global generators."""
        before = torch.default_generator.get_state()
        try:
            return Network(self)
        finally:
            torch.default_generator.set_state(before)

    def batch(self, index: int, size: int = 4, *, ignored: float = 0.0) -> Batch:
        """Make batch ``index``: inputs (size, F), labels (size,), a share ``ignored`` of them -100."""
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        inputs = torch.empty(size, self.features).normal_(generator=generator)
        labels = torch.randint(self.classes, (size,), generator=generator)
        out = torch.rand(size, generator=generator) < ignored
        return inputs, labels.masked_fill(out, IGNORED)

    def batches(self, count: int, size: int = 4) -> list[Batch]:
        """Make the first ``count`` batches."""
        return [self.batch(index, size) for index in range(count)]

    def state(self, optimizer: Optimizer | None = None, **options: Any) -> TrainState:
        """Make the first state over a new network; options as for ``TrainState.create``."""
        return TrainState.create(
            self.model(), optimizer or Optimizer(torch.optim.SGD, lr=0.1, momentum=0.9), **options
        )


@st.composite
def tasks(draw: st.DrawFn, /, **parts: Any) -> Task:
    """Any task; parts that are given (``batch_norm=False``, ...) are not drawn."""
    drawn: dict[str, st.SearchStrategy[Any]] = {
        "seed": st.integers(0, 2**20),
        "features": st.integers(1, 4),
        "width": st.integers(1, 5),
        "classes": st.integers(2, 4),
        "dropout": st.sampled_from([0.0, 0.5]),
        **dict.fromkeys(("batch_norm", "tied", "frozen", "unused", "scalar", "counter"), st.booleans()),
    }
    fields: dict[str, Any] = {
        name: parts[name] if name in parts else draw(strategy, label=name) for name, strategy in drawn.items()
    }
    return Task(**fields)


def models(**parts: Any) -> st.SearchStrategy[Network]:
    """Networks with and without BatchNorm and dropout, tied weights, frozen, unused and 0-dim parameters."""
    return tasks(**parts).map(Task.model)


def batches(task: Task, *, min_size: int = 2, max_size: int = 6) -> st.SearchStrategy[Batch]:
    """Batches of a task, by default of at least the two samples that BatchNorm needs."""
    return st.builds(task.batch, st.integers(0, 999), st.integers(min_size, max_size))


@st.composite
def runs(draw: st.DrawFn, task: Task, *, min_batches: int = 1, max_batches: int = 4) -> list[Batch]:
    """The batches of a short run, of different sizes."""
    return draw(st.lists(batches(task), min_size=min_batches, max_size=max_batches))


@st.composite
def states(
    draw: st.DrawFn,
    task: Task,
    *,
    precisions: tuple[str, ...] = ("fp32", "bf16", "fp16"),
    ema: bool | None = None,
) -> TrainState:
    """First states of runs: any dense optimizer, seed and precision."""
    return task.state(
        draw(optimizers(task.model())),
        seed=draw(st.integers(0, 2**63 - 1)),
        precision=draw(st.sampled_from(precisions)),
        ema=draw(st.booleans()) if ema is None else ema,
    )
