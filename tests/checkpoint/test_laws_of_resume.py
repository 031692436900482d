"""Law 4: a run that is saved, loaded and gone on with is the run that went on; in a new process too."""

import json
import os
import subprocess
import sys
from functools import reduce
from pathlib import Path

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import Loop, loops

from steploop import Optimizer, checkpoint, constant
from steploop.testing import check_resume_is_exact, strategies
from steploop.testing.strategies import OPTIMIZERS, Task


def other_weights(loop):
    """A first state of the same recipe with other weights: a resume must keep none of them."""
    return attrs.evolve(loop, task=attrs.evolve(loop.task, seed=loop.task.seed + 1)).state


def a_loop(torch_class):
    """One with all there is: BatchNorm, dropout, tied, frozen, unused and 0-dim parameters, EMA, a loss scale."""
    parts = dict.fromkeys(("batch_norm", "tied", "frozen", "unused", "scalar", "counter"), True)
    return Loop(
        task=Task(seed=3, dropout=0.5, **parts),
        optimizer=Optimizer(
            torch_class, lr=0.05, **({"max_iter": 1} if torch_class is torch.optim.LBFGS else {})
        ),
        options={"seed": 11, "precision": "fp16", "ema": True},
        batches_of=[(index, 4) for index in range(5)],
        rate=constant(0.05),
        bound=("max_norm", 1.0),
        accumulated=False,
    )


@settings(max_examples=settings.default.max_examples // 2)
@given(loop=loops(), data=st.data())
def test_resuming_at_any_cut_continues_the_same_run(loop, data):
    batches = loop.batches
    cut = data.draw(strategies.cuts(len(batches)), label="cut")
    check_resume_is_exact(loop.step, loop.state, batches, cut, other_weights(loop))


@settings(max_examples=settings.default.max_examples // 3)
@given(loop=loops(), cut=st.integers(0, 3))
def test_two_runs_give_checkpoints_with_equal_digests(loop, cut):
    one, other = (reduce(loop.step, loop.batches[:cut], loop.state) for _ in range(2))
    assert checkpoint.digest(one) == checkpoint.digest(other)


RESUME = """
import json, sys
from functools import reduce
from pathlib import Path
import torch
from steploop import checkpoint
from test_laws_of_resume import OPTIMIZERS, a_loop, other_weights

torch.set_num_threads(1)
folder, cut = Path(sys.argv[1]), int(sys.argv[2])
digests = {}
for torch_class in OPTIMIZERS:
    if torch_class is not torch.optim.Muon:
        loop = a_loop(torch_class)
        loaded = checkpoint.load(folder / torch_class.__name__, like=other_weights(loop))
        digests[torch_class.__name__] = checkpoint.digest(reduce(loop.step, loop.batches[cut:], loaded))
print(json.dumps(digests))
"""


def test_a_new_process_goes_on_as_this_one_would_have_with_every_optimizer(tmp_path):
    """Muon, which takes no biases, is left out."""
    cut = 2
    expected = {}
    for torch_class in OPTIMIZERS:
        if torch_class is not torch.optim.Muon:
            loop = a_loop(torch_class)
            checkpoint.save(
                reduce(loop.step, loop.batches[:cut], loop.state), tmp_path / torch_class.__name__
            )
            expected[torch_class.__name__] = checkpoint.digest(reduce(loop.step, loop.batches, loop.state))
    command = [sys.executable, "-c", RESUME, str(tmp_path), str(cut)]
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.with_name("helpers")), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=here, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def test_a_resume_that_forgets_the_momentum_fails_the_law():
    task = Task()

    def save(state, folder):
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps({"steps": state.step}))

    with pytest.raises(
        AssertionError,
        match=r"after 1 batches: slots\.first\.weight\.momentum_buffer",
    ):
        check_resume_is_exact(
            a_loop(torch.optim.SGD).step,
            task.state(),
            task.batches(2),
            1,
            task.state(),
            save=save,
            load=lambda folder, like: like,
        )
