"""Models that do not fit one device: each rank holds a part of every parameter (``fully_shard``), and the step is the same."""

import contextlib
import io
import re
import warnings
from functools import partial, reduce
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compiled_runs import compile_runs_on_this_torch
from rank_processes import RankProcesses
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import steploop
from steploop import (
    LossScale,
    Optimizer,
    Ranks,
    TrainState,
    accumulate,
    backward_scaled,
    checkpoint,
    evaluate,
    forward_loss,
    optimizer_step,
    split_parts,
    unscale_and_clip,
    update_ema,
)
from steploop.checkpoint.format import shards
from steploop.core.state.sharded import is_sharded
from steploop.core.trees import first_difference, map_tensors, named_leaves
from steploop.errors import NonFiniteError, SteploopError
from steploop.runs.layer_norms import LayerNorms

ADAMW = Optimizer(torch.optim.AdamW, lr=1e-2)
SGD = Optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
INF = float("inf")


@pytest.fixture(scope="module")
def one():
    ranks = RankProcesses(1)
    yield ranks
    ranks.close()


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


def network(norm=nn.LayerNorm):
    """Widths that four ranks do not share equally, and a tied weight."""
    torch.manual_seed(0)
    layers = [
        nn.Embedding(7, 9),
        nn.Linear(9, 17),
        norm(17),
        nn.Tanh(),
        nn.Linear(17, 9),
        nn.Linear(9, 7, bias=False),
    ]
    layers[5].weight = layers[0].weight
    return nn.Sequential(*layers)


def cut(model, mesh=None):
    """The model with each layer cut over all ranks."""
    mesh = mesh or init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in (model[1], model[4]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def cut_in_replicas(model):
    """Two replicas of two shards."""
    return cut(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def batches(count=4, samples=24):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(7, (2, samples), generator=generator) for _ in range(count)]


def objective(model, batch):
    inputs, targets = batch[:, 0], batch[:, 1]
    logits = model(inputs)
    return F.cross_entropy(logits, targets), logits


def tokens(model, batch):
    loss, _ = objective(model, batch)
    weight = (batch[:, 1] != 0).sum() + 1
    return loss, None, weight


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def values(state):
    """Everything of a state as whole tensors."""
    fields = {"params": state.params, "buffers": state.buffers, "slots": state.slots, "ema": state.ema}
    return map_tensors(lambda t: whole(t.detach()).clone(), fields)


def step(state, batch, chosen=objective, donate=True, **bound):
    state = forward_loss(state, split_parts(batch.T.contiguous(), state.ranks), chosen)
    state = unscale_and_clip(backward_scaled(state), **(bound or {"max_norm": 0.5}))
    state = optimizer_step(state, donate=donate)
    return update_ema(state, decay=0.5) if state.ema is not None else state


def micro_step(state, batch, chosen=objective):
    halves = [
        split_parts(half.T.contiguous(), state.ranks) for half in batch.split(batch.shape[1] // 2 + 1, dim=1)
    ]
    return optimizer_step(unscale_and_clip(accumulate(state, halves, chosen), max_norm=0.5))


def create(model, ranks, optimizer=ADAMW, **options):
    return TrainState.create(model, optimizer, ranks=ranks, **options)


LONG, STOP = batches(12), 4  # a run, and where it is interrupted


CASES = {
    "plain": (step, {}, {}),
    "clipped by value": (partial(step, max_value=1e-2), {}, {}),
    "averages, and statistics of batches": (
        step,
        {"ema": True, "ema_buffers": True, "optimizer": SGD},
        {"norm": nn.BatchNorm1d},
    ),
    "tokens as weights": (partial(step, chosen=tokens), {}, {}),
    "accumulated": (micro_step, {}, {}),
    "accumulated by tokens": (partial(micro_step, chosen=tokens), {}, {}),
    "fp16": (step, {"precision": "fp16", "loss_scale": LossScale(scale=2.0**20, growth_interval=2)}, {}),
    "bf16": (step, {"precision": "bf16"}, {}),
    "ragged": (step, {}, {"samples": 13}),
    "a rank without samples": (step, {}, {"samples": 3}),
    "accumulated, a rank without samples": (micro_step, {}, {"samples": 7}),
}


def train_both(case, cutting):
    """How far a sharded state is from one process with as many parts, after each of some steps."""
    function, options, data = CASES[case]
    size, norm = distributed.get_world_size(), data.get("norm", nn.LayerNorm)
    ours = create(cutting(network(norm)), Ranks.here(), **options)
    alone = create(network(norm), Ranks(parts=size), **options)
    found = []
    for batch in batches(samples=data.get("samples", 24)):
        ours, alone = function(ours, batch), function(alone, batch)
        pairs = zip(leaves(values(ours)), leaves(values(alone)), strict=True)
        gap = max(float((x.double() - y.double()).abs().max()) for x, y in pairs)
        ratio = float(ours.grad_norm / alone.grad_norm) - 1
        found.append((gap, float(ours.loss - alone.loss), ratio, ours.step - alone.step))
    return found


def leaves(tree):
    return [t for _, t in named_leaves(tree) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("cutting", [cut, cut_in_replicas])
@pytest.mark.parametrize("case", CASES)
def test_a_sharded_model_takes_the_steps_of_one_process(four, case, cutting):
    """Up to the rounding of a sum in another order; the same steps are skipped."""
    for found in four.run(train_both, case, cutting):
        for gap, loss, ratio, steps in found:
            assert (gap, loss, steps) == (pytest.approx(0, abs=1e-5), pytest.approx(0, abs=1e-5), 0)
            assert ratio == pytest.approx(0, abs=1e-5) or ratio != ratio  # nan: a step that is skipped


# -- one part of everything for each rank -----------------------------------------------------------------------------


def elements():
    state = step(create(cut(network()), Ranks.here(), ema=True), batches()[0])
    held = [t for t in leaves([state.params, state.slots, state.ema]) if t.dim()]
    return sum(t.to_local().numel() for t in held), sum(t.numel() for t in held), all(map(is_sharded, held))


def test_each_rank_holds_a_part_of_every_parameter_slot_and_average(four):
    found = four.run(elements)
    total = found[0][1]
    assert sum(here for here, _, _ in found) == total
    assert all(fine for *_, fine in found)
    assert max(here for here, _, _ in found) < 0.35 * total


# -- values ---------------------------------------------------------------------------------------------------------


def same(a, b):
    return first_difference(values(a), values(b))


def forms():
    """What differs where the same steps are taken in other ways: each has to be None."""
    ranks, data = Ranks.here(), batches()
    expected = reduce(step, data, create(cut(network()), ranks))
    original = create(cut(network()), ranks)
    first, clone = values(original), original.clone()
    for batch in data:  # the two take the module from each other in every step
        original, clone = step(original, batch), step(clone, batch)
    pure = before = create(cut(network()), ranks)
    for batch in data:
        pure = step(pure, batch, donate=False)
    evaluated = create(cut(network()), ranks)
    for batch in data:
        evaluated = step(evaluated, batch)
        evaluate(evaluated, [b.T for b in data], objective)
    middle = create(cut(network()), ranks)
    flying = forward_loss(middle, split_parts(data[0].T.contiguous(), ranks), objective)
    other = step(middle.clone(), data[1])  # another state takes the module in the middle of the step
    resumed = optimizer_step(unscale_and_clip(backward_scaled(flying), max_norm=0.5))
    once = step(create(cut(network()), ranks), data[0])
    given = create(cut(network()), ranks).with_params(
        {n: whole(p.detach()) for n, p in expected.params.items()}
    )
    return {
        "a state and its clone in turns": same(original, expected),
        "the clone": same(clone, expected),
        "donate=False": same(pure, expected),
        "the state before": first_difference(values(before), first),
        "evaluations in between": same(evaluated, expected),
        "another state in the middle of a step": same(resumed, once),
        "with_params of whole tensors": first_difference(values(given)["params"], values(expected)["params"]),
        "the one that was in the middle": None if other.step == 1 else "not taken",
    }


def test_copies_pure_steps_evaluations_and_loans_of_a_sharded_model_change_no_bit(four):
    for found in four.run(forms):
        assert {name for name, difference in found.items() if difference is not None} == set(), found


def skip():
    state = create(cut(network(nn.BatchNorm1d)), Ranks.here())
    before = values(state)

    def spoiled(model, batch):
        loss, _ = objective(model, batch)
        return loss * (float("nan") if distributed.get_rank() == 2 else 1.0)

    state = step(state, batches()[0], spoiled)
    return first_difference(before, values(state)), state.step, state.nonfinite_steps, state.attempted_steps


def test_a_nan_on_one_rank_skips_the_step_on_all(four):
    assert four.run(skip) == [(None, 0, 1, 1)] * 4


def never_finite(rank):
    """What is said where one number of a gradient is nan, in the part that ``rank`` holds."""
    state = create(cut(network()), Ranks.here())
    place = [0, 5, 10, 15][rank]  # of 1.bias, 17 numbers long

    def spoiled(model, batch):
        loss, _ = objective(model, batch)
        bias = whole(model[1].bias)
        return loss + bias[place] * float("nan")

    def nowhere_finite(state, batch):
        state = forward_loss(state, split_parts(batch.T.contiguous(), state.ranks), spoiled)
        return optimizer_step(unscale_and_clip(backward_scaled(state), max_norm=INF), max_nonfinite_steps=2)

    with pytest.raises(NonFiniteError) as raised:
        reduce(nowhere_finite, batches(), state)
    return str(raised.value), raised.value.state.nonfinite_steps


def test_steps_that_are_never_finite_end_all_ranks_with_the_name_of_one_gradient(four):
    """Only one rank holds the number that is nan."""
    for rank in (0, 3):
        found = four.run(never_finite, rank)
        assert len(set(found)) == 1
        assert "2 steps in a row had gradients that were not finite" in found[0][0]
        assert "The first gradient that is not finite: 1.bias" in found[0][0]
        assert found[0][1] == 2


def evaluations():
    """Loss over batches beside that of one process, whose batches are the same."""
    size = distributed.get_world_size()
    ours, alone = create(cut(network()), Ranks.here()), create(network(), Ranks(parts=size))
    data = [batch.T for batch in batches(9)]
    return [
        evaluate(ours, data[:n], objective)["loss"] - evaluate(alone, data[:n], objective)["loss"]
        for n in (1, 3, 5, 8)
    ]


def test_an_evaluation_takes_any_number_of_batches(four):
    for gaps in four.run(evaluations):
        assert gaps == pytest.approx([0, 0, 0, 0], abs=1e-6)


def norms():
    size, batch, found = distributed.get_world_size(), batches()[0], []
    for model, ranks in ((cut(network()), Ranks.here()), (network(), Ranks(parts=size))):
        state = create(model, ranks)
        with LayerNorms(state) as read:
            read.request()
            step(state, batch)
            found.append(read.read())
    return found


def test_norms_of_layers_are_those_of_whole_gradients(four):
    for ours, alone in four.run(norms):
        assert ours == pytest.approx(alone, rel=1e-5)
        assert len(ours) == 4


# -- checkpoints ----------------------------------------------------------------------------------------------------


def resume(folder):
    shards.LEAST_SHARE_BYTES = 1
    ranks, data, path = Ranks.here(), batches(), Path(folder)
    state = reduce(step, data[:2], create(cut(network()), ranks, ema=True))
    digest = checkpoint.save(state, path / "half")
    with checkpoint.BackgroundSaver() as saver:
        saver.save(state, path / "thread")
        whole_run = reduce(step, data[2:], state)
    loaded = checkpoint.load(path / "half", like=create(cut(network()), ranks, ema=True))
    bits = same(reduce(step, data[2:], loaded), whole_run)
    replicas = checkpoint.load(path / "half", like=create(cut_in_replicas(network()), ranks, ema=True))
    found = checkpoint.digest(checkpoint.load(path / "thread", like=replicas)), checkpoint.digest(replicas)
    plain = create(network(), ranks, ema=True)
    found += (checkpoint.digest(checkpoint.load(path / "half", like=plain)),)
    checkpoint.save(plain, path / "plain")
    again = checkpoint.load(path / "plain", like=loaded)
    return (
        digest,
        set(found),
        bits,
        checkpoint.digest(again) == checkpoint.digest(plain),
        checkpoint.digest(whole_run),
    )


def test_a_resume_on_as_many_ranks_is_exact_and_files_know_nothing_of_shards(four, tmp_path):
    found = four.run(resume, str(tmp_path))
    digest, digests, bits, plain, after = found[0]
    assert all(other == found[0] for other in found)
    assert (digests, bits, plain) == ({digest}, None, True)
    assert len(list((tmp_path / "half").glob("model-*"))) > 1
    like = create(network(), Ranks(parts=4, exact=False), ema=True)
    with pytest.warns(checkpoint.InexactResumeWarning, match="world_size 4 there, 1 here"):
        alone = checkpoint.load(tmp_path / "half", like=like)
    assert checkpoint.digest(alone) == digest
    alone = reduce(step, batches()[2:], alone)
    assert alone.step == 4
    assert checkpoint.digest(alone) != after  # another order of sums
    weights = checkpoint.load_weights(tmp_path / "half", into=create(network(), None))
    assert torch.equal(
        weights.params["1.weight"],
        checkpoint.open_checkpoint(tmp_path / "half").tensors["model.safetensors"]["1.weight"],
    )


def begun_on_two(folder):
    """Saved in the middle of a run in four parts on two ranks; where it ends there."""
    state = create(cut(network()), Ranks.here(parts=4), SGD)
    state = reduce(step, LONG[:STOP], state)
    checkpoint.save(state, Path(folder) / "half")
    return values(reduce(step, LONG[STOP:], state))


def gone_on(folder):
    """The end of that run on the ranks that there are, and whether one was warned."""
    state = create(cut(network()), Ranks.here(parts=4), SGD)
    with warnings.catch_warnings(record=True) as said:
        state = checkpoint.load(Path(folder) / "half", like=state)
    return values(reduce(step, LONG[STOP:], state)), [str(one.message) for one in said]


def test_a_resume_on_other_ranks_is_off_by_the_rounding_of_sums(one, two, four, tmp_path):
    """Under SGD, which leaves a difference of gradients what it is: AdamW divides by the gradient, which may be all rounding."""
    expected = two.run(begun_on_two, str(tmp_path))[0]
    for ranks in (one, two, four):
        (first, said), *others = ranks.run(gone_on, str(tmp_path))
        for found in (first, *(state for state, _ in others)):
            pairs = zip(leaves(expected), leaves(found), strict=True)
            gap = max(float((x - y).abs().max() / x.abs().max()) for x, y in pairs)
            assert gap == 0 if ranks is two else 0 < gap < 1e-5
        assert [f"world_size 2 there, {ranks.size} here" in text for text in said] == [True] * (
            ranks is not two
        )


# -- the page -------------------------------------------------------------------------------------------------------


def page_block(folder):
    """Run the block of the page on this rank; what it prints."""
    text = (Path(steploop.__file__).parent / "docs" / "ranks.md").read_text(encoding="utf-8")
    program, shown = re.search(
        r"```python\n(# needs: torchrun\n.*?)```\n+```text\n(.*?)```", text, re.DOTALL
    ).groups()
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec(compile(program, "ranks.md", "exec"), {"__name__": "page"})
    return printed.getvalue(), shown


def test_the_loop_of_the_page_trains_a_sharded_model(two, tmp_path):
    (first, shown), (other, _) = two.run(page_block, str(tmp_path))
    assert (first, other) == (shown, "")
    assert (tmp_path / "sharded" / "model.safetensors").exists()


# -- what is refused ------------------------------------------------------------------------------------------------


def mesh():
    return init_device_mesh("cpu", (distributed.get_world_size(),))


def half_sharded():
    model = network()
    fully_shard(model[1], mesh=mesh())
    return create(model, Ranks.here())


def no_ranks():
    return forward_loss(create(cut(network()), None), batches()[0].T, objective)


def other_ranks():
    return create(cut(network()), Ranks(parts=4))


def looks_at_all():
    return create(cut(network()), Ranks.here(), Optimizer(torch.optim.LBFGS, lr=0.1))


def factored():
    return step(create(cut(network()), Ranks.here(), Optimizer(torch.optim.Adafactor, lr=0.1)), batches()[0])


def adaptive():
    return step(create(cut(network()), Ranks.here()), batches()[0], adaptive=0.1)


def no_weight():
    def weightless(model, batch):
        loss, outputs = objective(model, batch)
        return loss, outputs, 0.0 if distributed.get_rank() == 1 else 1.0

    return step(create(cut(network()), Ranks.here()), batches()[0], weightless)


def other_counts():
    state = create(cut(network()), Ranks.here())
    parts = split_parts(batches()[0].T.contiguous(), state.ranks)
    return accumulate(state, [parts] * (2 if distributed.get_rank() == 3 else 1), objective)


def no_samples():
    return step(create(cut(network()), Ranks.here()), batches(samples=0)[0])


def replaced():
    state = create(cut(network()), Ranks.here())
    state.model[1].bias = nn.Parameter(state.params["1.bias"].detach().clone())
    return step(state, batches()[0])


def alone_saved():
    return checkpoint.save(create(cut(network()), None), "nowhere")


def compiled():
    return steploop.compile(step)(create(cut(network()), Ranks.here()), batches()[0])


REFUSED = {
    half_sharded: "the parameter 0.weight is not sharded, and others are",
    no_ranks: "is trained by all its ranks together. Say so: TrainState.create(model, optimizer, ranks=Ranks.here())",
    other_ranks: "0.weight is sharded over 4 processes, but the state has 1 ranks",
    looks_at_all: "LBFGS looks at all values of a parameter",
    factored: "optimizer_step: Adafactor ",  # by torch's own words; those before 2.14 update, and keep what cannot be saved
    adaptive: "unscale_and_clip: adaptive looks at whole vectors",
    no_weight: "forward_loss: part 1 of the batch has samples but a weight of 0",
    other_counts: "accumulate: the ranks have [1, 1, 1, 2] micro-batches",
    no_samples: "no part of the batch has samples",
    replaced: "its parameter 1.bias was replaced by another tensor",
    alone_saved: "alone it can save none of them",
    compiled: "A step of a model under fully_shard cannot be compiled"
    if compile_runs_on_this_torch()
    else "uses internals of torch",
}


def refusal(function):
    try:
        return f"{function()!r} was not refused"
    except SteploopError as error:
        return str(error)


@pytest.mark.parametrize("function", REFUSED, ids=lambda function: function.__name__)
def test_what_a_sharded_model_cannot_do_is_refused_by_name_on_all_ranks(four, function):
    for said in four.run(refusal, function):
        assert REFUSED[function] in said
