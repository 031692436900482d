"""Compiled on ranks: each part's pass is compiled by itself, so that the number of ranks changes no bit, nor who computes in eager."""

import json
import os
import random
import re
import signal
from unittest.mock import patch

import parted_recipe
import pytest
import rank_cases as cases
import torch
from compiled_runs import needs_compiler
from forked_ranks import ForkedRanks
from rank_cases import MOMENTUM, Branches, batches, create, network, objective, values
from rank_processes import RankProcesses
from running import digest, lines, steps
from torch import nn

import steploop
from steploop import (
    Ranks,
    accumulate,
    backward_scaled,
    forward_loss,
    optimizer_step,
    split_parts,
    unscale_and_clip,
)
from steploop.compilation import part_compiler
from steploop.compilation.part_compiler import PartCompiler
from steploop.core.steps.by_parts.part_passes import computed_by
from steploop.core.trees import first_difference
from steploop.errors import CompileError

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def one():
    """Not the process of the tests: a compiled backward pass starts threads of autograd, after which no fork may train."""
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


def compiled_passes(name, parts):
    """A case of ``rank_cases`` with compiled passes, and how many graphs were made for it."""
    made = []
    compiler = PartCompiler(required=True, compiled=lambda what, seconds: made.append(what))
    with computed_by(compiler):
        found = getattr(cases, name)(parts)
    assert not compiler.refused
    return found, len(made)


# of ragged batches ranks make other graphs than one process; several passes, graphs that are kept, half precision
CASES = (
    "adamw", "momentum_of_ragged_batches", "tokens_as_weights", "fewer_samples_than_parts", "many_buckets", "bfloat16",
    "float16_that_overflows_first", "nan_in_one_part", "accumulated_tokens", "several_passes", "recomputed", "kept_graphs", "channels_last",
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_number_of_ranks_changes_no_bit_of_a_compiled_run(one, two, four, name):
    alone, made = one.run(compiled_passes, name, 4)[0]
    assert made
    for ranks in (two, four):
        for rank, (found, _) in enumerate(ranks.run(compiled_passes, name, 4)):
            assert first_difference(found, alone) is None, f"rank {rank} of {ranks.size}"


def apart(found, expected):
    """The largest difference of two states' tensors, each relative to its largest entry."""
    gaps = [0.0]
    for name, x in expected.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel():
            gap = (x.double() - found[name].double()).abs().max()
            gaps.append(float(gap / x.double().abs().max().clamp(min=1e-3)))
    return max(gaps)


@pytest.mark.parametrize(
    ("name", "tolerance"), [("momentum_of_ragged_batches", 1e-4), ("fewer_samples_than_parts", 1e-4), ("channels_last", 1e-4)]
)  # fmt: skip
def test_a_compiled_run_of_parts_is_the_eager_one_but_for_rounding(one, name, tolerance):
    found, _ = one.run(compiled_passes, name, 4)[0]
    expected = getattr(cases, name)(4)
    assert found["steps"] == expected["steps"]
    assert apart(found, expected) < tolerance


def plain(state, batch):
    state = forward_loss(state, split_parts(batch, state.ranks), objective)
    return optimizer_step(unscale_and_clip(backward_scaled(state), max_norm=1.0))


def of_micro_batches(state, batch):
    """A step with an objective that is another object each time; both halves of the batch are cut into parts."""
    micros = [split_parts([t[half::2] for t in batch], state.ranks) for half in (0, 1)]
    weighted = 2.0
    state = accumulate(state, micros, lambda model, batch: weighted * objective(model, batch)[0])
    return optimizer_step(unscale_and_clip(state, max_norm=1.0))


def trained(step, parts, model=network):
    state = create(model(), MOMENTUM, parts)
    for batch in batches(5, samples=22):
        state = step(state, batch)
    return values(state)


def beside(parts, compiling):
    """A run in which the ranks ``compiling`` compile and the others do not."""
    compiles = Ranks.here().rank in compiling
    return trained(steploop.compile(of_micro_batches) if compiles else of_micro_batches, parts)


def test_an_eager_rank_beside_a_compiled_one_has_its_state(one, two):
    """They exchange the same messages; what is compiled is the passes, so nothing else could differ."""
    first, other = two.run(beside, 4, [1])
    assert first_difference(first, other) is None
    eager, compiled = trained(of_micro_batches, 4), one.run(beside, 4, [0])[0]
    assert first_difference(first, eager) is not None
    assert first_difference(first, compiled) is not None
    assert apart(first, eager) < 1e-4


def figures(parts):
    said = []
    step = steploop.compile(plain, report=said.append)
    trained(step, parts)
    return step.figures, said


def test_a_compiled_step_of_parts_says_what_it_did(one):
    found, said = one.run(figures, 4)[0]
    assert (found.form, len(found.compile_s)) == ("compiled", 2)
    assert "of a step with ranks the passes are compiled" in found.reason
    assert said[0].startswith("compiled the passes of parts of (5, 6) float32, (5,) int64: ")
    assert len(said) == 2  # parts of five samples and of six


def draws_from_python(model, batch):
    return objective(model, (batch[0] * random.random(), batch[1]))


def fails(model, batch):
    return model(batch[0][:, :3]).sum()


def by_value(model, batch):
    loss = model(batch[0]).square().mean()
    return loss if loss > 0 else -loss


def with_objective(chosen, parts):
    return trained(steploop.compile(lambda state, batch: cases.step(state, batch, chosen)), parts)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (draws_from_python, "^CompileError: .*draws from Python's random"),
        (
            by_value,
            r"^CompileError: .*for a part of \(5, 6\) float32.*Data-dependent branching.*Or train without compiling",
        ),
        (fails, "^RuntimeError: .*mat1 and mat2 shapes cannot be multiplied"),
    ],
)
def test_a_pass_that_cannot_be_compiled_is_refused_by_name(one, chosen, said):
    ((fine, why),) = one.outcomes(with_objective, chosen, 4)
    assert not fine
    assert re.search(said, why)


def ever_new_numbers(parts):
    def step(state, batch):
        factor = 1.0 + state.attempted_steps
        return cases.step(
            state, batch, lambda model, batch: factor * nn.functional.cross_entropy(model(batch[0]), batch[1])
        )

    state = create(nn.Linear(6, 3), MOMENTUM, parts)
    compiled = steploop.compile(step)
    with patch.object(part_compiler, "_MOST_GRAPHS", 2):
        for _ in range(2):
            state = compiled(state, batches(1)[0])
        with pytest.raises(
            CompileError, match="2 graphs were made, and what the objective reads is new again"
        ):
            compiled(state, batches(1)[0])
    return state.step


def test_numbers_that_are_new_at_each_step_are_refused_after_some_graphs(one):
    assert one.run(ever_new_numbers, 2) == [2]


def automatic(parts, model):
    step = steploop.compile(plain, mode="auto")
    found = trained(step, parts, model)
    return step.figures, found


def test_all_ranks_choose_one_form(two):
    """The eager one where a pass cannot be compiled; what was measured is that of rank 0."""
    (first, found), (second, other) = two.run(automatic, 4, network)
    assert (first.form, first.reason, first.eager_us) == (second.form, second.reason, second.eager_us)
    assert first.form in {"compiled", "eager"}
    assert first_difference(found, other) is None
    (first, found), (second, other) = two.run(automatic, 4, Branches)
    assert first.form == second.form == "eager"
    assert "a pass cannot be compiled: Data-dependent branching" in first.reason
    assert first_difference(found, other) is None
    assert first_difference(found, trained(plain, 4, Branches)) is None


def eager_after_compiled(parts):
    state = create(cases.Recomputed(), MOMENTUM, parts)
    state = steploop.compile(plain)(state, batches()[0])
    before = {name: b.clone() for name, b in state.buffers.items()}
    backward_scaled(forward_loss(state, split_parts(batches()[1], state.ranks), objective))
    return all(b.equal(before[name]) for name, b in state.buffers.items())


def test_a_compiled_pass_teaches_the_machine_nothing_of_eager_ones(one):
    """Compiled, nothing is computed again in the backward pass; in eager BatchNorm's buffers would be written to."""
    assert one.run(eager_after_compiled, 2) == [True]


def test_a_compiled_run_goes_on_on_another_number_of_ranks(tmp_path):
    """Interrupted on two ranks, resumed on one; the last batch of an epoch has other parts."""
    given = ["--quiet", "--no-tune", "--device", "cpu", "--log-every", "1"]
    start = ["run", parted_recipe.__file__, "--parts", "2", "--compile", "--set", "samples=45", *given]
    whole, other = tmp_path / "whole", tmp_path / "other"
    codes, _, errors = ForkedRanks(tmp_path / "alone", 1, *start, "--out", str(whole)).end()
    assert codes == (0,), errors
    ranks = ForkedRanks(tmp_path / "begun", 2, *start, "--out", str(other), "--set", "step_s=0.2")
    ranks.ranks[0].wait_for(lambda: (other / "metrics.jsonl").exists() and len(lines(other)) > 2)
    os.kill(ranks.ranks[1].pid, signal.SIGTERM)
    codes, _, errors = ranks.end()
    assert codes == (75, 75), errors
    codes, _, errors = ForkedRanks(
        tmp_path / "rest", 1, "resume", str(other), *given, "--set", "step_s=0.0"
    ).end()
    assert codes == (0,), errors
    assert digest(other) == digest(whole)
    assert 0 < steps(other)[0] < steps(other)[-1]
    events = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert any("compiled the passes of parts" in event.get("note", "") for event in events)
