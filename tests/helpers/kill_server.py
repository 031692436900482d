"""A process that is killed again and again: each child goes on from the newest checkpoint, and saves every step.

    python kill_server.py DIRECTORY KILLS

torch is imported once and the children are forked, so that a kill costs milliseconds. Prints one JSON object.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from checkpoint_helpers import listed, make_batches, make_state, train_step

from steploop import checkpoint
from steploop.checkpoint import CheckpointStore

STEPS = 30


def golden():
    """The digest after each step of a run that nobody interrupts."""
    state = make_state(0, precision="fp32")
    digests = {0: checkpoint.digest(state)}
    for batch in make_batches(STEPS):
        state = train_step(state, batch)
        digests[state.step] = checkpoint.digest(state)
    return digests


def seconds_per_save(directory):
    """How long a step with its save takes here: the kills come within a few of them, on any machine."""
    store, state = CheckpointStore(directory, keep=2), make_state(0, precision="fp32")
    store.prepare()
    start = time.perf_counter()
    for batch in make_batches(5):
        state = train_step(state, batch)
        store.save(state)
    return (time.perf_counter() - start) / 5


def child(directory, ready):
    """Train from the newest checkpoint to the end, saving each step."""
    store = CheckpointStore(directory, keep=2)
    store.prepare()
    first = make_state(0, precision="fp32")
    state = store.load(like=first) or first
    os.write(ready, b".")
    for batch in make_batches(STEPS)[state.step :]:
        state = train_step(state, batch)
        store.save(state)
    os._exit(0)


def main(directory, kills):
    torch.set_num_threads(1)
    digests, rng = golden(), random.Random(0)
    seen = {
        "kills": 0,
        "inside_a_save": 0,
        "mismatches": 0,
        "steps_back": 0,
        "litter_left": 0,
        "runs": 1,
        "steps": 0,
    }
    root = Path(directory)
    longest_s = 4 * seconds_per_save(root / "timing")
    newest = 0
    while seen["kills"] < kills:
        here = root / f"run-{seen['runs']}"
        heard, ready = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                child(here, ready)
            finally:
                os._exit(1)
        if rng.random() < 0.9:  # some die while they are starting
            os.read(heard, 1)
        os.close(heard)
        os.close(ready)
        time.sleep(rng.uniform(0, longest_s))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            seen["kills"] += 1
        elif status != 0:
            raise SystemExit(f"a child failed with status {status}")
        names = listed(here) if here.exists() else []
        seen["inside_a_save"] += any(name.startswith(".tmp-0") for name in names)
        store = CheckpointStore(here, keep=2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a damaged checkpoint would be a warning
            found = store.newest()
        step = 0 if found is None else store.steps()[-1]
        seen["mismatches"] += found is not None and found.digest != digests[step]
        seen["steps_back"] += step < newest
        seen["steps"] += step - newest
        newest = step
        if os.WIFEXITED(status) or step == STEPS:
            store.prepare()
            seen["litter_left"] += sum(name.startswith(".") for name in listed(here))
            seen["runs"] += 1
            newest = 0
    sys.stdout.write(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
