"""Runs on several ranks: the same bits on any number, one that speaks, and an end for all when one fails."""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import attrs
import parted_recipe
import points_recipe
import pytest
import torch
from forked_ranks import ForkedRanks
from running import changed, digest, kept, lines, running, steps, train

from steploop import backward_scaled, forward_loss, optimizer_step, unscale_and_clip
from steploop.recipe import find_recipe
from steploop.recipe.recipe_files import load_recipe_file
from steploop.runs.directory_lock import run_lock
from steploop.tools.replay.capsule_replay import replay

RECIPE = parted_recipe.__file__
EXPLODES = str(Path(__file__).parents[1] / "helpers" / "broken_recipes" / "explodes.py")
GIVEN = ["--quiet", "--no-tune", "--device", "cpu", "--log-every", "1"]
FAULT_S = 30  # far more than it takes; a rank that waits for another one waits for 600


def parted(device):
    return parted_recipe.build(parted_recipe.Config(), device)


def faulty(folder, build=parted):
    """A recipe whose train step calls FAULTS[os.environ["FAULT"]] before step 5 on rank 1."""

    def change(recipe, config):
        inner = build(recipe.batches.device)

        def train_step(state, batch):
            if os.environ.get("RANK") == "1" and state.attempted_steps == 5:
                FAULTS[os.environ.get("FAULT", "none")]()
            return inner.train_step(state, batch)

        return attrs.evolve(inner, train_step=train_step)

    return changed(folder, change)


def _raise(error):
    raise error


FAULTS = {
    "none": lambda: None,
    "bug": lambda: _raise(KeyError("a bug")),
    "memory": lambda: _raise(MemoryError()),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda: time.sleep(1000),
    "stop": lambda: os.kill(os.getpid(), signal.SIGTERM),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of one process in four parts, never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(out, recipe=RECIPE, parts=4)
    return out


def measured(out):
    """What the lines of training say."""
    names = ("attempted", "loss", "accuracy", "grad_norm", "skipped")
    return [[line[name] for name in names] for line in lines(out) if line["kind"] == "train"]


def test_four_two_and_one_ranks_continue_one_another_to_the_bits_of_one_process(whole, tmp_path):
    """Stopped by a signal to a single rank each time, after one and the same step on all."""
    out = tmp_path / "run"
    slow = ["--set", "step_s=0.05"]
    first = ForkedRanks(tmp_path, 4, "run", RECIPE, "--out", str(out), *GIVEN, *slow)
    first.ranks[2].wait_for(lambda: (out / "metrics.jsonl").exists() and len(lines(out)) > 1)
    os.kill(first.ranks[2].pid, signal.SIGTERM)
    codes, said, errors = first.end()
    assert codes == (75,) * 4, errors
    assert [bool(text) for text in said] == [True, False, False, False]
    assert errors[1:] == ("",) * 3
    at = steps(out)[-1]
    assert 0 < at < 12
    second = ForkedRanks(tmp_path, 2, "resume", str(out), *GIVEN, *slow)
    second.ranks[0].wait_for(lambda: lines(out)[-1].get("attempted", 0) > at)
    os.kill(second.ranks[0].pid, signal.SIGINT)
    codes, _, errors = second.end()
    assert codes == (130, 130), errors
    assert at < steps(out)[-1] < 12
    assert ForkedRanks(tmp_path, 1, "resume", str(out), *GIVEN, "--set", "step_s=0.0").end()[0] == (0,)
    assert digest(out) == digest(whole)
    assert measured(out) == measured(whole)


@pytest.mark.parametrize(
    ("fault", "code", "sentence"),
    [
        ("bug", 1, "KeyError: 'a bug'"),
        ("memory", 1, "MemoryError"),
        ("kill", -9, "steploop: rank 1 (process "),
        ("hang", 7, "steploop: rank 1 hangs in test_ranks_runs.py, line "),
    ],
)
def test_a_rank_that_fails_ends_all_with_one_sentence_and_the_run_goes_on(
    fault, code, sentence, whole, tmp_path
):
    out = tmp_path / "run"
    path = faulty(tmp_path)
    begun = time.monotonic()
    given = [*GIVEN, "--checkpoint-every", "2", "--rank-timeout", "3"]
    ranks = ForkedRanks(tmp_path, 2, "run", path, "--out", str(out), "--parts", "4", *given, FAULT=fault)
    codes, said, errors = ranks.end()
    assert codes == (7, code), errors
    assert time.monotonic() - begun < FAULT_S
    who = 0 if fault in {"kill", "hang"} else 1
    assert sentence in errors[who]
    assert not errors[1 - who].strip()
    assert not any(said)
    assert steps(out)[-1] in {2, 4}  # the newest may have been on its way to the disk
    assert not any(running(rank.pid) for rank in ranks.ranks)
    codes, _, errors = ForkedRanks(tmp_path, 2, "resume", str(out), *given).end()
    assert codes == (0, 0), errors
    assert digest(out)[1] == digest(whole)[1]


@pytest.mark.parametrize("named", [True, False])
def test_ranks_that_are_started_again_go_on_with_their_run(named, whole, tmp_path, monkeypatch):
    """What torchrun --max-restarts does: the same command once more."""
    monkeypatch.chdir(tmp_path)
    path = faulty(tmp_path)
    out = tmp_path / "run" if named else tmp_path / "runs" / f"{path.rpartition('/')[2][:-3]}-1"
    given = ["run", path, "--parts", "4", *GIVEN, "--checkpoint-every", "2"]
    given += ["--out", str(out)] if named else []
    first = ForkedRanks(tmp_path, 2, *given, FAULT="kill")
    assert first.end()[0] == (7, -9)
    assert steps(out)[-1] in {2, 4}  # the newest may have been on its way to the disk
    codes, said, errors = ForkedRanks(tmp_path, 2, *given, again=first).end()
    assert codes == (0, 0), errors
    assert f'"run": "{out if named else out.relative_to(tmp_path)}"' in said[0]
    assert digest(out)[1] == digest(whole)[1]


def test_a_step_that_is_not_finite_on_one_rank_leaves_the_capsule_of_one_process(tmp_path):
    """Of the same parts, byte for byte; one process replays it. The row of zeros is among the samples of rank 1."""
    given = [EXPLODES, "--set", "at=3", "--epochs", "1", "--parts", "2", *GIVEN]
    codes = [
        ForkedRanks(tmp_path / name, size, "run", *given, "--out", str(tmp_path / name / "run")).end()[0]
        for size, name in ((1, "one"), (2, "two"))
    ]
    assert codes == [(0,), (0, 0)]
    one, two = (tmp_path / name / "run" / "capsules" / "step-000000000004" for name in ("one", "two"))
    for name in ("batch.safetensors", "capsule.json", "state/state.json", "recipe.py"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    again = replay(two)
    assert again.reproduced
    assert (again.finding.phase, again.finding.module) == ("forward", "body.normalise")
    assert [stats.shape for stats in again.finding.went_in] == [(4, 6)]  # a part of eight samples
    file = load_recipe_file(Path(EXPLODES))
    batch = next(file.build(file.config_class(at=3), torch.device("cpu")).batches.epoch(0, 3))
    both = [torch.cat([part[name] for part in again.capsule.batch.batches]) for name in batch]
    assert all(torch.equal(x, y) for x, y in zip(both, batch.values(), strict=True))
    # a batch that cannot be stored is read from the data again, in its parts
    about = json.loads((two / "capsule.json").read_text())
    (two / "capsule.json").write_text(json.dumps({**about, "structure": None}))
    assert replay(two).reproduced


def test_a_second_job_in_the_directory_is_refused_on_all_ranks(whole, tmp_path):
    before = kept(whole)
    with run_lock(whole):
        codes, said, errors = ForkedRanks(tmp_path, 2, "resume", str(whole), *GIVEN).end()
    assert codes == (6, 7)
    assert f"steploop: The run directory {whole} is in use by process {os.getpid()}" in errors[0]
    assert errors[1] == ""
    assert not any(said)
    assert kept(whole) == before


def test_ranks_that_cannot_share_the_parts_are_refused_by_name(whole, tmp_path):
    codes, _, errors = ForkedRanks(tmp_path, 3, "resume", str(whole), *GIVEN).end()
    assert sorted(codes) == [2, 7, 7]
    assert (
        "begun with 4 parts to a batch, which 3 ranks cannot share equally. Resume it on 1, 2, 4 ranks."
        in ("".join(errors))
    )
    assert sum(map(bool, errors)) == 1


def test_ranks_that_build_different_data_are_refused(tmp_path):
    def change(recipe, config):
        samples = 48 + int(os.environ.get("RANK", "0"))
        return parted_recipe.build(parted_recipe.Config(samples=samples), recipe.batches.device)

    path = changed(tmp_path, change)
    codes, _, errors = ForkedRanks(tmp_path, 2, "run", path, "--out", str(tmp_path / "run"), *GIVEN).end()
    assert sorted(codes) in ([2, 2], [2, 7])
    assert "have not the same data of the recipe and batches of the recipe." in "".join(errors)
    assert not (tmp_path / "run").exists()


SMALL = {
    "char_lm": ["text={text}", "context=8", "width=8", "layers=1", "heads=2", "sample_characters=2"],
    "gan": ["width=4", "noise=4", "batch_size=8"],
}


@pytest.mark.parametrize("name", [*SMALL])
def test_a_shipped_recipe_trains_the_same_on_two_ranks(name, tmp_path):
    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n" * 40)
    settings = [part for s in SMALL[name] for part in ("--set", s.format(text=tmp_path / "text.txt"))]
    given = [*GIVEN, *settings, "--parts", "2", "--limit-steps", "3", "--layer-norms", "1"]
    recipe = str(find_recipe(name))
    alone = ForkedRanks(tmp_path, 1, "run", recipe, "--out", str(tmp_path / "one"), *given)
    both = ForkedRanks(tmp_path, 2, "run", recipe, "--out", str(tmp_path / "two"), *given)
    assert (alone.end()[0], both.end()[0]) == ((0,), (0, 0))
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    norms = [norms_of(tmp_path / name) for name in ("one", "two")]
    assert norms[0]
    assert norms[0] == norms[1]


def norms_of(out):
    """The norms of layers that the lines of training have."""
    return [
        value
        for line in lines(out)
        if line["kind"] == "train"
        for name, value in line.items()
        if name.startswith("layer_norm/")
    ]


def test_a_sharded_run_that_is_interrupted_ends_with_the_bits_of_one_that_is_not(tmp_path):
    """On as many ranks; the norms of its layers are those of whole parameters."""
    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n" * 20)
    file = load_recipe_file(find_recipe("char_lm"))
    small = {"context": 8, "width": 8, "layers": 1, "heads": 2, "epochs": 2}

    def build(_, *, shard):
        config = file.config_class(text=str(tmp_path / "text.txt"), shard=shard, **small)
        return file.build(config, torch.device("cpu"))

    sharded = faulty(tmp_path, partial(build, shard=True))
    given = [*GIVEN, "--layer-norms", "1"]
    whole, plain, out = tmp_path / "whole", tmp_path / "plain", tmp_path / "run"
    recipe = faulty(tmp_path, partial(build, shard=False))
    for name, out_of_it in ((sharded, whole), (recipe, plain)):
        codes, _, errors = ForkedRanks(tmp_path, 2, "run", name, "--out", str(out_of_it), *given).end()
        assert codes == (0, 0), errors
    codes, _, errors = ForkedRanks(tmp_path, 2, "run", sharded, "--out", str(out), *given, FAULT="stop").end()
    assert codes == (75, 75), errors
    assert steps(out)[-1] < 10
    codes, _, errors = ForkedRanks(tmp_path, 2, "resume", str(out), *given).end()
    assert codes == (0, 0), errors
    assert digest(out) == digest(whole)
    assert norms_of(out) == norms_of(whole)
    assert norms_of(whole)[:4] == pytest.approx(norms_of(plain)[:4], rel=1e-4)


def test_steps_that_are_never_finite_end_a_run_on_all_ranks(tmp_path):
    def change(recipe, config):
        inner = parted(recipe.batches.device)

        def train_step(state, batch):
            spoiled = os.environ.get("RANK") == "1" and state.attempted_steps >= 3
            x, y = batch
            state = forward_loss(state, (x.mul(float("nan") if spoiled else 1.0), y), points_recipe.objective)
            return optimizer_step(
                unscale_and_clip(backward_scaled(state), max_norm=1.0), max_nonfinite_steps=2
            )

        return attrs.evolve(inner, train_step=train_step)

    path = changed(tmp_path, change)
    codes, said, errors = ForkedRanks(tmp_path, 2, "run", path, "--out", str(tmp_path / "run"), *GIVEN).end()
    assert sorted(codes) in ([5, 5], [5, 7])  # who finds it first ends the other
    assert sum("2 steps in a row had gradients that were not finite" in error for error in errors) == 1
    assert sum(map(bool, errors)) == 1
    assert not any(said)
