"""Data that are not there, or too few (FAULTS F1, F2), through a run; and loaders that come and go (F14).

What these would catch: a run of no steps that ends as if it had trained, a best metric of nothing, half of a step taken on
a batch that does not fit, a worker or a descriptor that stays with every epoch.
"""

import json
import os
import threading
from pathlib import Path

import attrs
import pytest
import torch
from running import changed, digest, lines, running, steps, train

from steploop import checkpoint, evaluate
from steploop.cli import call
from steploop.data.loader import Loader
from steploop.run.signals import StopFlag

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
    """F1. One sentence and a code that is no success; nothing that looks like a trained run is left."""
    out = tmp_path / "run"
    assert call(["run", changed(tmp_path, change), "--out", str(out), *QUICK]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
    assert steps(out) == []
    assert not (out / "metrics.jsonl").exists() or lines(out) == []


def test_nothing_to_evaluate_on_gives_no_metric_and_no_best(tmp_path, capsys):
    """F1. torch's cross entropy of nothing is nan."""

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
    """F2. A batch of one, and a last one of one: 28 samples in batches of nine."""

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


class Counted(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.full((64,), float(index)), os.getpid()


def test_epochs_with_workers_leave_no_process_descriptor_thread_or_shared_memory():
    """F14. Whole epochs and ones that are broken off; persistent workers and others."""

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
    before = held()
    pids = epochs(12)
    assert len(pids) >= 12
    assert not any(running(pid) for pid in pids)
    assert held() == before


def test_runs_leave_no_descriptor_and_no_thread(tmp_path):
    """F14. With lines, checkpoints in the background, and an end by a signal."""

    def held():
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    def runs(first, count):
        for number in range(first, first + count):
            flag = StopFlag()
            train(tmp_path / str(number), {"epochs": "1"}, stop_at=3, flag=flag, csv=True, checkpoint_every=2)
            train(tmp_path / str(number), resume=True)

    runs(0, 1)
    before = held()
    runs(1, 4)
    assert held() == before
    assert digest(tmp_path / "1") == digest(tmp_path / "4")
