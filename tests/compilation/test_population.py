"""A population is its members' single runs: values, draws, skips, ends, checkpoints; what cannot be one graph is refused."""

import functools
import warnings

import attrs
import pytest
import torch
import torch.nn.functional as F
from compiled_runs import (
    assert_alike,
    batches,
    mlp,
    needs_compiler,
    objective,
    run_as_it_is,
)
from torch import nn

from steploop import (
    ConfigError,
    LossScale,
    Optimizer,
    TrainState,
    backward_scaled,
    checkpoint,
    forward_loss,
    optimizer_step,
    schedule,
    unscale_and_clip,
    update_ema,
)
from steploop.compilation.population import stack, unstack, vmap
from steploop.compilation.population.running_members import RunningMembers
from steploop.core.early_stopping import StoppingState
from steploop.core.trees import first_difference
from steploop.errors import CompileError, NonFiniteError, SpentStateError

STEPS = 20
TOLERANCE = 1e-6


@pytest.fixture(autouse=True)
def _graphs_run_as_they_are(monkeypatch):
    run_as_it_is(monkeypatch)


def step_of(rate, max_norm=1.0, loss=objective):
    """A train step with a schedule and a clipping of its own."""

    def train_step(state, batch):
        state = backward_scaled(forward_loss(state, batch, loss))
        state = optimizer_step(unscale_and_clip(state, max_norm=max_norm))
        return schedule(state, lambda step: rate * 0.97**step)

    return train_step


class TinyConvolution(nn.Module):
    """Convolution, BatchNorm, pooling; no bias before the norm, where its gradient would be rounding noise."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.out = nn.Linear(3, 4)

    def forward(self, x):
        x = x.reshape(-1, 1, 2, 3).repeat(1, 1, 2, 2)
        return self.out(F.max_pool2d(self.norm(self.conv(x)).relu(), 2).amax((2, 3)))


class TinyAttention(nn.Module):
    """One head over the six numbers of a sample; keys without a bias, whose gradient is 0."""

    def __init__(self):
        super().__init__()
        self.inwards = nn.Linear(1, 12, bias=False)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 4)

    def forward(self, x):
        q, k, v = self.inwards(x.unsqueeze(-1)).chunk(3, dim=-1)
        return self.out(self.norm(F.scaled_dot_product_attention(q, k, v)).mean(1))


class TinyRecurrent(nn.Module):
    """A bidirectional LSTM over the six numbers of a sample."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True, bidirectional=True)
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        return self.out(self.lstm(x.reshape(-1, 3, 2))[0][:, -1])


CASES = {
    "dropout and AdamW": (
        lambda: mlp(dropout=0.3),
        torch.optim.AdamW,
        [{"weight_decay": 0.0}, {"weight_decay": 0.1}, {"weight_decay": 0.2, "betas": (0.8, 0.99)}],
    ),
    "BatchNorm and SGD": (
        TinyConvolution,
        torch.optim.SGD,
        [{"momentum": 0.9}, {"momentum": 0.8, "weight_decay": 1e-2}, {"momentum": 0.5}],
    ),
    "attention and SGD": (TinyAttention, torch.optim.SGD, [{}, {}]),
    "LSTM and SGD": (TinyRecurrent, torch.optim.SGD, [{}, {}]),
}
RATES = [0.01, 0.003, 0.02]


def members(case="dropout and AdamW"):
    """Three states with weights, seeds and rates of their own."""
    make, kind, settings = CASES[case]
    states = []
    for seed, (rate, more) in enumerate(zip(RATES, settings, strict=False)):
        model = make()
        torch.manual_seed(seed)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        states.append(TrainState.create(model, Optimizer(kind, lr=rate, **more), seed=seed))
    return states


def one_step_for_all(state, batch):
    state = backward_scaled(forward_loss(state, batch, objective))
    return optimizer_step(unscale_and_clip(state, max_norm=1.0))


def a_population(states=None, steps=3):
    """A population that has been stepped, and its step."""
    step = vmap(one_step_for_all)
    return step, functools.reduce(step, batches(steps), stack(small_members() if states is None else states))


def small_members(count=3, **settings):
    states = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 4))
        states.append(
            TrainState.create(
                model, Optimizer(torch.optim.SGD, lr=0.1 + seed / 10, momentum=0.9), seed=seed, **settings
            )
        )
    return states


def bits(state):
    """All of a state that a checkpoint keeps."""
    return {
        "params": dict(state.params), "buffers": dict(state.buffers), "slots": state.tensors.slots, "ema": state.tensors.ema,
        "carry": state.carry, "hyper": state.hyper, "scale": state.scale, "attempted": state.attempted_steps,
        "applied": state.applied_steps, "nonfinite": state.nonfinite_steps, "batch": state.batch,
    }  # fmt: skip


# -- a member is its single run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_member_equals_its_single_run(case):
    """Values, rates, decay, schedule, clipping by its own norm and draws are each member's own."""
    given = batches(STEPS)
    steps = [step_of(rate, norm) for rate, norm in zip(RATES, (1.0, 0.3, 0.1), strict=True)]
    steps = steps[: len(CASES[case][2])]
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error"
        )  # torch warns where it batches a call by calling it once for each member
        population = functools.reduce(vmap(steps), given, stack(members(case)))
    for step, state, member in zip(steps, members(case), population, strict=True):
        single = functools.reduce(step, given, state)
        assert_alike(single, member, 1e-3)  # slots have entries of all sizes
        for name, value in {**single.params, **single.buffers}.items():
            torch.testing.assert_close(
                getattr(member, "params" if name in member.params else "buffers")[name],
                value,
                rtol=TOLERANCE,
                atol=TOLERANCE,
            )


def test_muon_orthogonalizes_each_members_matrix():
    """In bfloat16, whose products torch sums in another order for a batch of matrices."""

    def states():
        return [
            TrainState.create(nn.Linear(6, 4, bias=False), Optimizer(torch.optim.Muon, lr=rate), seed=0)
            for rate in (0.02, 0.05)
        ]

    torch.manual_seed(0)
    population = functools.reduce(vmap(one_step_for_all), batches(5), stack(states()))
    torch.manual_seed(0)
    for state, member in zip(states(), population, strict=True):
        single = functools.reduce(one_step_for_all, batches(5), state)
        torch.testing.assert_close(member.params["weight"], single.params["weight"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_under_autocast_has_statistics_in_float32(affine):
    """The input in bfloat16, weights and statistics in float32: torch's batching rule has no kernel for both."""

    def states():
        made = []
        for rate in (0.02, 0.05):
            torch.manual_seed(0)
            model = TinyConvolution()
            model.norm = nn.BatchNorm2d(3, affine=affine)
            made.append(
                TrainState.create(model, Optimizer(torch.optim.SGD, lr=rate), precision="bf16", seed=0)
            )
        return made

    population = functools.reduce(vmap(one_step_for_all), batches(5), stack(states()))
    for state, member in zip(states(), population, strict=True):
        single = functools.reduce(one_step_for_all, batches(5), state)
        assert member.buffers["norm.running_var"].dtype == torch.float32
        for name, value in {**single.params, **single.buffers}.items():
            kept = {**member.params, **member.buffers}[name]
            torch.testing.assert_close(kept, value, rtol=2e-2, atol=2e-2)


def test_draws_are_each_members_own():
    """Members that differ in their seeds only drop different entries; with one seed they are equal to the bit."""
    first = mlp(dropout=0.5)
    states = [TrainState.create(first, Optimizer(torch.optim.SGD, lr=0.1), seed=seed) for seed in (3, 4, 3)]
    population = functools.reduce(vmap(one_step_for_all), batches(3), stack(states))
    assert torch.equal(population.outputs["logits"][0], population.outputs["logits"][2])
    assert not torch.equal(population.outputs["logits"][0], population.outputs["logits"][1])
    assert first_difference(bits(population[0]), bits(population[2])) is None


def test_a_member_whose_loss_scale_overflows_backs_off_alone():
    """The loss scale, its growth and the skips are each member's own."""

    def states():
        found = small_members(precision="fp16", loss_scale=LossScale(scale=2.0**10, growth_interval=3))
        found[1] = attrs.evolve(found[1], scale=LossScale(scale=2.0**40, growth_interval=3))
        return [one_step_for_all(state, batches(1)[0]) for state in found]

    given = batches(8)
    population = functools.reduce(vmap(one_step_for_all), given, stack(states()))
    for state, member in zip(states(), population, strict=True):
        single = functools.reduce(one_step_for_all, given, state)
        assert_alike(single, member, 1e-3)  # float16
    assert population[1].applied_steps < population[0].applied_steps


def test_batches_of_the_members_own():
    """in_dims=0 is one batch for each member; a tuple says it for each part."""
    given = [batches(4, size=5), batches(8, size=5)[4:]]
    both = [
        tuple(torch.stack(parts) for parts in zip(*pair, strict=True)) for pair in zip(*given, strict=True)
    ]
    own = functools.reduce(vmap(one_step_for_all, in_dims=0), both, stack(small_members(2)))
    for state, mine, member in zip(small_members(2), given, own, strict=True):
        assert_alike(functools.reduce(one_step_for_all, mine, state), member, 1e-5)
    labels = [(inputs, one[1]) for (inputs, _), one in zip(both, given[0], strict=True)]
    mixed = functools.reduce(vmap(one_step_for_all, in_dims=(0, None)), labels, stack(small_members(2)))
    first, second = mixed
    assert first_difference(bits(first), bits(own[0])) is None
    assert first_difference(bits(second), bits(own[1])) is not None


def test_a_batch_of_another_form_is_stepped_one_by_one():
    step, population = a_population()
    short = batches(1, size=3)[0]
    after = [one_step_for_all(state, short) for state in population]
    population = step(population, short)
    assert len(step.compile_s) == 1
    for state, member in zip(after, population, strict=True):
        assert first_difference(bits(state), bits(member)) is None
    assert step(population, batches(1)[0])[0].step == 5


# -- members do not touch each other -------------------------------------------------------------------------------------


def poisoned(population, index):
    """The population with one member whose loss is not finite from now on."""

    def poison(state):
        if state.seed != index:
            return state
        return state.with_params({"0.bias": torch.full_like(state.params["0.bias"], float("nan"))})

    return population.map(poison)


def test_a_member_that_is_not_finite_leaves_the_others_as_they_are():
    step, population = a_population()
    healthy = functools.reduce(step, batches(4), population.clone())
    ill = functools.reduce(step, batches(4), poisoned(population, 1))
    for index in (0, 2):
        assert first_difference(bits(healthy[index]), bits(ill[index])) is None
    assert (ill[1].applied_steps, ill[1].attempted_steps, ill[1].nonfinite_steps) == (3, 7, 4)
    assert ill.finite.tolist() == [True, False, True]
    assert ill.ended == (None, None, None)


def test_a_member_ends_by_steps_that_are_not_finite_and_the_last_one_raises():
    def limited(state, batch):
        state = backward_scaled(forward_loss(state, batch, objective))
        return optimizer_step(unscale_and_clip(state, max_norm=1.0), max_nonfinite_steps=2)

    step = vmap(limited)
    population = functools.reduce(step, batches(2), stack(small_members(2)))
    population = functools.reduce(step, batches(3), poisoned(population, 1))
    assert population.ended == (None, "2 steps in a row were not finite")
    assert (population[0].attempted_steps, population[1].attempted_steps) == (5, 4)
    with pytest.raises(NonFiniteError, match="0: 2 steps in a row were not finite, 1: 2 steps"):
        functools.reduce(step, batches(3), poisoned(population, 0))


def test_a_member_that_stops_early_stays_as_it_is():
    step, population = a_population()
    kept = population[1]
    alone = functools.reduce(step, batches(4), population.clone())
    stopping = population.map(
        lambda state: (
            attrs.evolve(state, early_stopping=StoppingState(stopped=True)) if state.seed == 1 else state
        )
    )
    population = functools.reduce(step, batches(4), stopping)
    assert population.ended == (None, "early stopping", None)
    assert first_difference(bits(kept), bits(population[1])) is None
    assert torch.equal(kept.loss, population[1].loss)
    for index in (0, 2):
        assert first_difference(bits(alone[index]), bits(population[index])) is None


# -- a population is a value -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"ema": True}, {"carry": {"seen": torch.arange(3)}}, {"precision": "bf16"}], ids=str
)
def test_stack_and_unstack_are_inverse(settings):
    states = [one_step_for_all(one, batches(1)[0]) for one in small_members(**settings)]
    states = [update_ema(one, decay=0.9) if settings.get("ema") else one for one in states]
    again = unstack(stack(states))
    for state, back in zip(states, again, strict=True):
        assert first_difference(bits(state), bits(back)) is None
        assert state.alive
        assert type(back.params["0.weight"]) is nn.Parameter
        assert back.params["0.weight"].stride() == state.params["0.weight"].stride()
        assert torch.equal(back.loss, state.loss)


def test_members_that_are_taken_out_share_nothing_with_the_population():
    step, population = a_population()
    one = population[0]
    before = bits(one.clone())
    population = step(population, batches(1)[0])
    assert first_difference(before, bits(one)) is None
    for parameter in one.params.values():
        parameter.data.fill_(7.0)
    assert float(population[0].params["0.weight"].detach().max()) < 7.0


def test_the_population_that_went_in_is_spent_and_a_clone_is_not():
    step, population = a_population()
    kept = population.clone()
    new = step(population, batches(1)[0])
    with pytest.raises(SpentStateError, match="this population is spent: a step updated its tensors"):
        step(population, batches(1)[0])
    with pytest.raises(SpentStateError, match=r"population\.clone"):
        _ = population[0]
    assert first_difference(bits(step(kept, batches(1)[0])[2]), bits(new[2])) is None


def test_a_step_makes_no_state_of_a_member_that_nobody_asks_for(monkeypatch):
    """And a population that has given its tensors on cannot make one any more: the counts have gone on with them."""
    step, population = a_population()
    made = []
    view = RunningMembers.view
    monkeypatch.setattr(RunningMembers, "view", lambda self, index: made.append(index) or view(self, index))
    new = functools.reduce(step, batches(4), population)
    assert made == []
    assert repr(new) == "Population(3 states of Sequential, step=7)"
    assert repr(population) == "Population(3 states of Sequential) (spent)"
    one = new.member(1)
    assert (made, one.step) == ([1], 7)
    assert new.member(1).params["0.weight"] is one.params["0.weight"]
    with pytest.raises(SpentStateError, match="a member: this population is spent"):
        population.member(1)
    later = step(new, batches(1)[0])
    assert (made, one.attempted_steps, later.member(1).attempted_steps) == ([1, 1], 7, 8)


@pytest.mark.parametrize("how", ["by the graph", "one by one"])
def test_a_view_of_a_member_is_spent_by_the_next_step(how):
    """What stands in the stacked tensors by then is another step's; it must not be read as the view's own."""
    spender = (
        f"this state is spent: {'a step of a population' if how == 'by the graph' else 'optimizer_step'}"
    )
    step, population = a_population()
    views = [population.member(index) for index in range(3)]
    assert torch.equal(views[1].params["0.weight"], population[1].params["0.weight"])
    before = bits(population[1])
    assert first_difference(before, bits(views[1])) is None
    new = step(population, batches(1, size=10 if how == "by the graph" else 3)[0])
    for view in views:
        for use in (lambda view=view: view.params, lambda view=view: view.clone()):
            with pytest.raises(SpentStateError, match=spender):
                use()
    assert all(new.member(index).alive for index in range(3))
    assert first_difference(before, bits(new.member(1))) is not None


def test_a_view_of_a_member_may_be_stepped_alone():
    """It spends the view and the population, and leaves the views of the other members as they are."""
    step, population = a_population()
    expected = [one_step_for_all(state, batches(1)[0]) for state in population]
    views = [population.member(index) for index in range(3)]
    after = one_step_for_all(views[1], batches(1)[0])
    assert first_difference(bits(expected[1]), bits(after)) is None
    assert [view.alive for view in views] == [True, False, True]
    with pytest.raises(SpentStateError, match=r"its member 1 was stepped by itself\. Stack the states"):
        step(population, batches(1)[0])


def test_a_population_is_checkpointed_as_its_members(tmp_path):
    step, population = a_population()
    whole = functools.reduce(step, batches(6)[3:], population.clone())
    for index, state in enumerate(population):
        checkpoint.save(state, tmp_path / str(index))
    loaded = [checkpoint.load(tmp_path / str(i), like=state) for i, state in enumerate(small_members())]
    resumed = functools.reduce(vmap(one_step_for_all), batches(6)[3:], stack(loaded))
    for one, other in zip(whole, resumed, strict=True):
        assert first_difference(bits(one), bits(other)) is None


def test_a_step_that_does_not_donate_leaves_the_population_whole():
    def pure(state, batch):
        state = backward_scaled(forward_loss(state, batch, objective))
        return optimizer_step(unscale_and_clip(state, max_norm=1.0), donate=False)

    step = vmap(pure)
    first = functools.reduce(step, batches(2), stack(small_members()))
    before = [bits(state) for state in first]
    second = step(first, batches(1)[0])
    assert all(first_difference(a, bits(b)) is None for a, b in zip(before, first, strict=True))
    assert first_difference(bits(step(first, batches(1)[0])[1]), bits(second[1])) is None


def test_the_carry_of_each_member():
    def counting(state, batch):
        seen = state.carry
        state = one_step_for_all(state, batch)
        return state.with_carry(seen * 0.5 + state.loss)

    states = [state.with_carry(torch.tensor(float(i))) for i, state in enumerate(small_members())]
    population = functools.reduce(vmap(counting), batches(5), stack(states))
    for i, (state, member) in enumerate(zip(small_members(), population, strict=True)):
        single = functools.reduce(counting, batches(5), state.with_carry(torch.tensor(float(i))))
        torch.testing.assert_close(single.carry, member.carry)


def test_an_attribute_that_changes_is_seen():
    """Between two steps; of one model of three."""
    states = small_members()
    for state in states:
        state.model.temperature = 1.0

    def tempered(model, batch):
        inputs, labels = batch
        return F.cross_entropy(model(inputs) / model.temperature, labels)

    step = vmap(step_of(0.1, loss=tempered))
    population = functools.reduce(step, batches(2), stack(states))
    expected = list(population)
    expected[1].model.temperature = 3.0
    expected = [step_of(0.1, loss=tempered)(state, batches(1)[0]) for state in expected]
    population = step(population, batches(1)[0])
    for one, member in zip(expected, population, strict=True):
        assert_alike(one, member, 1e-5)


# -- what is refused -----------------------------------------------------------------------------------------------------------


def test_states_that_are_unlike_are_refused():
    states = small_members()
    wide = TrainState.create(nn.Sequential(nn.Linear(6, 5)), Optimizer(torch.optim.SGD, lr=0.1, momentum=0.9))
    with pytest.raises(ConfigError, match=r"0.weight of member 3 is \(5, 6\) .*, but \(4, 6\)"):
        stack([*states, wide])
    with pytest.raises(ConfigError, match="the optimizer of member 3 is 'Adam', but 'SGD'"):
        stack(
            [*states, TrainState.create(nn.Sequential(nn.Linear(6, 4)), Optimizer(torch.optim.Adam, lr=0.1))]
        )
    with pytest.raises(ConfigError, match="member 0 is a dict"):
        stack([{"one": states[0]}])
    with pytest.raises(ConfigError, match="at least one state"):
        stack([])
    with pytest.raises(ConfigError, match="member 0 is in the middle of a step"):
        stack([forward_loss(states[0], batches(1)[0], objective)])
    with pytest.raises(CompileError, match=r"got a TrainState\. Make one"):
        vmap(one_step_for_all)(states[0], batches(1)[0])
    with pytest.raises(ConfigError, match="2 train steps, but the population has 3"):
        vmap([one_step_for_all] * 2)(stack(states), batches(1)[0])


def refusal(step, states, given=None):
    step = vmap(step)
    given = batches(2) if given is None else given
    with pytest.raises(CompileError) as excinfo:
        functools.reduce(step, given, stack(states))
    return str(excinfo.value)


def test_another_graph_is_refused_with_what_differs():
    states = [
        TrainState.create(
            nn.Linear(6, 4), Optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=nesterov)
        )
        for nesterov in (False, True)
    ]
    message = refusal(one_step_for_all, states)
    assert "member 1 (nesterov of True beside False)" in message
    assert "Train these members apart" in message or "train them apart" in message


def test_a_call_without_a_batching_rule_is_refused_by_its_name():
    def histogram(model, batch):
        loss, outputs = objective(model, batch)
        return loss, {**outputs, "counts": torch.histc(outputs["logits"].detach(), 4)}

    message = refusal(step_of(0.1, loss=histogram), small_members(2))
    assert "calls aten.histc, which torch.vmap has no rule for" in message


def reads(model, batch):
    loss, outputs = objective(model, batch)
    return (loss if loss.item() > 0 else -loss), outputs


def branches(state, batch):
    state = one_step_for_all(state, batch)
    if state.finite:
        return state
    return schedule(state, lambda _: 0.0)


def leaves(model, batch):
    loss, outputs = objective(model, batch)
    model.last = outputs["logits"].detach()
    return loss


def overwrites(model, batch):
    batch[0].mul_(0.5)
    return objective(model, batch)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (step_of(0.1, loss=reads), "reads a tensor's value"),
        (branches, "decides in Python by state.finite"),
        (step_of(0.1, loss=leaves), "leaves a tensor in 'last'"),
        (step_of(0.1, loss=overwrites), "changes a tensor of the batch in place"),
    ],
    ids=["reads", "branches", "leaves", "overwrites"],
)
def test_what_is_no_populations_is_refused(step, message):
    assert message in refusal(step, small_members(2))


# -- with Inductor -----------------------------------------------------------------------------------------------------------------


@needs_compiler
def test_compiled_it_is_the_single_runs(monkeypatch):
    monkeypatch.undo()
    given = batches(STEPS)
    population = functools.reduce(vmap(one_step_for_all), given, stack(small_members()))
    for state, member in zip(small_members(), population, strict=True):
        assert_alike(functools.reduce(one_step_for_all, given, state), member, 1e-5)
