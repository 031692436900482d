"""Random numbers of a compiled step are eager's, wherever generators are seeded in it, and the caller's are left alone."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compiled_runs import assert_alike, batches, first_state, folded, mlp, objective, run_as_it_is
from torch import nn
from torch.utils.checkpoint import checkpoint

from steploop import (
    Optimizer,
    TrainState,
    accumulate,
    backward_scaled,
    compile,  # noqa: A004  (steploop.compile, as in torch.compile)
    forward_loss,
    optimizer_step,
    unscale_and_clip,
)
from steploop.errors import CompileError


@pytest.fixture(autouse=True)
def _graphs_run_as_they_are(monkeypatch):
    run_as_it_is(monkeypatch)


def updated(state):
    return optimizer_step(unscale_and_clip(backward_scaled(state), max_norm=1.0))


def both(step, state, given, tolerance=1e-5):
    """Eager and compiled fold from one state, in surroundings whose generators both leave where they were."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    fast, compiled = compile(step), state.clone()
    for batch in given:
        state, compiled = step(state, batch), fast(compiled, batch)
        assert torch.allclose(state.loss, compiled.loss, rtol=1e-4)
    assert_alike(state, compiled, tolerance)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tobytes())  # noqa: NPY002
    return fast


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_dropout_has_the_mask_of_the_first_pass(reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = F.dropout(x, 0.3)
            h = checkpoint(
                lambda v: F.dropout(torch.tanh(self.one(v)), 0.5), x.requires_grad_(), use_reentrant=reentrant
            )
            return self.two(F.dropout(h, 0.2))

    both(lambda s, b: updated(forward_loss(s, b, objective)), first_state(Net()), batches(6))


def test_the_parts_of_a_batch_draw_what_they_draw_in_eager():
    def step(state, parts):
        return optimizer_step(unscale_and_clip(accumulate(state, parts, objective), max_norm=1.0))

    given = batches(8)
    both(step, first_state(mlp(dropout=0.4)), [(given[i], given[i - 1]) for i in range(8)])


def test_a_second_pass_of_a_step_draws_what_it_draws_in_eager():
    def step(state, batch):
        first = forward_loss(state, batch, lambda m, b: (objective(m, b)[0], m(b[0])))
        seen = first.outputs

        def near(model, b):
            return F.cross_entropy(model(b[0]), b[1]) + (model(b[0]) - seen).square().mean()

        return updated(forward_loss(first, batch, near))

    both(step, first_state(mlp(dropout=0.4)), batches(6))


def test_two_states_draw_apart():
    def step(states, batch):
        return {name: updated(forward_loss(s, batch, objective)) for name, s in states.items()}

    states = {"a": first_state(mlp(dropout=0.3), seed=1), "b": first_state(mlp(dropout=0.3), seed=2)}
    fast, compiled = compile(step), {k: s.clone() for k, s in states.items()}
    for batch in batches(5):
        states, compiled = step(states, batch), fast(compiled, batch)
    for name, state in states.items():
        assert_alike(state, compiled[name], 1e-5)


DRAWS = {
    "rand": torch.rand_like,
    "randn": lambda x: torch.randn(x.shape),
    "normal": lambda x: torch.empty_like(x).normal_(1.0, 2.0),
    "uniform": lambda x: torch.empty_like(x).uniform_(-1, 1),
    "exponential": lambda x: torch.empty_like(x).exponential_(),
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.3)),
    "bernoulli p": lambda x: torch.bernoulli(x, 0.3),
    "randint": lambda x: torch.randint(0, 5, x.shape).float(),
    "randperm": lambda x: x[torch.randperm(len(x))],
    "gumbel": F.gumbel_softmax,
    "multinomial": lambda x: torch.multinomial(x.exp(), 6, replacement=True).float(),
    "poisson": lambda x: torch.poisson(x.exp()),
    "normal of tensors": lambda x: torch.normal(x, x.exp()),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.2, training=True),
}
DEPEND_ON_VALUES = {"multinomial", "poisson", "normal of tensors", "rrelu", "bernoulli"}


def drawing(draw, again=1):
    def noisy(model, batch):
        x = batch[0]
        for _ in range(again):
            x = x + 0.1 * draw(model[0].weight.detach()[:6, :6])[:1]
        return F.cross_entropy(model(x), batch[1])

    return noisy


@pytest.mark.parametrize("name", list(DRAWS))
def test_every_kind_of_draw_in_one_pass_is_that_of_eager(name):
    both(lambda s, b: updated(forward_loss(s, b, drawing(DRAWS[name]))), first_state(), batches(3))


@pytest.mark.parametrize("name", list(DRAWS))
def test_every_kind_of_draw_in_two_passes_is_that_of_eager_or_refused(name):
    def step(state, batch):
        use = drawing(DRAWS[name], again=2)
        return updated(forward_loss(forward_loss(state, batch, use), batch, use))

    if name in DEPEND_ON_VALUES:
        state = folded(step, first_state(), batches(1))
        with pytest.raises(CompileError, match=r"draws with \w+, whose numbers depend on tensors"):
            compile(step)(state, batches(1)[0])
    else:
        both(step, first_state(), batches(3))


def test_seeds_and_forks_inside_of_a_pass_act_in_their_order():
    def forked(model, batch):
        x = batch[0] + 0.1 * torch.rand_like(batch[0])
        with torch.random.fork_rng():
            torch.manual_seed(7)
            x = x + 0.1 * torch.randn_like(x)
        kept = torch.get_rng_state()
        x = x * torch.rand_like(x)
        torch.set_rng_state(kept)
        return F.cross_entropy(model(x * torch.rand_like(x)), batch[1])

    both(lambda s, b: updated(forward_loss(s, b, forked)), first_state(), batches(4))


def test_draws_outside_of_a_pass_are_the_callers_generators():
    def step(state, batch):
        noisy = (batch[0] + torch.randn_like(batch[0]), batch[1])
        return updated(forward_loss(state, noisy, objective))

    state, given = first_state(mlp(dropout=0.3)), batches(5)
    fast, compiled = compile(step), state.clone()
    torch.manual_seed(4)
    eager = folded(step, state, given)
    after = torch.get_rng_state()
    torch.manual_seed(4)
    assert_alike(eager, folded(fast, compiled, given), 1e-5)
    assert torch.equal(after, torch.get_rng_state())


REFUSED = {
    "Python's random": random.random,
    "numpy.random": np.random.rand,
    "torch.seed()": lambda: torch.seed() * 0,
    "generator of its own": lambda: float(0) + torch.rand((), generator=torch.Generator().manual_seed(1)),
    "torch.initial_seed()": lambda: torch.initial_seed() * 0,
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_other_sources_of_chance_are_refused_by_name(name):
    def step(state, batch):
        return updated(forward_loss(state, batch, lambda m, b: objective(m, b)[0] * (1 + REFUSED[name]())))

    state = folded(step, first_state(), batches(1))
    with pytest.raises(CompileError, match=name.replace("(", r"\(").replace(")", r"\)")):
        compile(step)(state, batches(1)[0])


def test_a_graph_that_recomputes_follows_the_fold():
    """After a checkpointed step the same state goes on in eager, draw for draw."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(10))

    def recomputed(model, batch):
        return checkpoint(lambda w: F.dropout(w * batch, 0.5), model.weight, use_reentrant=False).sum()

    def step(state, batch):
        state = unscale_and_clip(
            backward_scaled(forward_loss(state, batch, recomputed)), max_norm=float("inf")
        )
        return optimizer_step(state)

    fast, state = compile(step), TrainState.create(Net(), Optimizer(torch.optim.SGD, lr=0.1))
    for number in range(6):
        before = state.params["weight"].detach().clone()
        state = (step if number == 3 else fast)(state, torch.ones(10))
        gradient = (before - state.params["weight"].detach()) / 0.1
        assert float((before * gradient).sum()) == pytest.approx(float(state.loss), rel=1e-4)
