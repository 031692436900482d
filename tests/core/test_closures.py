"""Optimizers that evaluate the loss themselves: LBFGS, SAM, a search along a line; against loops with a true closure."""

import math

import pytest
import torch
import torch.nn.functional as F
from forms import in_every_form
from torch import nn

from steploop import (
    LossScale,
    Optimizer,
    TrainState,
    accumulate,
    backward_scaled,
    forward_loss,
    optimizer_step,
    schedule,
    unscale_and_clip,
    update_ema,
)
from steploop.core.seeds import fold_in
from steploop.core.trees import first_difference, named_leaves
from steploop.errors import ConfigError, NonFiniteError, ObjectiveError, SpentStateError

INF = float("inf")


class SAM(torch.optim.SGD):
    """Climbs, evaluates there, comes back and steps; begins with an evaluation, as those do that ask for a closure."""

    def __init__(self, params, lr=0.1, rho=0.05, momentum=0.9):
        super().__init__(params, lr=lr, momentum=momentum)
        for group in self.param_groups:
            group["rho"] = rho

    @torch.no_grad()
    def step(self, closure):
        evaluate = torch.enable_grad()(closure)
        loss = evaluate()
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        climbs = [p.grad * (self.param_groups[0]["rho"] / (norm + 1e-12)) for p in params]
        for p, climb in zip(params, climbs, strict=True):
            p.add_(climb)
        evaluate()
        for p, climb in zip(params, climbs, strict=True):
            p.sub_(climb)
        super().step()
        return loss


class Halving(torch.optim.Optimizer):
    """Gradient descent that halves the step until the loss falls, and keeps how often it did."""

    def __init__(self, params, lr=4.0):
        super().__init__(params, {"lr": lr, "halvings": 0})

    @torch.no_grad()
    def step(self, closure):
        evaluate = torch.enable_grad()(closure)
        (group,) = self.param_groups
        before = float(evaluate())
        start = [p.clone() for p in group["params"]]
        grads = [p.grad.clone() for p in group["params"]]
        rate = group["lr"]
        for _ in range(6):
            for p, origin, grad in zip(group["params"], start, grads, strict=True):
                p.copy_(origin - rate * grad)
            if float(evaluate()) < before:
                break
            rate /= 2
            group["halvings"] += 1


class LooksAhead(torch.optim.Optimizer):
    """Nesterov's: goes on by its momentum, evaluates there for the first time, and keeps a trace everywhere it can."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "moved": torch.zeros(())})
        self.steps = 0

    @torch.no_grad()
    def step(self, closure):
        (group,) = self.param_groups
        for p in group["params"]:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.full_like(p, 0.01)
            p.add_(self.state[p]["momentum"], alpha=0.9)
        torch.enable_grad()(closure)()
        for p in group["params"]:
            self.state[p]["momentum"].mul_(0.9).sub_(p.grad, alpha=group["lr"])
            p.sub_(p.grad, alpha=group["lr"])
            group["moved"].add_(p.grad.norm())
        self.state.setdefault("all", {"moved": torch.zeros(())})["moved"].add_(group["moved"])
        self.steps += 1


class Remembers(torch.optim.SGD):
    """Steps with the gradient of before, and keeps that of afterwards."""

    def step(self, closure):
        evaluate = torch.enable_grad()(closure)
        evaluate()
        super().step()
        evaluate()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["newest"] = p.grad.clone()


# name -> class, options
EVALUATING = {
    "LBFGS": (torch.optim.LBFGS, {"lr": 0.3, "max_iter": 5, "history_size": 3}),
    "LBFGS with a line search": (
        torch.optim.LBFGS,
        {"lr": 1.0, "max_iter": 4, "line_search_fn": "strong_wolfe"},
    ),
    "SAM": (SAM, {}),
    "halving": (Halving, {}),
    "looks ahead": (LooksAhead, {}),
    "remembers": (Remembers, {}),
}


def network(seed=0):
    """Statistics and a count that move at every evaluation."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 2))


def batches(count=6):
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(6, 3, generator=generator), torch.randint(2, (6,), generator=generator))
        for _ in range(count)
    ]


def objective(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def gradients(batch, max_norm=INF):
    def closure(state):
        return unscale_and_clip(backward_scaled(forward_loss(state, batch, objective)), max_norm=max_norm)

    return closure


def step(state, batch, *, donate=True):
    return optimizer_step(state, closure=gradients(batch), donate=donate)


def create(name, *, other=False, **options):
    torch_class, given = EVALUATING[name]
    return TrainState.create(network(1 if other else 0), Optimizer(torch_class, **given), seed=3, **options)


def by_hand(name, data, max_norm=INF):
    """As the manual of torch.optim.LBFGS writes it; each evaluation is seeded with its number."""
    torch_class, given = EVALUATING[name]
    model = network()
    optimizer = torch_class(model.parameters(), **given)
    losses = []
    for index, batch in enumerate(data):
        evaluations = []

        def closure(index=index, batch=batch, evaluations=evaluations):
            torch.manual_seed(fold_in(3, index, len(evaluations)))
            optimizer.zero_grad()
            loss = objective(model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            evaluations.append(loss.item())
            return loss

        optimizer.step(closure)
        losses.append(evaluations)
    return model, optimizer, losses


def tensors_of(model):
    return {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("name", EVALUATING)
def test_it_is_the_loop_by_hand_in_every_form(name, tmp_path):
    data = batches()
    model, optimizer, losses = by_hand(name, data)
    named = dict(model.named_parameters())
    assert max(map(len, losses)) > (0 if name == "looks ahead" else 1)
    for form, state in in_every_form(
        lambda other=False: create(name, other=other), step, data, tmp_path
    ).items():
        assert first_difference({**state.params, **state.buffers}, tensors_of(model)) is None, form
        slots = {n: dict(optimizer.state[p]) if p in optimizer.state else {} for n, p in named.items()}
        assert first_difference({n: dict(s) for n, s in state.slots.items()}, slots) is None, form
        assert (state.step, state.attempted_steps, state.batch) == (6, 6, 6)
        if name != "looks ahead":  # whether to step is asked before it has moved
            assert state.loss == losses[-1][0]


@pytest.mark.parametrize("name", EVALUATING)
def test_every_evaluation_is_clipped_as_the_closure_says(name):
    data = batches(3)
    model, _, _ = by_hand(name, data, max_norm=0.2)
    state = create(name)
    for batch in data:
        state = optimizer_step(state, closure=gradients(batch, max_norm=0.2))
    assert first_difference(dict(state.params), dict(model.named_parameters())) is None


def test_a_closure_may_leave_out_the_clipping():
    plain, clipped = create("SAM"), create("SAM")
    for batch in batches(3):
        plain = optimizer_step(
            plain, closure=lambda s, b=batch: backward_scaled(forward_loss(s, b, objective))
        )
        clipped = step(clipped, batch)
    assert first_difference(dict(plain.params), dict(clipped.params)) is None
    assert plain.grad_norm == clipped.grad_norm


def test_gradients_that_the_state_has_are_those_that_the_step_begins_with():
    """They are not computed again for the question whether to step; the optimizer's own evaluations go on from them."""
    batch, seen = batches(1)[0], []

    def counting(model, data):
        seen.append(torch.rand(()))
        return objective(model, data)

    def closure(state):
        return unscale_and_clip(backward_scaled(forward_loss(state, batch, counting)), max_norm=INF)

    state = optimizer_step(closure(create("SAM")), closure=closure)
    assert len(seen) == 3
    assert len({float(x) for x in seen}) == 3
    seen.clear()
    optimizer_step(create("SAM"), closure=closure)
    assert len(seen) == 2
    assert state.step == 1


def test_micro_batches_under_a_closure_are_the_whole_batch():
    """Without BatchNorm and dropout, which see the parts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    optimizer = Optimizer(torch.optim.LBFGS, lr=0.5, max_iter=4)
    inputs, labels = batches(1)[0]
    inputs = inputs.double()
    whole = TrainState.create(model, optimizer)
    parts = whole.clone()
    halves = [(inputs[:2], labels[:2]), (inputs[2:], labels[2:])]
    whole = optimizer_step(whole, closure=gradients((inputs, labels)))
    parts = optimizer_step(parts, closure=lambda s: accumulate(s, halves, objective))
    torch.testing.assert_close(dict(parts.params), dict(whole.params))


def test_a_loss_scale_changes_no_bit_of_it():
    """The gradients that the optimizer sees are unscaled at every evaluation; the model computes in float32 here."""

    def in_float32(model, batch):
        with torch.autocast("cpu", enabled=False):
            return objective(model, batch)

    def closure(batch):
        return lambda s: backward_scaled(forward_loss(s, batch, in_float32))

    for name in EVALUATING:
        plain, scaled = create(name), create(name, precision="fp16", loss_scale=LossScale(scale=2.0**10))
        for batch in batches(3):
            plain = optimizer_step(plain, closure=closure(batch))
            scaled = optimizer_step(scaled, closure=closure(batch))
        assert first_difference(dict(plain.params), dict(scaled.params)) is None, name
        assert scaled.scale.growth_tracker == 3


def test_averages_and_schedules_go_with_it():
    state = create("LBFGS", ema=True)
    model, optimizer = network(), None
    optimizer = torch.optim.LBFGS(model.parameters(), **EVALUATING["LBFGS"][1])
    average = [p.detach().clone() for p in model.parameters()]
    state = schedule(state, lambda t: 0.5 / (1 + t))
    for index, batch in enumerate(batches(4)):
        state = schedule(update_ema(step(state, batch), decay=0.75), lambda t: 0.5 / (1 + t))
        optimizer.param_groups[0]["lr"] = 0.5 / (1 + index)
        number = 0

        def closure(index=index, batch=batch):
            nonlocal number
            torch.manual_seed(fold_in(3, index, number))
            number += 1
            optimizer.zero_grad()
            loss = objective(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
        average = [torch.lerp(a, p.detach(), 0.25) for a, p in zip(average, model.parameters(), strict=True)]
    assert first_difference(dict(state.params), dict(model.named_parameters())) is None
    assert first_difference(list(state.ema.values()), average) is None


class Momentum(nn.Module):
    """A frozen copy that follows the trained one by a little at every forward pass."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(3, 2), nn.Linear(3, 2)
        self.key.requires_grad_(requires_grad=False)

    def forward(self, x):
        with torch.no_grad():
            for k, q in zip(self.key.parameters(), self.query.parameters(), strict=True):
                k.lerp_(q, 0.1)
        return self.query(x) - self.key(x)


def test_what_every_evaluation_moves_is_moved_by_every_evaluation():
    def seeded():
        torch.manual_seed(0)
        return Momentum()

    options = EVALUATING["LBFGS"][1]
    model = seeded()
    optimizer = torch.optim.LBFGS(model.query.parameters(), **options)
    state = TrainState.create(seeded(), Optimizer(torch.optim.LBFGS, **options))
    for batch in batches(3):

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = objective(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
        state = step(state, batch)
    assert first_difference(dict(state.params), dict(model.named_parameters())) is None


def test_a_carry_goes_through_every_evaluation():
    batch, counted = batches(1)[0], []

    def closure(state):
        counted.append(state.carry)
        return gradients(batch)(state).with_carry(state.carry + 1)

    state = optimizer_step(create("LBFGS").with_carry(0), closure=closure)
    assert state.carry == len(counted) > 2
    assert counted == list(range(len(counted)))


# -- steps that are not finite ------------------------------------------------------------------------------------


def explosive_from(number):
    """Finite until evaluation ``number`` of the step, and then the loss overflows."""
    count = 0

    def loss(model, batch):
        nonlocal count
        count += 1
        return objective(model, batch) * (math.inf if count > number else 1.0)

    return loss


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", EVALUATING)
def test_a_step_with_an_evaluation_that_is_not_finite_is_never_taken(name, precision, number):
    """Whichever evaluation it is: parameters, slots, buffers and counts are those that the step began with."""
    data, scale = batches(3), {"loss_scale": LossScale(scale=8.0)} if precision == "fp16" else {}
    state = step(create(name, precision=precision, ema=True, **scale), data[0])
    clean, before = state.clone(), state.clone()
    explosive = explosive_from(number)
    state = optimizer_step(state, closure=lambda s: backward_scaled(forward_loss(s, data[1], explosive)))
    if number and name in {"halving", "LBFGS with a line search"}:  # they come back towards where they were
        held = named_leaves([dict(state.params), dict(state.buffers), dict(state.slots)])
        assert all(t.isfinite().all() for _, t in held if isinstance(t, torch.Tensor))
        return
    if number == {"SAM": 2, "remembers": 2, "looks ahead": 2}.get(name):
        assert state.finite is True  # it evaluates twice, one of them ours: there is no third
        return
    assert (state.finite, state.step, state.attempted_steps, state.nonfinite_steps) == (False, 1, 2, 1)
    for field in ("params", "buffers", "slots", "ema"):
        assert first_difference(dict(getattr(state, field)), dict(getattr(before, field))) is None, field
    assert first_difference(list(state.hyper), list(before.hyper)) is None
    assert first_difference(state.tensors.beside, before.tensors.beside) is None
    if precision == "fp16":
        assert state.scale.scale == before.scale.scale / 2
    state, clean = step(state, data[2]), step(clean.replace(attempted_steps=2), data[2])
    assert first_difference(dict(state.params), dict(clean.params)) is None
    assert first_difference(dict(state.slots), dict(clean.slots)) is None


def test_a_line_search_that_comes_back_from_a_loss_that_overflows_is_taken():
    """torch's own tries a shorter step: that is what it is for."""

    def steep(model, batch):
        (w,) = model.parameters()
        return torch.exp((w + 0.5) * 200).sum() + (w - 1).square().sum()

    def make():
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    options = {"lr": 1.0, "max_iter": 3, "line_search_fn": "strong_wolfe"}
    model = make()
    with torch.no_grad():
        model.weight.fill_(-1.0)
    optimizer = torch.optim.LBFGS(model.parameters(), **options)
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = steep(model, None)
        loss.backward()
        seen.append(loss.item())
        return loss

    state_model = make()
    with torch.no_grad():
        state_model.weight.fill_(-1.0)
    state = TrainState.create(state_model, Optimizer(torch.optim.LBFGS, **options))
    state = optimizer_step(state, closure=lambda s: backward_scaled(forward_loss(s, None, steep)))
    optimizer.step(closure)
    assert math.inf in seen
    assert (state.finite, state.step) == (True, 1)
    assert first_difference(dict(state.params), dict(model.named_parameters())) is None


def test_too_many_such_steps_stop_the_run():
    state, batch = create("LBFGS"), batches(1)[0]
    for index in range(3):
        explosive = explosive_from(1)
        if index == 2:
            with pytest.raises(NonFiniteError, match=r"^3 steps in a row had gradients that were not finite"):
                optimizer_step(
                    state,
                    closure=lambda s, e=explosive: backward_scaled(forward_loss(s, batch, e)),
                    max_nonfinite_steps=3,
                )
        else:
            state = optimizer_step(
                state, closure=lambda s, e=explosive: backward_scaled(forward_loss(s, batch, e))
            )


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVALUATING)
def test_without_a_closure_it_is_refused_with_the_form_that_works(name):
    state = create(name)
    ready = gradients(batches(1)[0])(state)
    kind = EVALUATING[name][0].__name__
    with pytest.raises(ConfigError) as caught:
        optimizer_step(ready)
    assert str(caught.value) == (
        f"optimizer_step: {kind} evaluates the loss itself, several times in a step. Give it a function that does so: "
        "optimizer_step(state, closure=lambda state: backward_scaled(forward_loss(state, batch, objective)))."
    )
    assert state.alive


@pytest.mark.parametrize(
    "closure",
    [
        lambda state: None,
        lambda state: forward_loss(state, batches(1)[0], objective),
        lambda state: gradients(batches(1)[0])(state.clone()),
        lambda state: gradients(batches(1)[0])(create("SAM", other=True)),
        lambda state: (state, 1.0),
    ],
    ids=["nothing", "no gradients", "a copy", "another state", "a pair"],
)
def test_a_closure_that_returns_something_else_is_refused(closure):
    state = create("SAM")
    with pytest.raises(ObjectiveError) as caught:
        optimizer_step(state, closure=closure)
    assert str(caught.value) == (
        "optimizer_step: the closure must return the state that it was given, with gradients: "
        "backward_scaled(forward_loss(state, batch, objective))."
    )
    assert state.alive


def test_an_error_in_a_later_evaluation_leaves_the_state_spent_and_a_pure_step_leaves_it_whole():
    batch, calls = batches(1)[0], []

    def failing(state):
        calls.append(1)
        if len(calls) % 2 == 0:
            raise KeyboardInterrupt
        return gradients(batch)(state)

    state = create("SAM")
    with pytest.raises(KeyboardInterrupt):
        optimizer_step(state, closure=failing, donate=False)
    before = {n: p.detach().clone() for n, p in state.params.items()}
    with pytest.raises(KeyboardInterrupt):
        optimizer_step(state, closure=failing)
    with pytest.raises(SpentStateError, match="an update was cut off in the middle of attempted step 0"):
        _ = state.params
    assert first_difference(before, dict(create("SAM").params)) is None
