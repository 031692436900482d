"""A compiled run that is stopped anywhere takes each step in the form in which it would have: the bits depend on it.

What these would catch: a short last batch that counts as new, or as the usual one, after a resume; ``auto`` that measures
once more and chooses otherwise.
"""

import json

import pytest
from compiled_runs import run_as_it_is
from running import lines, train

from steploop.compilation import compiled_step
from steploop.compilation.graph_calls import CompiledGraph

# 7 batches an epoch, the last one of 3 samples instead of 4; no layer needs two in a part
VALUES = {"samples": 27, "epochs": 3, "precision": "fp32", "widths": ()}
# the short one is compiled when it comes for the third time
COMPILED = [n for n in range(2, 22) if n not in {7, 14}]


@pytest.fixture
def compiled_steps(monkeypatch):
    """The attempted steps that were taken as a graph, in order."""
    run_as_it_is(monkeypatch)
    taken, call = [], CompiledGraph.__call__

    def noted(self, bound, now, tensors):
        taken.append(int(now.states[0].attempted_steps) + 1)
        return call(self, bound, now, tensors)

    monkeypatch.setattr(CompiledGraph, "__call__", noted)
    return taken


@pytest.mark.parametrize(("mode", "stop"), [(True, None), (True, 6), (True, 20), ("auto", 13)])
def test_a_compiled_run_that_is_stopped_takes_every_step_in_the_same_form(
    mode, stop, compiled_steps, monkeypatch, tmp_path
):
    measured = []
    monkeypatch.setattr(
        compiled_step, "measure", lambda *_: measured.append(1) or {"eager": 2.0, "compiled": 1.0}
    )
    train(tmp_path / "run", VALUES, compile=mode, stop_at=stop)
    if stop is not None:
        train(tmp_path / "run", resume=True)
    assert compiled_steps == COMPILED
    assert len(measured) == (mode == "auto")


def test_a_run_that_was_killed_counts_only_what_its_checkpoint_knows(compiled_steps, tmp_path):
    """Of the forms that came after the checkpoint, none has come yet."""
    out = tmp_path / "run"
    train(out, VALUES, compile=True, stop_at=13)
    counted = [line for line in lines(out) if "batch_form" in line]
    assert [(line["attempted"], line["seen"]) for line in counted] == [(2, 3), (7, 1)]
    with (out / "metrics.jsonl").open("a") as file:  # of steps that were taken and not saved
        for attempted, times in ((14, 2), (21, 3)):
            file.write(json.dumps({**counted[1], "attempted": attempted, "seen": times}) + "\n")
    train(out, resume=True)
    assert compiled_steps == COMPILED
    counted = [line for line in lines(out) if "batch_form" in line]
    assert [(line["attempted"], line["seen"]) for line in counted] == [(2, 3), (7, 1), (14, 2), (21, 3)]
