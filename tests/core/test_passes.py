"""Several forward passes in one step, several states of one model, kept graphs, and the generators that a pass draws from."""

import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forms import in_every_form
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from steploop import (
    Optimizer,
    TrainState,
    accumulate,
    backward_scaled,
    evaluate,
    forward_loss,
    optimizer_step,
    unscale_and_clip,
)
from steploop.core.seeds import fold_in
from steploop.core.state import seeding
from steploop.core.trees import first_difference
from steploop.errors import ObjectiveError, SpentStateError

INF = float("inf")
SGD = Optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)


def network(*, dropout=0.5):
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(dropout), nn.Linear(5, 2))


def seeded(make=network, seed=0):
    torch.manual_seed(seed)
    return make()


def batches(count=6):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(6, 3, generator=generator) for _ in range(count)]


def square(model, batch):
    return model(batch).square().mean()


def explosive(model, batch):
    return square(model, batch) * INF


def create(make=network, *, other=False, **options):
    return TrainState.create(seeded(make, 1 if other else 0), SGD, seed=3, **options)


def gradients(state, batch, objective=square):
    return unscale_and_clip(backward_scaled(forward_loss(state, batch, objective)), max_norm=INF)


# -- passes of one step -------------------------------------------------------------------------------------------


def test_passes_of_one_step_draw_apart_and_the_first_draws_as_it_always_did():
    """Pass number n of attempted step t draws from the place (seed, t, n)."""
    drawn = []

    def draws(model, batch):
        drawn.append(torch.rand(2))
        return square(model, batch)

    state = create().replace(attempted_steps=4)
    for _ in range(3):
        state = forward_loss(state, batches()[0], draws)
    state = accumulate(state, batches(2), draws)
    forward_loss(state, batches()[0], draws)
    state = optimizer_step(unscale_and_clip(state, max_norm=INF))
    forward_loss(state, batches()[0], draws)
    places = [(3, 4, 0), (3, 4, 1), (3, 4, 2), (3, 4, 3), (3, 4, 4), (3, 4, 5), (3, 5, 0)]
    expected = [torch.rand(2, generator=torch.Generator().manual_seed(fold_in(*place))) for place in places]
    assert first_difference(drawn, expected) is None


def test_an_evaluation_between_two_passes_moves_none_of_their_numbers():
    state = create()
    first = forward_loss(state, batches()[0], square)
    plain = forward_loss(first, batches()[1], square)
    evaluate(first, batches(2), square)
    assert forward_loss(first, batches()[1], square).loss == plain.loss


def two_passes(state, batch, *, donate=True):
    """The second pass is the one whose gradients are taken; statistics and draws are those of both."""
    return optimizer_step(gradients(gradients(state, batch[:3]), batch[3:]), donate=donate)


def test_a_step_of_two_passes_is_the_loop_by_hand_in_every_form(tmp_path):
    model = seeded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for index, batch in enumerate(batches()):
        for number, part in enumerate((batch[:3], batch[3:])):
            torch.manual_seed(fold_in(3, index, number))
            optimizer.zero_grad()
            square(model, part).backward()
        optimizer.step()
    expected = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}
    ends = in_every_form(lambda other=False: create(other=other), two_passes, batches(), tmp_path)
    for form, state in ends.items():
        assert first_difference({**state.params, **state.buffers}, expected) is None, form


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("on_device", [False, True], ids=["decided on the host", "selected on the device"])
def test_a_skipped_step_brings_back_the_buffers_it_began_with_however_many_passes_there_were(
    passes, on_device
):
    options = {"fused": True} if on_device else {}
    state = TrainState.create(seeded(), Optimizer(torch.optim.AdamW, lr=0.1, **options), seed=3)
    state = optimizer_step(gradients(state, batches()[0]))
    before = copy.deepcopy(dict(state.buffers))
    for _ in range(passes):
        state = forward_loss(state, torch.full((6, 3), float("nan")), square)
    state = unscale_and_clip(backward_scaled(state), max_norm=INF)
    if on_device:
        state = state.replace(flight=state.flight.replace(finite=torch.zeros(()) > 0))
    state = optimizer_step(state).settle()
    assert state.finite is False
    assert first_difference(dict(state.buffers), before) is None
    assert state.flight.began is None


def test_a_skipped_step_of_micro_batches_brings_back_the_buffers_it_began_with():
    state = optimizer_step(gradients(create(), batches()[0]))
    before = copy.deepcopy(dict(state.buffers))
    state = accumulate(state, batches(2), explosive)
    assert first_difference(dict(state.buffers), before) is not None
    state = optimizer_step(unscale_and_clip(state, max_norm=INF))
    assert first_difference(dict(state.buffers), before) is None


def test_the_step_after_a_skipped_one_begins_anew():
    state = create()
    bad = optimizer_step(gradients(gradients(state, batches()[0]), batches()[1], explosive))
    clean = create().replace(attempted_steps=1)
    bad, clean = (optimizer_step(gradients(s, batches()[2])) for s in (bad, clean))
    assert first_difference({**bad.params, **bad.buffers}, {**clean.params, **clean.buffers}) is None


# -- several states of one model ------------------------------------------------------------------------------------


class Recomputing(nn.Module):
    """Computes its activations again in the backward pass, BatchNorm's statistics too."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.3))
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(recompute(self.body, x, use_reentrant=False))


@pytest.mark.parametrize("make", [network, Recomputing])
def test_two_states_of_one_model_never_write_into_each_others_buffers(make):
    """However their step functions alternate: each trains as it does alone."""
    alone = [create(make) for _ in range(2)]
    shift = [0.0, 100.0]
    expected = []
    for state, by in zip(alone, shift, strict=True):
        for batch in batches(4):
            state = optimizer_step(gradients(state, batch + by))  # noqa: PLW2901
        expected.append(state)
    one = create(make)
    pair = [one, one.clone()]
    for batch in batches(4):
        pair = [forward_loss(s, batch + by, square) for s, by in zip(pair, shift, strict=True)]
        pair = [backward_scaled(s) for s in reversed(pair)][::-1]
        pair = [optimizer_step(unscale_and_clip(s, max_norm=INF)) for s in reversed(pair)][::-1]
    for found, wanted in zip(pair, expected, strict=True):
        assert (
            first_difference({**found.params, **found.buffers}, {**wanted.params, **wanted.buffers}) is None
        )
        model = found.model
        assert all(t is found.params[n] for n, t in model.named_parameters())
        assert all(t is found.buffers[n] for n, t in model.named_buffers())


def test_an_evaluation_of_one_state_leaves_the_module_to_the_state_that_had_it():
    one = create()
    other = one.clone()
    evaluate(other, batches(1), square)
    optimizer_step(gradients(other, batches()[0]))
    assert all(p is one.params[n] for n, p in one.machine.model.named_parameters())
    assert all(b is one.buffers[n] for n, b in one.machine.model.named_buffers())


def test_recomputation_counts_a_batch_twice_as_in_any_loop():
    model = seeded(Recomputing)
    model.train()
    square(model, batches()[0]).backward()
    state = gradients(create(Recomputing), batches()[0])
    assert state.buffers["body.1.num_batches_tracked"] == model.body[1].num_batches_tracked == 2


# -- graphs that are kept -------------------------------------------------------------------------------------------


def generator():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))


def critic():
    return nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.2), nn.Linear(4, 1))


def real_and_fake(model, batch):
    real, fake = batch
    return F.softplus(-model(real)).mean() + F.softplus(model(fake)).mean()


def adversarial(states, batch, *, donate=True):
    """The fake batch is made once: the critic sees its values, the generator is differentiated through it."""

    def make(model, noise):
        fake = model(noise)
        return fake.sum() * 0.0, {"fake": fake}

    g = forward_loss(states["g"], batch.flip(0), make, keep_graph=True)
    fake = g.outputs["fake"]
    d = gradients(states["d"], (batch, fake.detach()), real_and_fake)
    d = optimizer_step(d, donate=donate)
    judge = d.model

    def fooled(model, made):
        return F.softplus(-judge(made)).mean()

    judge.requires_grad_(requires_grad=False)
    g = forward_loss(g, fake, fooled)
    judge.requires_grad_(requires_grad=True)
    g = unscale_and_clip(backward_scaled(g), max_norm=INF)
    return {"g": optimizer_step(g, donate=donate), "d": d}


def pair_of_networks(*, other=False):
    return {"g": create(generator, other=other), "d": create(critic, other=other)}


def test_a_batch_that_is_made_once_serves_both_updates_as_in_the_loop_by_hand():
    g, d = seeded(generator), seeded(critic)
    of_g, of_d = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (g, d))
    states = pair_of_networks()
    for batch in batches():
        fake = g(batch.flip(0))
        of_d.zero_grad()
        real_and_fake(d, (batch, fake.detach())).backward()
        of_d.step()
        of_g.zero_grad()
        F.softplus(-d(fake)).mean().backward()
        of_g.step()
        states = adversarial(states, batch)
    assert first_difference(dict(states["g"].params), dict(g.named_parameters())) is None
    assert first_difference(dict(states["g"].buffers), dict(g.named_buffers())) is None
    assert first_difference(dict(states["d"].params), dict(d.named_parameters())) is None
    assert states["g"].buffers["1.num_batches_tracked"] == 6


def test_one_graph_is_differentiated_twice_where_it_is_kept_and_once_where_it_is_not():
    state = forward_loss(create(), batches()[0], square)
    kept = backward_scaled(state, keep_graph=True)
    again = backward_scaled(kept)
    assert first_difference(dict(again.grads), dict(kept.grads)) is None
    with pytest.raises(SpentStateError, match="used up by another backward pass"):
        backward_scaled(state)


def test_outputs_keep_their_graph_on_request_alone():
    with_outputs = lambda model, batch: (square(model, batch), {"out": [model(batch)]})  # noqa: E731
    kept = forward_loss(create(), batches()[0], with_outputs, keep_graph=True)
    assert kept.outputs["out"][0].requires_grad
    assert not forward_loss(create(), batches()[0], with_outputs).outputs["out"][0].requires_grad
    assert not kept.loss.requires_grad


def test_a_graph_through_parameters_that_were_stepped_on_is_refused_by_torch_in_its_words():
    g = forward_loss(
        create(generator), batches()[0], lambda m, b: (square(m, b), {"fake": m(b)}), keep_graph=True
    )
    fake = g.outputs["fake"]
    g = optimizer_step(unscale_and_clip(backward_scaled(g, keep_graph=True), max_norm=INF))
    g = forward_loss(g, fake, lambda model, made: made.square().mean())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward_scaled(g)


# -- generators -------------------------------------------------------------------------------------------------------


def numbers(model, batch):
    """A draw of every generator that code in an objective uses."""
    found = [random.random(), random.gauss(0.0, 1.0), random.choice([1, 2, 3, 4, 5]) / 8]
    found += [float(np.random.rand()), float(np.random.randn()), int(np.random.randint(1000))]  # noqa: NPY002
    found += [float(x) for x in np.random.permutation(4)] + [torch.rand(()).item(), torch.randn(()).item()]  # noqa: NPY002
    return square(model, batch), {"numbers": torch.tensor(found, dtype=torch.float64)}


def callers_streams():
    """What the caller's generators would give next; they are left where they are."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()  # noqa: NPY002
    found = [random.gauss(0, 1), random.random(), *np.random.randn(3), np.random.rand(), torch.randn(3)]  # noqa: NPY002
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.random.set_rng_state(states[2])
    return found


def drawn(state):
    return forward_loss(state, batches()[0], numbers).outputs["numbers"]


def test_numbers_of_pythons_and_numpys_generators_are_a_function_of_the_state():
    state = create()
    first = drawn(state)
    random.random()
    np.random.rand(700)  # noqa: NPY002  (past a block of the twister's)
    torch.rand(5)
    assert torch.equal(drawn(state), first)
    assert torch.equal(drawn(create()), first)
    assert not torch.equal(drawn(state.replace(attempted_steps=1)), first)
    assert not torch.equal(drawn(state.replace(seed=4)), first)
    again = forward_loss(forward_loss(state, batches()[0], square), batches()[0], numbers).outputs["numbers"]
    assert not torch.equal(again, first)


def failed_pass(state):
    with pytest.raises(ZeroDivisionError):
        forward_loss(state, batches()[0], fails)


@pytest.mark.parametrize("function", [forward_loss, accumulate])
def test_an_objective_that_begins_to_draw_later_draws_what_it_would_have_drawn(function):
    """The generators are only watched once a pass has drawn nothing; then the pass is taken again, without a trace of it."""
    data = batches()[0] if function is forward_loss else batches(3)
    state, late = create(), create()
    forward_loss(late, batches()[0], square)
    before = callers_streams()
    expected, found = function(state, data, numbers), function(late, data, numbers)
    assert first_difference(found.outputs, expected.outputs) is None
    assert found.loss == expected.loss
    assert first_difference(dict(found.buffers), dict(expected.buffers)) is None
    assert first_difference(callers_streams(), before) is None
    again = function(late, data, numbers)
    assert first_difference(again.outputs, expected.outputs) is None


def test_pythons_generator_is_where_it_is_looked_for():
    """In CPython its words stand behind the header of the object; where they do not, the usual way is taken."""
    words = seeding._python_words()
    assert words is not None
    state, position = random.getstate()[1][:-1], random.getstate()[1][-1]
    assert list(memoryview(words.copy()).cast("I")) == [position, *state]
    kept, mark = words.copy(), words.mark()
    drawn_before = random.random()
    assert words.mark() != mark
    words.put(kept)
    assert random.random() == drawn_before
    marks = set()
    for _ in range(700):
        marks.add(words.mark())
        random.random()
    assert len(marks) == 700


PASSES = {
    "forward_loss": lambda s: forward_loss(s, batches()[0], numbers),
    "accumulate": lambda s: accumulate(s, batches(2), numbers),
    "evaluate": lambda s: evaluate(s, batches(2), numbers),
    "an evaluation within": lambda s: forward_loss(
        s, batches()[0], lambda m, b: (evaluate(s.clone(), batches(1), numbers), numbers(m, b))[1]
    ),
    "a pass that fails": failed_pass,
}


def fails(model, batch):
    numbers(model, batch)
    return 1 / 0


def spoil(how):
    """Leave the caller's generators in a state that is easily lost."""
    np.random.seed(7)  # noqa: NPY002
    random.seed(7)
    if how == "a second Gaussian is waiting":
        np.random.randn()  # noqa: NPY002
        random.gauss(0, 1)
    elif how == "at the end of a block":
        np.random.bytes(4 * 624)  # noqa: NPY002


@pytest.mark.parametrize("how", ["fresh", "a second Gaussian is waiting", "at the end of a block"])
@pytest.mark.parametrize("name", PASSES)
def test_the_callers_streams_are_left_where_they_were(name, how):
    state = create()
    for _ in range(3):  # the second call finds what the first has noted
        spoil(how)
        before = callers_streams()
        PASSES[name](state)
        assert first_difference(callers_streams(), before) is None
        PASSES[name](state)
        after = callers_streams()
        assert first_difference(after, before) is None


def test_a_second_gaussian_that_appears_between_two_passes_is_kept():
    """NumPy computes them in pairs; a pass keeps all of its state only where the generator has moved."""
    state = create()
    np.random.seed(7)  # noqa: NPY002
    expected = np.random.randn(8)  # noqa: NPY002
    np.random.seed(7)  # noqa: NPY002
    found = []
    for _ in range(8):
        drawn(state)
        found.append(np.random.randn())  # noqa: NPY002
        drawn(state)
    assert found == list(expected)


def test_a_generator_of_another_kind_is_the_callers_too():
    """NumPy lets a program choose the bit generator behind its global functions."""
    before = np.random.get_bit_generator()
    state = create()
    first = drawn(state)
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        expected = np.random.rand(4)  # noqa: NPY002
        np.random.set_bit_generator(np.random.PCG64(3))
        mine = np.random.get_bit_generator()
        found = []
        for _ in range(4):
            assert torch.equal(drawn(state), first)
            found.append(np.random.rand())  # noqa: NPY002
        assert found == list(expected)
        assert np.random.get_bit_generator() is mine
    finally:
        np.random.set_bit_generator(before)


@pytest.mark.parametrize("name", ["backward_scaled", "unscale_and_clip", "optimizer_step"])
def test_other_step_functions_touch_no_generator(name):
    state = forward_loss(create(), batches()[0], square)
    steps = [backward_scaled, partial(unscale_and_clip, max_norm=INF), optimizer_step]
    before = callers_streams()
    for function in steps:
        state = function(state)
    assert first_difference(callers_streams(), before) is None


def test_an_objective_that_returns_no_loss_of_this_state_says_so_before_anything_moves():
    state = create()
    before = copy.deepcopy(dict(state.buffers))
    with pytest.raises(ObjectiveError, match="depends on no parameter"):
        forward_loss(state, batches()[0], lambda model, batch: square(model, batch).detach())
    assert first_difference(dict(state.buffers), before) is None


def test_an_objective_that_begins_to_draw_elsewhere_later_draws_by_the_state_from_its_first_draw_on():
    """Python's and NumPy's generators are watched until then; the caller's, a waiting Gaussian included, stay as they were."""
    state = TrainState.create(nn.Linear(2, 1), Optimizer(torch.optim.SGD, lr=0.1))
    inputs = torch.ones(1, 2)
    first = forward_loss(state, inputs, lambda model, batch: model(batch).mean())
    state = optimizer_step(unscale_and_clip(backward_scaled(first), max_norm=1.0))
    assert state.machine.draws_elsewhere is False

    def draws(model, batch):
        return model(batch).mean(), {"drawn": torch.tensor([random.gauss(0, 1), np.random.rand()])}  # noqa: NPY002

    random.seed(3)
    random.gauss(0, 1)
    np.random.seed(1)  # noqa: NPY002
    python, (_, words, *numpy) = random.getstate(), np.random.get_state()  # noqa: NPY002
    drawn = forward_loss(state, inputs, draws).outputs["drawn"]
    assert state.machine.draws_elsewhere is True
    assert random.getstate() == python
    _, now, *rest = np.random.get_state()  # noqa: NPY002
    assert (now == words).all()
    assert rest == numpy
    random.random()
    np.random.rand()  # noqa: NPY002
    assert torch.equal(forward_loss(state, inputs, draws).outputs["drawn"], drawn)
    apart = accumulate(state, [inputs, inputs], draws).outputs
    assert torch.equal(apart[0]["drawn"], drawn)
    assert not torch.equal(apart[1]["drawn"], drawn)


def test_a_skipped_step_in_the_pure_form_gives_a_state_that_shares_no_tensor_with_the_one_that_went_in():
    """Else the next step would train the state that is left whole."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    state = TrainState.create(
        model, Optimizer(torch.optim.SGD, lr=0.1, momentum=0.9), carry={"h": torch.ones(2)}
    )

    def ready(state, inputs):
        state = forward_loss(state, inputs, lambda model, batch: model(batch).square().mean())
        return unscale_and_clip(backward_scaled(state), max_norm=1.0)

    state = optimizer_step(ready(state, torch.randn(8, 3)))
    before = copy.deepcopy(state)
    skipped = optimizer_step(ready(state, torch.full((8, 3), float("nan"))), donate=False)
    assert skipped.finite is False
    held = ("params", "buffers", "slots", "carry")
    for name in held:
        assert first_difference(getattr(skipped, name), getattr(before, name)) is None, name
    pairs = zip(skipped.buffers.values(), state.buffers.values(), strict=True)
    assert all(new is not old for new, old in pairs)
    optimizer_step(ready(skipped, torch.randn(8, 3)))
    assert state.alive
    for name in held:
        assert first_difference(getattr(state, name), getattr(before, name)) is None, name
