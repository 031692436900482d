"""What an optimizer keeps, wherever it keeps it, is in the state; what no state can hold is refused by name.

The oracle is the same class in a loop written by hand. None of the classes here is torch's.
"""

import types
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from forms import in_every_form
from torch import nn

from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    checkpoint,
    evaluate,
    forward_loss,
    optimizer_step,
    schedule,
    unscale_and_clip,
    update_ema,
)
from steploop.core.trees import first_difference
from steploop.errors import ConfigError, SpentStateError

INF = float("inf")


class Plain(torch.optim.Optimizer):
    """SGD, with a hook for what the classes below keep."""

    def __init__(self, params, lr=0.1, **more):
        super().__init__(params, {"lr": lr, **more})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            factor = self.factor(group)
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(self.direction(p, group), alpha=group["lr"] * factor)

    def factor(self, group):
        return 1.0

    def direction(self, p, group):
        return p.grad


class CountsInGroups(Plain):
    """A number that it begins with, one that it adds, a tensor, and a tuple."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr, k=0, span=(0, 1.0))

    def factor(self, group):
        group["k"] += 1
        group["total"] = group.get("total", torch.zeros(())) + group["lr"]
        group["span"] = (group["k"], group["span"][1] / 2)
        return 1.0 / (group["k"] + float(group["total"]) + group["span"][1])


class UnderAnotherKey(Plain):
    """What it keeps for all parameters together."""

    def factor(self, group):
        shared = self.state.setdefault("all", {"n": 0, "trace": [torch.zeros(()), None]})
        shared["n"] += 1
        shared["trace"][0] = shared["trace"][0] * 0.5 + shared["n"]
        return 1.0 / (1 + float(shared["trace"][0]))


class AsAttributes(Plain):
    """A count, a list of tensors and a text of its own."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.count, self.phase, self.seen = 0, "first", []

    def factor(self, group):
        self.count += 1
        self.seen.append(torch.tensor(float(self.count)))
        if self.count > 3:
            self.phase = "second"
        return (0.5 if self.phase == "second" else 1.0) / float(sum(self.seen))


class ForParameters(Plain):
    """A momentum that it replaces at every step, a count in Python, a None that becomes a tensor."""

    def direction(self, p, group):
        state = self.state[p]
        if not state:
            state.update(step=0, momentum=torch.zeros_like(p), second=None)
        state["step"] += 1
        state["momentum"] = state["momentum"] * 0.9 + p.grad
        if state["step"] > 2:
            state["second"] = state["momentum"].clone() if state["second"] is None else state["second"] / 2
        return state["momentum"] / state["step"] + (0 if state["second"] is None else state["second"])


class SetsItsOwnRate(Plain):
    """As those do that find the rate themselves."""

    def factor(self, group):
        group["lr"] = group["lr"] * 0.8
        return 1.0


class Noisy(Plain):
    """Draws random numbers: they are a function of the state too."""

    def direction(self, p, group):
        return p.grad + 0.1 * torch.randn_like(p)


KEEPING = [CountsInGroups, UnderAnotherKey, AsAttributes, ForParameters, SetsItsOwnRate]


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def seeded(seed=0):
    torch.manual_seed(seed)
    return network()


def batches(count=6):
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(5, 3, generator=generator), torch.randint(2, (5,), generator=generator))
        for _ in range(count)
    ]


def objective(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def step(state, batch, *, donate=True):
    state = unscale_and_clip(backward_scaled(forward_loss(state, batch, objective)), max_norm=INF)
    return optimizer_step(state, donate=donate)


def create(torch_class, *, groups=(), other=False, **options):
    return TrainState.create(seeded(1 if other else 0), Optimizer(torch_class, groups=groups, **options))


def by_hand(torch_class, data, *, rate=None, groups=()):
    """The parameters, and what the optimizer keeps, after a loop as it stands in torch's tutorials."""
    model = seeded()
    named = dict(model.named_parameters())
    taken = [n for pattern, _ in groups for n in named if n.startswith(pattern.removesuffix("*"))]
    described = [{"params": [p for n, p in named.items() if n not in taken]}]
    described += [{"params": [named[n] for n in taken], **own} for _, own in groups]
    optimizer = torch_class(described)
    for index, batch in enumerate(data):
        if rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate(index)
        optimizer.zero_grad()
        objective(model, batch).backward()
        optimizer.step()
    return model, optimizer


def kept_by(optimizer, model):
    """By name: what it keeps for each parameter, in its groups, under other keys."""
    named = dict(model.named_parameters())
    return {
        "slots": {n: dict(optimizer.state[p]) if p in optimizer.state else {} for n, p in named.items()},
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
        "others": {k: v for k, v in optimizer.state.items() if not isinstance(k, torch.Tensor)},
    }


def kept_in(state):
    tensors = state.tensors
    return {
        "slots": {n: dict(tensors.slots[n]) for n in tensors.params},
        "groups": [dict(group) for group in state.hyper],
        "others": dict(tensors.beside.get("state", {})),
    }


@pytest.mark.parametrize("groups", [(), (("2.*", {"lr": 0.05}),)], ids=["one group", "two groups"])
@pytest.mark.parametrize("torch_class", KEEPING)
def test_what_an_optimizer_keeps_anywhere_is_in_the_state_in_every_form(torch_class, groups, tmp_path):
    data = batches()
    model, optimizer = by_hand(torch_class, data, groups=groups)
    expected = {n: p.detach() for n, p in model.named_parameters()}
    found = in_every_form(
        lambda other=False: create(torch_class, groups=groups, other=other), step, data, tmp_path
    )
    for form, state in found.items():
        assert first_difference(dict(state.params), expected) is None, form
        assert first_difference(kept_in(state), kept_by(optimizer, model)) is None, form


@pytest.mark.parametrize("torch_class", [CountsInGroups, UnderAnotherKey, AsAttributes, ForParameters])
def test_a_schedule_sets_the_rate_and_touches_nothing_else_that_an_optimizer_keeps(torch_class, tmp_path):
    def rate(applied):
        return 0.2 / (1 + applied)

    def scheduled(state, batch, *, donate=True):
        return schedule(step(state, batch, donate=donate), rate)

    data = batches()
    model, _ = by_hand(torch_class, data, rate=rate)
    expected = {n: p.detach() for n, p in model.named_parameters()}
    make = lambda other=False: schedule(create(torch_class, other=other), rate)  # noqa: E731
    for form, state in in_every_form(make, scheduled, data, tmp_path).items():
        assert first_difference(dict(state.params), expected) is None, form


def test_attributes_of_an_optimizer_are_those_of_the_state_that_steps(tmp_path):
    """Here they decide about the direction, so that the parameters show whose they were; and they are saved."""
    state = create(AsAttributes)
    for batch in batches():
        state = step(state, batch)
    assert state.tensors.beside["attributes"]["count"] == 6
    assert state.tensors.beside["attributes"]["phase"] == "second"
    checkpoint.save(state, tmp_path / "a")
    loaded = checkpoint.load(tmp_path / "a", like=create(AsAttributes, other=True))
    assert first_difference(loaded.tensors.beside, state.tensors.beside) is None


def test_what_an_optimizer_draws_is_a_function_of_the_state(tmp_path):
    before = torch.random.get_rng_state()
    ends = in_every_form(lambda other=False: create(Noisy, other=other), step, batches(), tmp_path)
    expected = dict(ends.pop("donating").params)
    for form, state in ends.items():
        torch.rand(3)
        assert first_difference(dict(state.params), expected) is None, form
    assert not torch.equal(before, torch.random.get_rng_state())  # the test drew itself


# -- refusals -----------------------------------------------------------------------------------------------------


class Wrapper(torch.optim.Optimizer):
    """As Lookahead is written: another optimizer does the work."""

    def __init__(self, params, lr=0.1):
        self.inner = torch.optim.SGD(params, lr=lr)
        super().__init__(self.inner.param_groups, {"lr": lr})

    def step(self, closure=None):
        self.inner.step()


class Delegating(torch.optim.Optimizer):
    """Another way to wrap: the state is looked up in the inner one each time."""

    def __init__(self, params, lr=0.1):
        self._of = [torch.optim.SGD(params, lr=lr)]
        self.defaults = {}
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}

    @property
    def state(self):
        return self._of[0].state

    @property
    def param_groups(self):
        return self._of[0].param_groups

    def step(self, closure=None):
        self._of[0].step()


class DelegatingGroups(Delegating):
    state = {}  # noqa: RUF012  (as an instance has it)


class Projector:
    """Something that is no value."""


def keeping(*, attribute=None, hyper=None):
    class Keeping(Plain):
        def __init__(self, params, lr=0.1):
            super().__init__(params, lr, **({} if hyper is None else {"extra": hyper}))
            if attribute is not None:
                self.history = attribute

    return Keeping


def making(where):
    """Makes something in its first step that no state can hold."""

    class Making(Plain):
        def factor(self, group):
            if where == "group":
                group["extra"] = [deque([1.0])]
            elif where == "key":
                self.state["all"] = {"projector": Projector()}
            elif where == "attribute":
                self.history = deque([1.0])
            return 1.0

        def direction(self, p, group):
            if where == "slot":
                self.state[p]["projector"] = Projector()
            return p.grad

    return Making


CANNOT = "which a state cannot hold: copies and checkpoints would lose it. Use an optimizer that keeps tensors, numbers and texts."


@pytest.mark.parametrize(
    ("torch_class", "says"),
    [
        (
            Wrapper,
            (
                "Wrapper wraps another optimizer (inner: SGD), whose state is not in its own state_dict(), so that a checkpoint "
                "would lose it. Use the inner optimizer, and write what the wrapper does as a function of the state."
            ),
        ),
        *(
            (
                kind,
                (
                    f"{kind.__name__} computes its {name} from another optimizer's, so that a state cannot put values into it. Use "
                    "the inner optimizer, and write what the wrapper does as a function of the state."
                ),
            )
            for kind, name in ((Delegating, "state"), (DelegatingGroups, "param_groups"))
        ),
        (keeping(attribute=deque([1])), f"Keeping keeps a deque (the attribute history), {CANNOT}"),
        (
            keeping(attribute={"a": [Projector()]}),
            f"Keeping keeps a Projector (the attribute history.a.0), {CANNOT}",
        ),
        (keeping(hyper=Projector()), f"Keeping keeps a Projector ('extra' of group 0), {CANNOT}"),
        (keeping(hyper=[1.0, deque()]), f"Keeping keeps a deque ('extra' of group 0.1), {CANNOT}"),
    ],
)
def test_what_no_state_can_hold_is_refused_when_the_state_is_made(torch_class, says):
    with pytest.raises(ConfigError) as caught:
        create(torch_class)
    assert str(caught.value) == says


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("slot", "Making keeps a Projector (for the parameter 0.weight.projector), "),
        ("group", "Making keeps a deque (in its groups: 0.extra.0), "),
        ("key", "Making keeps a Projector (beside: state.all.projector), "),
        ("attribute", "Making keeps a deque (the attribute history), "),
    ],
)
def test_what_is_made_in_the_first_step_is_refused_there_and_not_at_a_checkpoint(where, says):
    state = create(making(where))
    with pytest.raises(ConfigError) as caught:
        step(state, batches()[0])
    assert str(caught.value) == says + CANNOT
    with pytest.raises(SpentStateError, match="an update was cut off in the middle of attempted step 0"):
        step(state, batches()[0])


@pytest.mark.parametrize(
    "value",
    [torch.float32, torch.device("cpu"), torch.strided, len, nn.Linear, lambda: None],
    ids=["dtype", "device", "layout", "built-in", "class", "function"],
)
def test_what_says_how_an_optimizer_computes_is_no_state(value):
    """A dtype, a device, a function: they are those of the class that is given, and are not saved."""
    state = create(keeping(attribute=value))
    state = step(state, batches()[0])
    assert "history" not in state.tensors.beside.get("attributes", {})


class HoldsItsParameters(Plain):
    """Looks for its parameters in an attribute, in one of several ways."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.held = self.hold(self.param_groups)

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.look(self.held):
            if p.grad is not None:
                p.sub_(p.grad, alpha=0.1)


class HoldsTheGroups(HoldsItsParameters):
    hold = staticmethod(lambda groups: groups)
    look = staticmethod(lambda held: held[0]["params"])


class HoldsAGroup(HoldsItsParameters):
    hold = staticmethod(lambda groups: groups[0])
    look = staticmethod(lambda held: held["params"])


class HoldsTheListOfAGroup(HoldsItsParameters):
    hold = staticmethod(lambda groups: groups[0]["params"])
    look = staticmethod(lambda held: held)


class HoldsAListOfItsOwn(HoldsItsParameters):
    hold = staticmethod(lambda groups: list(groups[0]["params"]))
    look = staticmethod(lambda held: held)


class NotesTheGroupsLater(Plain):
    """Takes hold of its groups in its first step."""

    def factor(self, group):
        self.held = self.param_groups
        return 1.0


class HoldsOneParameter(Plain):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.first = self.param_groups[0]["params"][0]


class HoldsOneInItsGroup(Plain):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.param_groups[0]["first"] = [self.param_groups[0]["params"][0]]


class KeepsAViewOfAParameter(Plain):
    def direction(self, p, group):
        self.state[p]["row"] = p.detach()[0]
        return p.grad


@pytest.mark.parametrize(
    "torch_class", [HoldsTheGroups, HoldsAGroup, HoldsTheListOfAGroup, NotesTheGroupsLater]
)
def test_the_groups_of_an_optimizer_are_the_states_wherever_it_looks_for_them(torch_class, tmp_path):
    data = batches()
    model, _ = by_hand(torch_class, data)
    expected = {n: p.detach() for n, p in model.named_parameters()}
    ends = in_every_form(lambda other=False: create(torch_class, other=other), step, data, tmp_path)
    for form, state in ends.items():
        assert first_difference(dict(state.params), expected) is None, form


def test_an_optimizer_that_keeps_its_parameters_a_second_time_is_refused():
    """A clone of the state would train the parameters of the first, or none."""
    says = (
        "{} keeps one of its parameters a second time ({}). A state lends it the parameters in param_groups only. Let it look "
        "there, or keep a copy."
    )
    for kind, where in (
        (HoldsAListOfItsOwn, "the attribute held.0"),
        (HoldsOneParameter, "the attribute first"),
        (HoldsOneInItsGroup, "'first' of group 0.0"),
    ):
        with pytest.raises(ConfigError) as caught:
            create(kind)
        assert str(caught.value) == says.format(kind.__name__, where)
    with pytest.raises(ConfigError) as caught:
        step(create(KeepsAViewOfAParameter), batches()[0])
    assert str(caught.value) == says.format("KeepsAViewOfAParameter", "for the parameter 0.weight.row")


# -- the step that is called --------------------------------------------------------------------------------------


def clamp(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.data.clamp_(min=0)


class WrappedOnTheInstance(torch.optim.SGD):
    """As libraries of sparsity and of privacy do."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        inner = self.step

        def wrapped(self, closure=None):
            inner(closure)
            clamp(self)

        self.step = types.MethodType(wrapped, self)


class Hooked(torch.optim.SGD):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        self.register_step_post_hook(lambda optimizer, args, kwargs: clamp(optimizer))


@pytest.mark.parametrize("torch_class", [WrappedOnTheInstance, Hooked])
def test_a_step_that_was_wrapped_or_hooked_is_the_one_that_is_called(torch_class, tmp_path):
    data = batches()
    model, _ = by_hand(torch_class, data)
    expected = {n: p.detach() for n, p in model.named_parameters()}
    assert min(float(p.min()) for p in expected.values()) == 0.0
    ends = in_every_form(lambda other=False: create(torch_class, other=other), step, data, tmp_path)
    for form, state in ends.items():
        assert first_difference(dict(state.params), expected) is None, form


# -- two sets of parameters ---------------------------------------------------------------------------------------


class ScheduleFree(torch.optim.Optimizer):
    """SGD that trains y, between a fast z and its mean x, and is judged by x (Defazio et al. 2024)."""

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "train_mode": False})

    @torch.no_grad()
    def _become(self, mode):
        for group in self.param_groups:
            if group["train_mode"] is not mode:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        beta = group["beta"]
                        p.lerp_(self.state[p]["z"], 1 - beta if mode else 1 - 1 / beta)
                group["train_mode"] = mode

    def train(self):
        self._become(True)  # noqa: FBT003  (the mode itself)

    def eval(self):
        self._become(False)  # noqa: FBT003  (likewise)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("not in train mode")
            share = 1 / (group["k"] + 1)
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, share)
                p.add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - share) - 1))
                z.sub_(p.grad, alpha=group["lr"])
            group["k"] += 1


class Consuming(ScheduleFree):
    """Forgets what it keeps when it is asked for the other parameters."""

    def eval(self):
        super().eval()
        for slots in self.state.values():
            for value in slots.values():
                value.zero_()


def test_looking_at_the_parameters_that_are_judged_changes_nothing_that_is_trained():
    data, state = batches(), create(Consuming)
    state = step(step(state, data[0]), data[1])
    before = {n: {k: v.clone() for k, v in s.items()} for n, s in state.slots.items()}
    first = evaluate(state, [data[0]], objective)
    assert evaluate(state, [data[0]], objective) == first
    assert first_difference(dict(state.slots), before) is None
    assert state.hyper[0]["train_mode"] is True


def schedule_free_classes():
    yield ScheduleFree, {}
    schedulefree = pytest.importorskip("schedulefree")
    yield schedulefree.SGDScheduleFree, {"lr": 0.1}
    yield schedulefree.AdamWScheduleFree, {"lr": 0.01, "warmup_steps": 2}


@pytest.mark.parametrize("number", range(3), ids=["ours", "SGDScheduleFree", "AdamWScheduleFree"])
def test_an_optimizer_with_two_modes_steps_in_the_one_and_is_judged_in_the_other(number, tmp_path):
    """Against a loop that calls train() and eval() where its manual says; with an average of what is judged."""
    torch_class, options = list(schedule_free_classes())[number]
    data = batches()
    model = seeded()
    optimizer = torch_class(model.parameters(), **options)
    average, judged = None, []
    for batch in data:
        optimizer.train()
        optimizer.zero_grad()
        objective(model, batch).backward()
        optimizer.step()
        optimizer.eval()
        judged.append(objective(model, data[0]).item())
        values = [p.detach().clone() for p in model.parameters()]
        average = [p.detach() for p in seeded().parameters()] if average is None else average
        average = [torch.lerp(a, v, 0.5) for a, v in zip(average, values, strict=True)]
    evaluated = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.train()
    trained = {n: p.detach() for n, p in model.named_parameters()}

    looked = {}

    def looking(state, batch, *, donate=True):
        state = update_ema(step(state, batch, donate=donate), decay=0.5)
        looked[state.step] = evaluate(state, [data[0]], objective)["loss"]
        return state

    def make(*, other=False):
        return TrainState.create(seeded(1 if other else 0), Optimizer(torch_class, **options), ema=True)

    for form, state in in_every_form(make, looking, data, tmp_path).items():
        for name, p in state.params.items():
            torch.testing.assert_close(p.detach(), trained[name], msg=f"{form}: {name}")
        for name, a in zip(state.ema, average, strict=True):
            torch.testing.assert_close(state.ema[name], a, msg=f"{form}: the average of {name}")
        assert list(looked.values()) == pytest.approx(judged, rel=1e-5)
    assert any(not torch.allclose(evaluated[name], trained[name]) for name in trained)


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler")
@pytest.mark.parametrize(
    "optimizer",
    [
        Optimizer(torch.optim.AdamW, lr=0.1),
        Optimizer(torch.optim.SGD, lr=0.1, groups=[("*", Optimizer(torch.optim.Adam, lr=0.2))]),
    ],
)
def test_a_group_that_is_set_behind_the_state_and_a_scheduler_of_torch_are_refused(optimizer, tmp_path):
    early = TrainState.create(seeded(0), optimizer)
    early.machine.optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(ConfigError, match=r"'lr' of parameter group 0 was set to 0\.5 behind the state"):
        early.clone()
    state = step(TrainState.create(seeded(0), optimizer), batches()[0])
    live = state.machine.optimizer
    looks = [
        state.clone,
        lambda: checkpoint.save(state, tmp_path / "saved"),
        lambda: evaluate(state, batches(1), objective),
        lambda: step(state, batches()[0], donate=False),
    ]
    for look in looks:
        look()
    torch.optim.lr_scheduler.StepLR(live, 1, gamma=0.5).step()
    says = r"'lr' of parameter group 0 was set to .* behind the state, which has .*Set a learning rate with schedule"
    for look in looks:
        with pytest.raises(ConfigError, match=says):
            look()
    state = step(schedule(state, lambda step: 0.3), batches()[0])
    assert state.clone().learning_rate == 0.3
    live.param_groups[0]["weight_decay"] = 0.25
    with pytest.raises(ConfigError, match=r"'weight_decay' of parameter group 0 was set to 0\.25 behind"):
        state.clone()
