"""Observation changes nothing: whatever is logged, shown, measured or kept, the same steps are taken.

What these would catch: a hook that draws a random number, an evaluation that forgets to put generators or buffers back,
a snapshot that is settled in place, a log line that moves a counter.
"""

import io
import json
from pathlib import Path

import attrs
import pytest
import torch
from rich.console import Console
from running import changed, digest, train

from steploop.runs.logs.screens import LiveScreen, PlainScreen

# what evaluations decide, and nothing in a step reads
FOLDS = {"best", "early_stopping", "plateau"}


def taken(out):
    """All that the steps of a run have made: tensors, counters, scale, cursor, rates."""
    newest = max((Path(out) / "checkpoints").glob("step-*"))
    body = json.loads((newest / "state.json").read_bytes())
    values = {key: value for key, value in body["state"]["states"][""].items() if key not in FOLDS}
    return values, body["files"]


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """A run that nobody watches: no line, no checkpoint but those of its epochs."""
    out = tmp_path_factory.mktemp("golden") / "run"
    assert train(out, log_every=10_000).state == "finished"
    return out


def live_screen():
    return LiveScreen(Console(file=io.StringIO(), force_terminal=True, width=90))


@pytest.mark.parametrize(
    "how",
    [
        {"checkpoint_every": 1},
        {"log_every": 1},
        {"log_every": 3, "checkpoint_every": 2},
        {"layer_norms": 1},
        {"layer_norms": 2, "log_every": 4, "checkpoint_every": 5},
        {"csv": True},
        {"tensorboard": True, "layer_norms": 1},
        {"screen": live_screen},
        {"screen": PlainScreen, "log_every": 2},
        {"tune": True},
    ],
    ids=lambda how: " ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in how.items()),
)
def test_a_run_ends_in_the_same_state_however_it_is_watched(how, golden, tmp_path):
    """To the bit, with everything that a checkpoint holds."""
    if how.get("tensorboard"):
        pytest.importorskip("tensorboard")
    how = {**how, **({"screen": how["screen"]()} if "screen" in how else {})}
    assert train(tmp_path / "run", **how).state == "finished"
    assert digest(tmp_path / "run") == digest(golden)


@pytest.mark.parametrize("eval_every", [1, 3, 1000])
def test_the_same_steps_are_taken_however_often_is_evaluated(eval_every, golden, tmp_path):
    """Which evaluation was the best depends on when they are; what is trained does not."""
    train(tmp_path / "run", {"eval_every": eval_every, "patience": 1000})
    assert taken(tmp_path / "run") == taken(golden)


def test_the_same_steps_are_taken_without_any_evaluation(golden, tmp_path):
    recipe = changed(tmp_path, lambda made, _: attrs.evolve(made, evaluate=None))
    train(tmp_path / "run", recipe=recipe)
    assert taken(tmp_path / "run") == taken(golden)


def test_an_evaluation_that_touches_a_weight_would_be_seen(golden, tmp_path):
    """The comparison above sees the last bit of one number."""

    def meddling(made, _):
        def evaluate(state):
            with torch.no_grad():
                bits = state.params["0.weight"].view(torch.int32)
                bits[0, 0] ^= 1
            return made.evaluate(state)

        return attrs.evolve(made, evaluate=evaluate)

    train(tmp_path / "run", recipe=changed(tmp_path, meddling))
    assert taken(tmp_path / "run") != taken(golden)
