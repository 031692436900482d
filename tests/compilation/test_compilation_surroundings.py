"""What lies beside state and batch: a trace changes none of it, and what Python reads of it is guarded or refused."""

import itertools
import random
import types
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compiled_runs import assert_alike, batches, first_state, folded, mlp, objective, run_as_it_is
from torch import nn

from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    compile,  # noqa: A004  (steploop.compile, as in torch.compile)
    evaluate,
    forward_loss,
    optimizer_step,
    unscale_and_clip,
)
from steploop.compilation.baked import Baked
from steploop.errors import CompileError, ConfigError

TEMPERATURE = 1.0
SETTINGS = {"temperature": 1.0}
FLAGS = {1.0}
config = types.SimpleNamespace(temperature=1.0, inner=types.SimpleNamespace(temperature=1.0))


@pytest.fixture(autouse=True)
def _graphs_run_as_they_are(monkeypatch):
    run_as_it_is(monkeypatch)


def updated(state, batch, use=objective):
    return optimizer_step(unscale_and_clip(backward_scaled(forward_loss(state, batch, use)), max_norm=1.0))


class Net(nn.Module):
    """A linear layer, and whatever a test hangs on it."""

    temperature_of_all = 1.0

    def __init__(self, forward=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 4)
        self.temperature = 1.0
        self.act = torch.tanh
        self.how = forward

    def forward(self, x):
        return self.layer(x) if self.how is None else self.how(self, x)


# -- what changes in mid-run ------------------------------------------------------------------------------------------


def set_global(value):
    globals()["TEMPERATURE"] = value


CHANGES = {
    "an attribute": (lambda m, x: m.layer(x) / m.temperature, lambda m, v: setattr(m, "temperature", v)),
    "a new attribute": (lambda m, x: m.layer(x) / getattr(m, "late", 1.0), lambda m, v: setattr(m, "late", v)),
    "an attribute of the class": (lambda m, x: m.layer(x) / m.temperature_of_all, lambda m, v: setattr(Net, "temperature_of_all", v)),
    "a function": (lambda m, x: m.layer(m.act(x)), lambda m, v: setattr(m, "act", torch.sin if v > 1 else torch.tanh)),
    "a global": (lambda m, x: m.layer(x) / TEMPERATURE, lambda m, v: set_global(v)),
    "an item of a global": (lambda m, x: m.layer(x) / SETTINGS["temperature"], lambda m, v: SETTINGS.update(temperature=v)),
    "a member of a set": (lambda m, x: m.layer(x) / max(FLAGS), lambda m, v: (FLAGS.clear(), FLAGS.add(v))),
    "an attribute of a global": (lambda m, x: m.layer(x) / config.temperature, lambda m, v: setattr(config, "temperature", v)),
    "an attribute further away": (lambda m, x: m.layer(x) / config.inner.temperature, lambda m, v: setattr(config.inner, "temperature", v)),
    "a tensor": (lambda m, x: m.layer(x) / m.scale, lambda m, v: setattr(m, "scale", torch.tensor(v))),
    "a tensor that is read": (lambda m, x: m.layer(x) / float(m.scale), lambda m, v: setattr(m, "scale", torch.tensor(v))),
    "a tensor that is filled and read": (lambda m, x: m.layer(x) / m.filled.item(), lambda m, v: m.filled.fill_(v)),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CHANGES))
def test_what_python_reads_may_change_in_mid_run(name):
    """Half-way a value becomes another one, and later the first one again: the graph of each is used where it is right."""
    forward, change = CHANGES[name]

    def run(one):
        model = Net(forward)
        model.filled = torch.ones(())
        change(model, 1.0)
        state = TrainState.create(model, Optimizer(torch.optim.SGD, lr=0.1))
        for number, batch in enumerate(batches(12)):
            change(model, 2.0 if number in {4, 5, 6, 7} else 1.0)
            state = one(state, batch)
        change(model, 1.0)
        return state

    def step(state, batch):
        return updated(state, batch)

    fast = compile(step)
    assert_alike(run(step), run(fast), 1e-5)


def test_the_rate_of_a_dropout_may_be_annealed():
    def run(one):
        state = first_state(mlp(dropout=0.5))
        for number, batch in enumerate(batches(8)):
            state.model[3].p = 0.5 if number < 4 else 0.1
            state = one(state, batch)
        return state

    fast = compile(updated)
    assert_alike(run(updated), run(fast), 1e-5)
    assert len(fast.figures.compile_s) == 2


def test_a_closure_and_an_object_are_guarded_too():
    class Objective:
        weight = 1.0

        def __call__(self, model, batch):
            return F.cross_entropy(model(batch[0]), batch[1]) * self.weight

    def run(form):
        use, factor = Objective(), 1.0

        def step(state, batch):
            return updated(state, batch, lambda m, b: use(m, b) * factor)

        one, state = form(step), first_state()
        for number, batch in enumerate(batches(9)):
            use.weight = 3.0 if 2 < number < 6 else 1.0
            factor = 0.5 if number > 4 else 1.0
            state = one(state, batch)
        return state

    assert_alike(run(lambda step: step), run(compile), 1e-5)


def test_a_hook_on_a_module_that_comes_in_mid_run_acts():
    def run(one):
        state = first_state(Net())
        for number, batch in enumerate(batches(8)):
            if number == 4:
                state.model.layer.register_forward_hook(lambda m, args, out: out * 0.5)
            state = one(state, batch)
        return state

    assert_alike(run(updated), run(compile(updated)), 1e-5)


# -- parameters -------------------------------------------------------------------------------------------------------


def masked(param):
    mask = torch.ones_like(param)
    mask[0] = 0
    return param.register_hook(lambda g: g * mask)


def halve(param):
    param.grad.mul_(0.5)


HOOKS = {
    "hook": masked,
    "post-accumulate": lambda p: p.register_post_accumulate_grad_hook(halve),
}


@pytest.mark.parametrize("kind", list(HOOKS))
@pytest.mark.parametrize("when", [0, 4])
def test_hooks_on_parameters_act_and_end_when_they_are_removed(kind, when):
    def run(one):
        state, handle = first_state(Net()), None
        for number, batch in enumerate(batches(10)):
            if number == when:
                handle = HOOKS[kind](state.model.layer.weight)
            if number == 7:
                handle.remove()
            state = one(state, batch)
        return state

    assert_alike(run(updated), run(compile(updated)), 1e-5)


def test_a_parameter_that_is_frozen_and_thawed_follows():
    def run(one):
        state = first_state(mlp())
        for number, batch in enumerate(batches(10)):
            state.model[0].weight.requires_grad_(requires_grad=not 3 <= number < 6)
            state = one(state, batch)
        return state

    assert_alike(run(updated), run(compile(updated)), 1e-5)


def test_marks_on_parameters_and_their_class_are_seen():
    class Marked(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(6, 4)
            self.layer.weight.decay = 0.5

        def forward(self, x):
            assert isinstance(self.layer.weight, nn.Parameter)
            return self.layer(x) + sum(p.square().sum() * getattr(p, "decay", 0.0) for p in self.parameters())

    state = first_state(Marked())
    assert_alike(
        folded(updated, state.clone(), batches(5)), folded(compile(updated), state, batches(5)), 1e-5
    )


def test_a_layer_or_parameter_that_was_exchanged_is_refused_as_in_eager():
    fast = compile(updated)
    state = folded(fast, first_state(), batches(3))
    state.model[0] = nn.Linear(6, 8)
    with pytest.raises(ConfigError, match="its layer '0' was replaced"):
        fast(state, batches(1)[0])


def test_a_frozen_parameter_that_is_thawed_without_an_optimizer_is_refused_as_in_eager():
    model = mlp()
    model[0].weight.requires_grad_(requires_grad=False)
    fast = compile(updated)
    state = folded(fast, first_state(model), batches(3))
    state.model[0].weight.requires_grad_(requires_grad=True)
    with pytest.raises(ConfigError, match=r"0\.weight requires a gradient, but it did not"):
        fast(state, batches(1)[0])


# -- the caller -------------------------------------------------------------------------------------------------------


def test_autocast_inference_mode_and_default_dtype_of_the_caller_stay_outside():
    def run(one):
        state = first_state(mlp(norm=True, dropout=0.2))
        for number, batch in enumerate(batches(8)):
            if number % 2:
                with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
                    state = one(state, batch)
            else:
                with torch.no_grad():
                    torch.set_default_dtype(torch.float64)
                    try:
                        state = one(state, batch)
                    finally:
                        torch.set_default_dtype(torch.float32)
        return state

    fast = compile(updated)
    state = run(fast)
    assert_alike(run(updated), state, 1e-5)
    assert not state.loss.is_inference()
    assert len(fast.figures.compile_s) == 1


# -- what a step leaves behind ------------------------------------------------------------------------------------------


def counting_in_place(m, x):
    m.seen += x.detach().sum()
    m.steps.add_(1)
    return m.layer(x) * (1 + 0.001 * m.steps)


def test_tensors_beside_the_state_change_once_a_step():
    def run(one):
        model = Net(counting_in_place)
        model.seen, model.steps = torch.zeros(()), torch.zeros((), dtype=torch.int64)
        state = folded(one, TrainState.create(model, Optimizer(torch.optim.SGD, lr=0.1)), batches(6))
        return state, float(model.seen), int(model.steps)

    eager, compiled = run(updated), run(compile(updated))
    assert_alike(eager[0], compiled[0], 1e-5)
    assert eager[1:] == pytest.approx(compiled[1:], rel=1e-5)


def keeping(m, x):
    m.last = torch.tanh(m.layer(x))
    m.all = {"sum": m.last.sum(), "name": "x"}
    return m.last


def test_what_a_step_leaves_in_attributes_is_the_newest_after_every_step():
    """Attention maps to look at, auxiliary losses: read later in the step, or after it."""

    def with_auxiliary(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1]) + 0.1 * model.all["sum"].square()

    def step(state, batch):
        return updated(state, batch, with_auxiliary)

    models = [Net(keeping), Net(keeping)]
    eager, compiled = (TrainState.create(m, Optimizer(torch.optim.SGD, lr=0.1)) for m in models)
    fast = compile(step)
    for batch in batches(5):
        eager, compiled = step(eager, batch), fast(compiled, batch)
        assert torch.allclose(models[0].last, models[1].last, atol=1e-5)
        assert torch.allclose(models[0].all["sum"], models[1].all["sum"], atol=1e-4)
        assert not isinstance(models[1].last, torch._subclasses.FakeTensor)
    assert len(fast.figures.compile_s) == 1


def remembering(m, x):
    y = m.layer(x) + m.before
    m.before = y.detach()
    return y


KEPT = types.SimpleNamespace()


def remembering_elsewhere(m, x):
    y = m.layer(x) + KEPT.before
    KEPT.before = y.detach()
    return y


def counting(m, x):
    m.calls += 1
    return m.layer(x)


def listing(m, x):
    y = m.layer(x)
    m.history.append(y.detach())
    return y


def by_a_made_up_name(m, x):
    setattr(m, "ca" + "lls", getattr(m, "ca" + "lls") + 1)
    return m.layer(x)


@pytest.mark.parametrize(
    ("forward", "name"),
    [
        (remembering_elsewhere, r"reads KEPT\.before"),
        (counting, r"changes model\.calls"),
        (by_a_made_up_name, r"changes model\.calls"),
        (listing, r"changes model\.history"),
    ],
)
def test_what_a_graph_would_change_once_is_refused_by_name_and_left_as_it_was(forward, name):
    model = Net(forward)
    model.calls, KEPT.before, model.history = 0, torch.zeros(10, 4), []
    state = folded(updated, TrainState.create(model, Optimizer(torch.optim.SGD, lr=0.1)), batches(2))
    calls, before, history = model.calls, KEPT.before, list(model.history)
    with pytest.raises(CompileError, match=name):
        compile(updated)(state, batches(1)[0])
    assert model.calls == calls
    assert KEPT.before is before
    assert len(model.history) == len(history)
    fast = compile(updated, mode="auto")
    assert folded(fast, state, batches(3)).step == 5
    assert fast.figures.form == "eager"


@pytest.mark.parametrize("eager_steps", [0, 1, 3])
def test_a_tensor_that_is_read_and_replaced_is_in_the_state_and_compiled_alike(eager_steps):
    def run(one):
        model = Net(remembering)
        model.before = torch.zeros(10, 4)
        given = batches(7)
        given[5] = (given[5][0] * float("nan"), given[5][1])  # is skipped, and brings the old one back
        state = folded(
            updated, TrainState.create(model, Optimizer(torch.optim.SGD, lr=0.1)), given[:eager_steps]
        )
        return folded(one, state, given[eager_steps:])

    eager, fast = run(updated), compile(updated)
    compiled = run(fast)
    assert fast.figures.form == "compiled"
    assert_alike(eager, compiled, 1e-5)
    torch.testing.assert_close(compiled.tensors.extra["before"], eager.tensors.extra["before"])


def test_showing_a_tensor_is_refused():
    seen = []

    def step(state, batch):
        state = updated(state, batch)
        seen.append(f"loss {state.loss}")
        return state

    state = folded(updated, first_state(), batches(1))
    with pytest.raises(CompileError, match="shows a tensor"):
        compile(step)(state, batches(1)[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_compiled_part_is_traced_like_the_rest():
    part = torch.compile(lambda x: torch.tanh(x) * 2, backend="eager")

    def step(state, batch):
        return updated(state, batch, lambda m, b: F.cross_entropy(part(m(b[0])), b[1]))

    state = first_state()
    assert_alike(folded(step, state.clone(), batches(4)), folded(compile(step), state, batches(4)), 1e-5)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_step_that_freezes_a_parameter_is_refused_by_name_and_between_steps_it_is_followed(when):
    def step(state, batch):
        if when == "before" and state.step == 2:
            state.model[0].weight.requires_grad_(requires_grad=False)
        state = updated(state, batch)
        if when == "after" and state.step == 2:
            state.model[0].weight.requires_grad_(requires_grad=False)
        return state

    fast, state = compile(step), first_state()
    with pytest.raises(CompileError, match=r"changes requires_grad of 0\.weight in Python"):
        folded(fast, state, batches(4))

    def by_hand(one):
        state = folded(one, first_state(), batches(2))
        state.model[0].weight.requires_grad_(requires_grad=False)
        return folded(one, state, batches(3))

    assert_alike(by_hand(updated), by_hand(compile(updated)), 1e-5)


def test_other_weights_in_the_midst_of_a_step_are_refused_and_run_in_eager_by_auto():
    def step(state, batch):
        state = updated(state, batch)
        return state.with_params({"0.bias": torch.ones(8)}) if state.step == 2 else state

    with pytest.raises(CompileError, match=r"calls with_params.*between two steps"):
        folded(compile(step), first_state(), batches(3))
    assert_alike(
        folded(step, first_state(), batches(3)),
        folded(compile(step, mode="auto"), first_state(), batches(3)),
        0,
    )


def test_other_buffers_in_the_midst_of_a_step_are_compiled():
    def step(state, batch):
        state = updated(state, batch)
        return state.with_params({"1.running_mean": state.buffers["1.running_mean"] * 0.5 + state.loss})

    first = first_state(mlp(norm=True))
    eager, compiled = folded(step, first.clone(), batches(4)), folded(compile(step), first, batches(4))
    assert_alike(eager, compiled, 1e-5)
    torch.testing.assert_close(compiled.loss, eager.loss)


def test_an_evaluation_in_the_midst_of_a_step_is_refused_and_runs_in_eager_by_auto():
    def step(state, batch):
        better = evaluate(state, [batch], objective)["loss"] < 1.0
        return updated(state, (batch[0] * (0.5 if better else 1.0), batch[1]))

    with pytest.raises(CompileError, match=r"calls evaluate.*between two steps"):
        folded(compile(step), first_state(), batches(3))
    automatic = folded(compile(step, mode="auto"), first_state(), batches(3))
    assert_alike(folded(step, first_state(), batches(3)), automatic, 0)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
# of the engine's own entry, which a backward pass on the CPU calls
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")
def test_torch_compile_around_a_step_changes_nothing_of_it():
    """Somebody who compares puts torch.compile around it: it breaks the graph where it has to, and follows the rest."""
    state = first_state()
    around = torch.compile(updated, backend="eager")
    assert_alike(folded(updated, state.clone(), batches(3)), folded(around, state, batches(3)), 0)


def test_gradients_of_gradients_are_captured():
    def penalised(model, batch):
        x = batch[0].clone().requires_grad_()
        out = model(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return F.cross_entropy(out, batch[1]) + (slope.norm(dim=1) - 1).square().mean()

    def step(state, batch):
        return updated(state, batch, penalised)

    state = first_state()
    assert_alike(folded(step, state.clone(), batches(5)), folded(compile(step), state, batches(5)), 1e-5)


def test_sparse_gradients_are_refused_in_words():
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(8, 4))
    given = [(torch.randint(0, 10, (5, 2)), torch.randint(0, 4, (5,)))] * 2
    state = folded(updated, first_state(model, Optimizer(torch.optim.SGD, lr=0.1)), given[:1])
    with pytest.raises(CompileError, match=r"sparse.*sparse=False"):
        compile(updated)(state, given[0])


def test_a_module_with_an_extra_state_is_refused_by_name():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    state = folded(updated, first_state(nn.Sequential(Extra(6, 4))), batches(1))
    with pytest.raises(CompileError, match=r"trains 0 \(Extra\), which keeps an extra state"):
        compile(updated)(state, batches(1)[0])


def test_a_parameter_that_the_model_moves_itself_is_refused_from_a_checkpoint_too():
    class Momentum(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Linear(6, 4), nn.Linear(6, 4).requires_grad_(requires_grad=False)

        def forward(self, x):
            with torch.no_grad():
                self.two.weight.lerp_(self.one.weight, 0.1)
            return self.one(x) + self.two(x)

    state = folded(updated, TrainState.create(Momentum(), Optimizer(torch.optim.Adam, lr=0.1)), batches(1))
    for moved in (state.machine.moved, None):
        state.machine.moved = moved
        with pytest.raises(CompileError, match=r"moves the parameter two\.weight"):
            compile(updated)(state, batches(1)[0])


RNG, ARRAY_RNG, HISTORY, SEEN = random.Random(1), np.random.default_rng(1), deque(maxlen=3), set()


def remember(x):
    HISTORY.append(x.detach())
    return 0.0


LEFT = {
    "a generator of Python's": "draws from RNG",
    "a generator of NumPy's": "draws from ARRAY_RNG",
    "a queue": "changes HISTORY",
    "a set": "changes SEEN",
}


@pytest.mark.parametrize("kind", list(LEFT))
def test_generators_and_containers_of_the_program_are_not_built_in(kind):
    def used(model, batch):
        loss = objective(model, batch)[0]
        if kind == "a generator of Python's":
            return loss * (1 + 0 * RNG.random())
        if kind == "a generator of NumPy's":
            return loss * (1 + 0 * ARRAY_RNG.random())
        if kind == "a set":
            SEEN.add(len(SEEN))
            return loss
        return loss + remember(loss)

    def step(state, batch):
        return updated(state, batch, used)

    state = folded(step, first_state(), batches(1))
    before = RNG.getstate(), ARRAY_RNG.bit_generator.state, list(HISTORY), set(SEEN)
    with pytest.raises(CompileError, match=LEFT[kind]):
        compile(step)(state, batches(1)[0])
    assert before[0] == RNG.getstate()
    assert before[1] == ARRAY_RNG.bit_generator.state
    assert all(a is b for a, b in zip(before[2], HISTORY, strict=True))
    assert before[3] == SEEN


class Counter:
    count = 0


class Slotted:
    __slots__ = ("count",)

    def __init__(self):
        self.count = 0


def numbers():
    while True:
        yield 1.0


SLOTTED, NUMBERS, TURNS = Slotted(), numbers(), itertools.cycle([1.0, 2.0])


def count_of_class(step):
    Counter.count += 1
    return Counter.count


def count_of_slots(step):
    SLOTTED.count += 1
    return SLOTTED.count


def count_of_function(step):
    count_of_function.count = getattr(count_of_function, "count", 0) + 1
    return count_of_function.count


COUNTS = {
    "a class": (count_of_class, r"changes Counter\.count"),
    "an object with slots": (count_of_slots, r"changes SLOTTED\.count"),
    "a function": (count_of_function, r"changes count_of_function\.count"),
    "a generator": (lambda step: next(NUMBERS), "reads the iterator NUMBERS"),
    "a cycle": (lambda step: next(TURNS), "reads the iterator TURNS"),
}


@pytest.mark.parametrize("kind", list(COUNTS))
def test_what_counts_in_no_dictionary_is_not_built_in(kind):
    count, says = COUNTS[kind]

    def step(state, batch):
        return updated(state, batch, lambda m, b: objective(m, b)[0] / count(state))

    state = folded(updated, first_state(), batches(1))
    with pytest.raises(CompileError, match=says):
        compile(step)(state, batches(1)[0])
    assert (Counter.count, SLOTTED.count, vars(count_of_function)) == (0, 0, {})
    if kind == "a cycle":
        assert next(TURNS) == 1.0


def test_a_set_in_reach_costs_no_full_look_at_every_step(monkeypatch):
    """Its members come as a new object at every look; every other value is still compared by identity alone."""
    looks = []
    monkeypatch.setattr(Baked, "_equal", lambda self: looks.append(self) or True)
    fast = compile(lambda state, batch: updated(state, batch, lambda m, b: objective(m, b)[0] * len(FLAGS)))
    assert folded(fast, first_state(), batches(5)).step == 5
    assert len(fast.figures.compile_s) == 1
    assert not looks


def test_what_the_code_does_not_name_costs_no_graph():
    """A trainer counts and keeps what it likes, as long as its step does not read it."""

    class Trainer:
        def __init__(self):
            self.count, self.history, self.weight = 0, [], 1.0

        def step(self, state, batch):
            return updated(state, batch, lambda m, b: objective(m, b)[0] * self.weight)

        def fit(self, state, given):
            fast = compile(self.step)
            for batch in given:
                state = fast(state, batch)
                self.count += 1
                self.history.append(float(state.loss))
            return fast

    assert len(Trainer().fit(first_state(), batches(6)).figures.compile_s) == 1


# -- hooks ------------------------------------------------------------------------------------------------------------


def test_what_a_hook_counts_is_refused_and_what_it_reads_is_guarded():
    counted, factor = [0], [1.0]

    def count(*args):
        counted[0] += 1
        return args[-1] / counted[0]

    def scale(*args):
        return args[-1] * factor[0]

    counting = Net()
    counting.layer.weight.register_hook(count)
    state, step = first_state(counting), compile(updated)
    with pytest.raises(CompileError, match=r"changes counted\[0\] in Python, which a graph would do once"):
        step(step(state, batches(1)[0]), batches(1)[0])
    scaling = Net()
    scaling.layer.register_forward_hook(scale)
    eager = first_state(scaling)
    graphs = eager.clone()
    step = compile(updated)
    for batch in batches(4):
        factor[0] *= 0.5
        eager, graphs = updated(eager, batch), step(graphs, batch)
    assert_alike(eager, graphs, 1e-6)
