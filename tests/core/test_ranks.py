"""Ranks are parts: the number of processes that take a step together changes no bit of it."""

import ast
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rank_cases import (
    ADAMW,
    CASES,
    INF,
    MOMENTUM,
    batches,
    by_a_metric_that_gathers_nothing,
    by_torchmetrics,
    create,
    fast,
    fast_by_all_reduce,
    network,
    objective,
    step,
    values,
)
from rank_processes import RankProcesses
from torch import nn
from torch.utils.checkpoint import checkpoint

import steploop
from steploop import (
    Optimizer,
    Parts,
    Ranks,
    TrainState,
    accumulate,
    backward_scaled,
    evaluate,
    fold_in,
    forward_loss,
    optimizer_step,
    split_parts,
    unscale_and_clip,
)
from steploop.core.steps.by_parts.part_sums import PartSum
from steploop.core.trees import first_difference
from steploop.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def two():
    ranks = RankProcesses(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four():
    ranks = RankProcesses(4)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_number_of_ranks_changes_no_bit(two, four, case):
    """Four parts on one, two and four ranks: the same state, on every rank, bit for bit."""
    alone = case(4)
    for ranks in (two, four):
        for rank, found in enumerate(ranks.run(case, 4)):
            assert first_difference(found, alone) is None, f"rank {rank} of {ranks.size}"


def test_metrics_of_torchmetrics_see_every_batch_once(two):
    pytest.importorskip("torchmetrics")
    alone = by_torchmetrics(4)
    for found in two.run(by_torchmetrics, 4):
        for some, whole in zip(found, alone, strict=True):
            assert some == pytest.approx(whole)


def test_a_metric_that_knows_the_batches_of_one_rank_only_is_refused(two):
    outcomes = two.outcomes(by_a_metric_that_gathers_nothing, 4)
    assert [fine for fine, _ in outcomes] == [False, False]
    assert all(
        "the metric 'hits' is a Hits, which sees the batches of its own rank only" in why
        for _, why in outcomes
    )


def test_a_number_of_ranks_that_does_not_divide_the_parts_is_refused():
    with pytest.raises(ConfigError, match="3 parts cannot be shared equally by 2 ranks"):
        Ranks(size=2, parts=3)


def test_a_state_with_ranks_takes_parts_only():
    state = TrainState.create(nn.Linear(2, 1), Optimizer(torch.optim.SGD, lr=0.1), ranks=Ranks.here(parts=2))
    with pytest.raises(ConfigError, match=r"takes the parts of a global batch.*split_parts"):
        forward_loss(state, torch.ones(4, 2), lambda model, x: model(x).mean())
    with pytest.raises(ConfigError, match=r"expected the parts range\(0, 2\) of 2 on rank 0 of 1"):
        forward_loss(state, split_parts(torch.ones(4, 2), Ranks(parts=4)), lambda model, x: model(x).mean())


def test_a_state_without_ranks_takes_no_parts():
    state = TrainState.create(nn.Linear(2, 1), Optimizer(torch.optim.SGD, lr=0.1))
    with pytest.raises(ConfigError, match="made without ranks"):
        forward_loss(state, split_parts(torch.ones(4, 2), Ranks(parts=2)), lambda model, x: model(x).mean())
    with pytest.raises(
        ConfigError, match="evaluate: the batch is Parts, but this state was made without ranks"
    ):
        evaluate(state, [split_parts(torch.ones(4, 2), Ranks(parts=2))], lambda model, x: model(x).mean())


@pytest.mark.parametrize("samples", range(9))
def test_parts_are_cut_as_evenly_as_can_be_and_hold_every_sample_once(samples):
    batch = {"x": torch.arange(samples), "names": [str(i) for i in range(samples)], "note": 7}
    found = [
        part for rank in range(2) for part in split_parts(batch, Ranks(rank=rank, size=2, parts=4)).batches
    ]
    there = [part for part in found if part is not None]
    assert [name for part in there for name in part["names"]] == batch["names"]
    assert [int(x) for part in there for x in part["x"]] == list(range(samples))
    assert all(part["note"] == 7 for part in there)
    sizes = [0 if part is None else len(part["x"]) for part in found]
    assert max(sizes) - min(sizes) <= 1


def test_samples_that_cannot_be_counted_are_refused():
    with pytest.raises(DataError, match="split_parts: cannot count the samples"):
        split_parts((torch.ones(3), torch.ones(4)), Ranks(parts=2))


def test_fields_of_parts_are_parts():
    parts = Parts([(1, 2), None, (3,)], range(3), 3)
    assert [field.batches for field in parts] == [(1, None, 3), (2, None, None)]
    assert parts[0].batches == (1, None, 3)
    assert parts.map(len).batches == (2, None, 1)


def test_a_step_of_parts_is_the_one_that_is_written_by_hand():
    """Each part's pass and backward pass, w_i g_i / W, and the mean of BatchNorm's statistics; as plain PyTorch has it."""
    ranks = Ranks.here(parts=3)
    state = TrainState.create(network(), MOMENTUM, ranks=ranks)
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    for attempted, (x, y) in enumerate(batches(samples=20)):
        state = step(state, (x, y), max_norm=INF)
        began = copy.deepcopy(model.state_dict())
        ends = []
        mean = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        loss = 0.0
        for number, part in enumerate(zip(x.tensor_split([6, 13]), y.tensor_split([6, 13]), strict=True)):
            model.load_state_dict(began)
            optimizer.zero_grad()
            with torch.random.fork_rng():
                torch.manual_seed(fold_in(0, attempted, number))
                each = F.cross_entropy(model(part[0]), part[1])
            each.backward()
            share = len(part[1]) / 20
            loss += share * float(each.detach())
            for name, p in model.named_parameters():
                mean[name] += share * p.grad
            ends.append((share, {name: b.clone() for name, b in model.named_buffers()}))
        for name, p in model.named_parameters():
            p.grad = mean[name]
        optimizer.step()
        for name, b in model.named_buffers():
            b.copy_(sum(share * end[name] for share, end in ends))
        assert float(state.loss) == pytest.approx(loss)
        for name, p in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
            found = {**state.params, **state.buffers}[name].detach()
            torch.testing.assert_close(
                found, p.detach(), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("parts", range(1, 10))
def test_gradients_are_summed_by_a_tree_that_is_cut_in_the_middle(parts):
    """Numbers whose sum depends on the order: none but the tree's gives these bits."""
    numbers = [(-1.0) ** i * 10.0**i / 3 + 1e-3 for i in range(parts)]
    state = TrainState.create(
        nn.Linear(1, 1, bias=False), Optimizer(torch.optim.SGD, lr=0.1), ranks=Ranks.here(parts=parts)
    )
    batch = Parts([torch.full((1, 1), number) for number in numbers], range(parts), parts)
    state = backward_scaled(forward_loss(state, batch, lambda model, x: model(x).sum()))

    def tree(some):
        if len(some) == 1:
            return np.float32(some[0]) * np.float32(1 / parts)
        middle = len(some) // 2
        return tree(some[:middle]) + tree(some[middle:])

    assert state.grads["weight"].item() == tree(numbers)


def test_one_accumulation_of_parts_is_their_forward_and_backward_pass():
    both = []
    for fold in (
        lambda s, parts: backward_scaled(forward_loss(s, parts, objective)),
        lambda s, parts: accumulate(s, [parts], objective),
    ):
        state = create(network(), ADAMW, 3)
        for batch in batches():
            state = fold(state, split_parts(batch, state.ranks))
            state = optimizer_step(unscale_and_clip(state, max_norm=1.0))
        both.append(values(state))
    assert first_difference(*both) is None


def test_the_parts_of_one_process_are_its_micro_batches():
    """With two parts there is one order to sum in: accumulate takes the same step without ranks."""
    parts, alone = create(network(norm=False), ADAMW, 2), TrainState.create(network(norm=False), ADAMW)
    for batch in batches():
        cut = split_parts(batch, parts.ranks)
        parts = optimizer_step(
            unscale_and_clip(backward_scaled(forward_loss(parts, cut, objective)), max_norm=1.0)
        )
        alone = optimizer_step(unscale_and_clip(accumulate(alone, cut.batches, objective), max_norm=1.0))
    assert first_difference(values(parts), values(alone)) is None


def in_a_group_of_three(parts):
    group = torch.distributed.new_group([0, 1, 2])
    rank = torch.distributed.get_rank()
    if rank == 3:
        return None
    ranks = Ranks(rank=rank, size=3, parts=parts, group=group)
    state = TrainState.create(network(norm=False), ADAMW, ranks=ranks)
    for batch in batches():
        state = step(state, batch)
    return values(state)


@pytest.mark.parametrize("parts", [3, 6, 12])
def test_ranks_whose_parts_are_no_single_node_of_the_tree_change_no_bit(four, parts):
    """Six parts are halves of three; of three ranks each has two, and the middle one some of either half."""
    state = TrainState.create(network(norm=False), ADAMW, ranks=Ranks.here(parts=parts))
    for batch in batches():
        state = step(state, batch)
    for found in four.run(in_a_group_of_three, parts)[:3]:
        assert first_difference(found, values(state)) is None


@pytest.mark.parametrize("fast", [fast, fast_by_all_reduce])
def test_fast_ranks_equal_themselves_and_the_others_nearly(two, four, fast):
    alone = fast(4)
    for ranks in (two, four):
        found = ranks.run(fast, 4)
        again = ranks.run(fast, 4)
        for rank in range(ranks.size):
            assert first_difference(found[rank], found[0]) is None
            assert first_difference(again[rank], found[0]) is None
        for name, value in alone.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                torch.testing.assert_close(found[0][name], value, rtol=1e-3, atol=1e-4)


def different_start(parts):
    rank = Ranks.here().rank
    torch.manual_seed(rank)
    state = TrainState.create(nn.Linear(2, 1), ADAMW, ranks=Ranks.here(parts=parts))
    return state.params["weight"].detach()


def test_every_rank_begins_with_the_weights_of_the_first(two):
    first, second = two.run(different_start, 2)
    torch.manual_seed(0)
    assert first.equal(second)
    assert first.equal(nn.Linear(2, 1).weight)


def different_settings(parts):
    ranks = Ranks.here(parts=parts)
    return TrainState.create(nn.Linear(2, 1), ADAMW, ranks=ranks, seed=ranks.rank)


def test_other_settings_on_another_rank_are_refused_on_all(two):
    for fine, message in two.outcomes(different_settings, 2):
        assert not fine
        assert "another state is made on rank 1 than on rank 0: seed: 1 against 0" in message


def empty(parts):
    state = TrainState.create(nn.Linear(2, 1), ADAMW, ranks=Ranks.here(parts=parts))
    return forward_loss(state, split_parts(torch.ones(0, 2), state.ranks), lambda m, x: m(x).mean())


def mixed_weights(parts):
    ranks = Ranks.here(parts=parts)
    state = TrainState.create(nn.Linear(2, 1), ADAMW, ranks=ranks)
    weight = 2.0 if ranks.rank else None
    return forward_loss(state, split_parts(torch.ones(4, 2), ranks), lambda m, x: (m(x).mean(), None, weight))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (empty, "the weights of all parts sum to 0"),
        (mixed_weights, "a weight for some parts and none for others"),
    ],
)
def test_what_is_wrong_with_all_parts_together_is_an_error_on_every_rank(two, function, message):
    assert [(fine, message in text) for fine, text in two.outcomes(function, 2)] == [(False, True)] * 2


def test_torch_distributed_is_imported_where_several_processes_need_it_only():
    """Inside of functions: torch imports some of it itself, so what is loaded says nothing."""
    wrong = []
    for path in Path(steploop.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_bytes()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            wrong += [f"{path.name}: {name}" for name in names if name.startswith("torch.distributed")]
    assert wrong == []


def test_a_step_without_ranks_asks_torch_distributed_nothing(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError

    for name in ("is_initialized", "is_available", "get_rank", "get_world_size", "all_reduce", "barrier"):
        monkeypatch.setattr(torch.distributed, name, refuse)
    state = TrainState.create(network(), ADAMW)
    for batch in batches():
        state = forward_loss(state, batch, objective)
        state = optimizer_step(unscale_and_clip(backward_scaled(state), max_norm=1.0))
    assert evaluate(state, batches(), objective)["loss"] > 0


class Moves(nn.Linear):
    """A forward pass that changes a parameter."""

    def forward(self, x):
        with torch.no_grad():
            self.bias.mul_(0.5)
        return super().forward(x)


class Counts(nn.Linear):
    """A forward pass that changes the extra state."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)

    def get_extra_state(self):
        return self.calls

    def set_extra_state(self, state):
        self.calls = state


class Remembers(nn.Linear):
    """A hidden state in a plain attribute, which the parts would each overwrite."""

    hidden = None

    def forward(self, x):
        x = super().forward(x if self.hidden is None else x + self.hidden)
        self.hidden = x.detach()
        return x


class Grows(nn.Linear):
    """A forward pass that makes a buffer longer."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen = torch.cat([self.seen, x[:1, 0]])
        return super().forward(x)


class Looks(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self, *_):
        super().__init__()
        self.table = nn.Embedding(3, 2, sparse=True)

    def forward(self, x):
        return self.table(x[:, 0].long())


class Twice(nn.Linear):
    """A layer that is recomputed twice in a backward pass, by the older kind of checkpoint."""

    def forward(self, x):
        x = x.requires_grad_() + 0
        for _ in range(2):
            x = checkpoint(super().forward, x, use_reentrant=True)
        return x


def trains(model):
    def objective(model, x):
        return model(x).sum()

    state = TrainState.create(model(2, 2), Optimizer(torch.optim.SGD, lr=0.1), ranks=Ranks.here(parts=2))
    return backward_scaled(forward_loss(state, split_parts(torch.ones(4, 2), state.ranks), objective)).step


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Moves, "changes the parameter bias in its forward pass"),
        (Counts, "changes the extra state of a module"),
        (Remembers, "a plain attribute: hidden"),
        (Grows, "makes, drops or reshapes the buffer seen"),
        (Looks, "cannot sum sparse ones"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_parts_would_each_do_their_own_way_is_refused(model, message):
    with pytest.raises(ConfigError, match=message):
        trains(model)


def test_a_gradient_that_goes_on_changing_after_it_was_sent_is_refused(two):
    assert trains(Twice) == 0
    for fine, message in two.outcomes(trains, Twice):
        assert not fine
        assert "use_reentrant=False" in message


def test_a_wrapped_module_is_refused():
    model = nn.Sequential(nn.DataParallel(nn.Linear(2, 1)))
    with pytest.raises(ConfigError, match="0 is wrapped in DataParallel, which sums gradients itself"):
        TrainState.create(model, ADAMW, ranks=Ranks.here())


def negative_zero(parts):
    """Of a sum over parts where one has -0.0 and the others nothing: zeros are added, wherever the parts are."""
    ranks = Ranks.here(parts=parts)
    total = PartSum(ranks, [torch.zeros(3)], {})
    for number in ranks.mine:
        total.add(number, [torch.full((3,), -0.0) if number == 1 else None])
    return total.result()[0]


def test_a_part_without_a_gradient_counts_as_zeros_on_any_number_of_ranks(two):
    for sums in (negative_zero(4), *two.run(negative_zero, 4)):
        assert not sums.signbit().any()
