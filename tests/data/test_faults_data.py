"""Data that are not there, too few, or that break a promise, through a run; and loaders that come and go.

What these would catch: a run of no steps that ends as if it had trained, a best metric of nothing, half of a step taken on
a batch that does not fit, a worker or a descriptor that stays with every epoch.
"""

import itertools
import json
import os
import threading
import time
from pathlib import Path

import attrs
import pytest
import torch
from running import StopAtCheck, changed, digest, lines, running, steps, train, wait_until

from steploop import checkpoint, evaluate
from steploop.data.loader import Loader
from steploop.data.stream import Stream
from steploop.runs.signals import StopFlag
from steploop.tools.cli import call

QUICK = ["--no-tune", "--device", "cpu", "--quiet", "--log-every", "1"]


def with_batches(**how):
    return lambda recipe, _: attrs.evolve(recipe, batches=attrs.evolve(recipe.batches, **how))


class NoBatches:
    def __len__(self):
        return 0

    def epoch(self, epoch, start=0):
        return []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_batches(dataset=[]), "the dataset has no samples: there is nothing to load"),
        (
            with_batches(batch_size=100, drop_last=True),
            "28 samples with batch_size=100 and drop_last=True make no batch",
        ),
        (lambda recipe, _: attrs.evolve(recipe, batches=NoBatches()), "The recipe's batches are empty"),
    ],
    ids=["no samples", "none is whole", "no batches"],
)
def test_nothing_to_train_on_is_said_before_the_first_step(change, said, tmp_path, capsys):
    """One sentence and a code that is no success; nothing that looks like a trained run is left."""
    out = tmp_path / "run"
    assert call(["run", changed(tmp_path, change), "--out", str(out), *QUICK]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
    assert steps(out) == []
    assert not (out / "metrics.jsonl").exists() or lines(out) == []


def test_nothing_to_evaluate_on_gives_no_metric_and_no_best(tmp_path, capsys):
    """The cross entropy of nothing is nan in torch."""

    def change(recipe, _):
        nothing = lambda state: evaluate(state, [], lambda model, batch: None, {"accuracy": None})  # noqa: E731
        return attrs.evolve(recipe, evaluate=nothing)

    out = tmp_path / "run"
    assert call(["run", changed(tmp_path, change), "--out", str(out), *QUICK]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["metrics"], summary["best"]) == ({"loss": None, "accuracy": None}, None)
    evaluations = [line for line in lines(out) if line["kind"] == "eval"]
    assert [(line["metrics"], line["best"]) for line in evaluations] == [(summary["metrics"], False)] * 2
    (state,) = json.loads((max((out / "checkpoints").iterdir()) / "state.json").read_bytes())["state"][
        "states"
    ].values()
    assert state["early_stopping"]["bad_checks"] == 2


@pytest.mark.parametrize("batch_size", [1, 9])
def test_a_batch_too_small_for_batch_norm_names_layer_batch_and_remedy_and_no_half_step_is_taken(
    batch_size, tmp_path, capsys
):
    """A batch of one, and a last one of one: 28 samples in batches of nine."""

    def change(recipe, config):
        def train_step(state, batch):
            before = checkpoint.digest(state)
            try:
                return recipe.train_step(state, batch)
            finally:
                if len(batch[0]) < 3:  # two halves of one sample
                    assert checkpoint.digest(state) == before

        return attrs.evolve(
            recipe, train_step=train_step, batches=attrs.evolve(recipe.batches, batch_size=batch_size)
        )

    words = ["--out", str(tmp_path / "run"), *QUICK, "--checkpoint-every", "1"]
    assert call(["run", changed(tmp_path, change), *words]) == 1
    err = capsys.readouterr().err
    assert "The layer 1 (BatchNorm1d) needs more than one value per channel in training" in err
    assert "the batch holds (1, 6) float32, (1,) int64" in err
    assert "drop_last=True" in err
    assert steps(tmp_path / "run")[-1:] == ([3] if batch_size == 9 else [])


def numbered(epoch, start):
    """An endless stream of batches, each a function of its place."""
    for number in itertools.count(start):
        generator = torch.Generator().manual_seed(1000 * epoch + number)
        x = torch.randn(4, 6, generator=generator)
        yield x, (x.sum(1) > 0).long()


def raising(epoch, start):
    for number, batch in enumerate(numbered(epoch, start), start):
        if (epoch, number) == (1, 2):
            raise KeyError("gone")
        yield batch


STREAMS = {
    "restorable": Stream(numbered, length=7, restorable=True),
    "not restorable": Stream(numbered, length=7),
    "too short": Stream(
        lambda epoch, start: itertools.islice(numbered(epoch, start), 5 - start), length=7, restorable=True
    ),
    "raising": Stream(raising, length=7, restorable=True),
}


def streaming(kind):
    return lambda recipe, _: attrs.evolve(recipe, batches=STREAMS[kind])


def test_a_run_over_an_endless_stream_is_resumed_exactly_where_the_stream_can(tmp_path):
    recipe = changed(tmp_path, streaming("restorable"))
    train(tmp_path / "whole", recipe=recipe)
    train(tmp_path / "run", recipe=recipe, stop_at=10)
    train(tmp_path / "run", resume=True)
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def test_a_resume_within_an_epoch_is_refused_where_the_stream_cannot(tmp_path, capsys):
    """At the beginning of an epoch it is none."""
    recipe, out = changed(tmp_path, streaming("not restorable")), tmp_path / "run"
    train(out, recipe=recipe, stop_at=10)
    assert call(["resume", str(out), "--quiet"]) == 1
    assert (
        "stands at batch 3 of epoch 2, and its stream cannot begin in the middle" in capsys.readouterr().err
    )
    train(tmp_path / "whole", recipe=recipe)
    train(tmp_path / "other", recipe=recipe, flag=StopAtCheck(1))  # in the evaluation after the first epoch
    train(tmp_path / "other", resume=True)
    assert digest(tmp_path / "other") == digest(tmp_path / "whole")


@pytest.mark.parametrize(
    ("kind", "said", "last"),
    [
        ("too short", "the stream ended after 5 batches of epoch 0, and length=7 was promised", 5),
        ("raising", "the stream raised at batch 2 of epoch 1: KeyError: 'gone'", 9),
    ],
)
def test_a_stream_that_breaks_its_promise_ends_the_run_with_a_sentence(kind, said, last, tmp_path, capsys):
    """What was saved until then is there."""
    words = ["--out", str(tmp_path / "run"), *QUICK, "--checkpoint-every", "1", "--set", "precision=fp32"]
    assert call(["run", changed(tmp_path, streaming(kind)), *words]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
    assert steps(tmp_path / "run")[-1] == last


def settled(measure):
    """What it gives once it gives the same for a fifth of a second."""
    seen = [measure()]
    while len(seen) < 20 or len(set(seen[-20:])) > 1:
        time.sleep(0.01)
        seen.append(measure())
    return seen[-1]


class Counted(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.full((64,), float(index)), os.getpid()


def test_epochs_with_workers_leave_no_process_descriptor_thread_or_shared_memory():
    """Whole epochs and ones that are broken off; persistent workers and others."""

    def held():
        return (
            len(list(Path("/proc/self/fd").iterdir())),
            threading.active_count(),
            len(list(Path("/dev/shm").iterdir())),
        )

    def epochs(count):
        pids = set()
        for number in range(count):
            loader = Loader(
                Counted(), batch_size=2, seed=0, num_workers=2, persistent_workers=number % 2 == 0
            )
            batches = loader.epoch(number)
            for _, workers in zip(range(7 if number % 3 else 2), batches, strict=False):
                pids |= set(workers[1].tolist())
            batches.close()
            loader.close()
        return pids

    epochs(2)
    before = settled(held)
    pids = epochs(12)
    assert len(pids) >= 12
    assert not any(running(pid) for pid in pids)
    wait_until(lambda: held() == before)  # the threads of torch's queues end in their own time


def test_runs_leave_no_descriptor_and_no_thread(tmp_path):
    """With lines, checkpoints in the background, and an end by a signal."""

    def held():
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    def runs(first, count):
        for number in range(first, first + count):
            flag = StopFlag()
            train(tmp_path / str(number), {"epochs": "1"}, stop_at=3, flag=flag, csv=True, checkpoint_every=2)
            train(tmp_path / str(number), resume=True)

    runs(0, 1)
    before = settled(held)
    runs(1, 4)
    wait_until(lambda: held() == before)
    assert digest(tmp_path / "1") == digest(tmp_path / "4")
