"""Sound recipes whose batches are no tensors with the samples along the first axis; ``kind`` says which."""

from functools import partial

import attrs
import torch
import torch.nn.functional as F
from torch import nn

from steploop import (
    EarlyStopping,
    Optimizer,
    ReduceLROnPlateau,
    TrainState,
    accumulate,
    backward_scaled,
    constant,
    evaluate,
    forward_loss,
    optimizer_step,
    schedule,
    unscale_and_clip,
)
from steploop.data import Loader
from steploop.recipe import Recipe


@attrs.frozen(kw_only=True)
class Config:
    kind: str = "dense"
    epochs: int = 2


class Source:
    """Four batches, the same in every epoch."""

    def __init__(self, make):
        self.make = make

    def epoch(self, epoch, start=0):
        for number in range(start, len(self)):
            generator = torch.Generator().manual_seed(100 * epoch + number)
            yield self.make(partial(torch.randn, generator=generator))

    def __len__(self):
        return 4


class Graph:
    """What a graph library gives: an object that knows its tensors, and is equal to itself alone."""

    def __init__(self, nodes, edges, targets):
        self.nodes, self.edges, self.targets = nodes, edges, targets


def _targets(x):
    return x.sum(-1, keepdim=True)


def _dense(randn):
    x = randn(12, 3)
    return x, _targets(x)


def _sparse(randn):
    x = F.relu(randn(12, 3))
    return x.to_sparse(), _targets(x)


def _edges(randn):
    x = randn(12, 3)
    return {"nodes": x, "edges": torch.tensor([[0, 3, 11, 9], [1, 11, 2, 10]]), "targets": _targets(x)}


def _adjacency(randn):
    x, adjacency = randn(12, 3), torch.eye(12).roll(1, 0)
    return x, adjacency, _targets(adjacency @ x)


def _object(randn):
    graph = _edges(randn)
    return Graph(graph["nodes"], graph["edges"], graph["targets"])


def _time_first(randn):
    x = randn(12, 2, 3)
    return x, x.cumsum(0).sum(-1, keepdim=True)


def _micro_batches(randn):
    return [(x, _targets(x)) for x in (randn(size, 3) for size in (11, 10, 4))]


def _plain(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


def _of_sparse(model, batch):
    x, y = batch
    return F.mse_loss(torch.sparse.mm(x, model.weight.T) + model.bias, y)


def _of_edges(model, batch):
    fields = batch if isinstance(batch, dict) else vars(batch)
    x, (sources, targets) = fields["nodes"], fields["edges"]
    return F.mse_loss(model(x.index_add(0, targets, x[sources])), fields["targets"])


def _of_adjacency(model, batch):
    x, adjacency, y = batch
    return F.mse_loss(model(adjacency @ x), y)


def _of_series(model, batch):
    x, y = batch
    hidden, total = torch.zeros(x.shape[1], 1), 0.0
    for moment, target in zip(x, y, strict=True):
        hidden = model(moment) + 0.5 * hidden
        total = total + F.mse_loss(hidden, target)
    return total / len(x)


class PerRow(nn.Linear):
    """A layer that remembers something of each row: it takes batches of 12 alone."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("seen", torch.zeros(12, 1))

    def forward(self, x):
        y = super().forward(x)
        self.seen.mul_(0.5).add_(y.detach())
        return y - 0.1 * self.seen


# kind -> what makes a batch, and the objective
KINDS = {
    "dense": (_dense, _plain),
    "sparse": (_sparse, _of_sparse),
    "edges": (_edges, _of_edges),
    "adjacency": (_adjacency, _of_adjacency),
    "object": (_object, _of_edges),
    "time first": (_time_first, _of_series),
    "micro-batches": (_micro_batches, _plain),
    "rows": (_dense, _plain),
    "plateau": (_dense, _plain),
    "samples_of": (_edges, _of_edges),
    "carry": (_time_first, _of_series),
    "policy": (lambda _: 1, None),
}


def _of_carried_series(model, batch, *, hidden):
    """The hidden state goes on from batch to batch, as in truncated backpropagation."""
    x, y = batch
    total = 0.0
    for moment, target in zip(x, y, strict=True):
        hidden = model(moment) + 0.5 * hidden
        total = total + F.mse_loss(hidden, target)
    return total / len(x), hidden, len(x)


def _of_policy(model, _):
    """The data are drawn from what the model does."""
    places = model(torch.randn(6, 3))
    return (places + 0.1 * torch.randn_like(places)).square().mean(), None, 6


def _first_nodes(graph, n):
    few = graph["edges"].max(0).values < n
    return {"nodes": graph["nodes"][:n], "edges": graph["edges"][:, few], "targets": graph["targets"][:n]}


def build(config: Config, device: torch.device) -> Recipe:
    make, objective = KINDS[config.kind]
    objective = objective or _of_policy

    def train_step(state, batch):
        if config.kind == "plateau":
            state = schedule(
                state, constant(state.plateau.learning_rate / (1 + state.early_stopping.bad_checks))
            )
        if config.kind == "micro-batches":
            state = accumulate(state, batch, objective)
        elif config.kind == "carry":
            state = forward_loss(state, batch, partial(_of_carried_series, hidden=state.carry))
            state = backward_scaled(state.with_carry(state.outputs))
        else:
            state = backward_scaled(forward_loss(state, batch, objective))
        return optimizer_step(unscale_and_clip(state, max_norm=1.0))

    torch.manual_seed(0)
    model = (PerRow if config.kind == "rows" else nn.Linear)(3, 1)
    batches = Source(make)
    if config.kind == "rows":
        x = torch.randn(48, 3)
        batches = Loader((x, _targets(x)), batch_size=12, seed=0)
    judged = next(iter(Source(make).epoch(7)))
    return Recipe(
        state=TrainState.create(
            model,
            Optimizer(torch.optim.SGD, lr=0.05),
            carry=torch.zeros(2, 1) if config.kind == "carry" else None,
        ),
        train_step=train_step,
        batches=batches,
        epochs=config.epochs,
        objective=objective,
        evaluate=lambda s: evaluate(
            s,
            judged if config.kind == "micro-batches" else [judged],
            objective if config.kind == "policy" else lambda m, b: (objective(m, b), None, 12),
        ),
        monitor="loss",
        early_stopping=EarlyStopping(patience=2, monitor="loss") if config.kind == "plateau" else None,
        plateau=ReduceLROnPlateau(lr=0.1) if config.kind == "plateau" else None,
        samples_of=_first_nodes if config.kind == "samples_of" else None,
    )
