"""SIGKILL at random moments (FAULTS A1), at each system call (A2), and a disk that is full (A4)."""

import errno
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_helpers import listed, make_linear

from steploop import checkpoint
from steploop.checkpoint.filesystem import LOCAL
from steploop.checkpoint.litter import sweep
from steploop.checkpoint.loading import open_checkpoint

HERE = Path(__file__).parent


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, **options
    )


def test_two_hundred_kills_lose_nothing_that_was_saved(tmp_path):
    """A1. The newest checkpoint loads without a hand's turn, equals the uninterrupted run, and the step never goes back."""
    done = run(HERE / "kill_server.py", tmp_path, 200, timeout=300)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["kills"] == 200
    assert (seen["mismatches"], seen["steps_back"], seen["litter_left"]) == (0, 0, 0)
    assert seen["inside_a_save"] > 0
    assert seen["steps"] > 0


SAVE = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from checkpoint_helpers import make_linear
from steploop import checkpoint
from steploop.checkpoint.collecting import collect
from steploop.checkpoint.saving import write_collected
from steploop.checkpoint.filesystem import LOCAL
from steploop.errors import CheckpointWriteError
torch.set_num_threads(1)
state = make_linear(1)
collected = collect(state)
Path("/proc/self/comm").write_bytes(b"saving")
try:
    write_collected(LOCAL, Path(sys.argv[2]), collected, torch.device("cpu"), overwrite=True, wait_s=0.0)
except CheckpointWriteError as error:
    print(error.errno, error)
    sys.exit(error.exit_code)
"""
CALLS = "mkdir,openat,write,fsync,rename,renameat,renameat2,unlink,rmdir"


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("fault", ["signal=KILL", "error=EIO", "error=ENOSPC"])
def test_a_fault_at_each_system_call_leaves_the_old_or_the_new(tmp_path, fault):
    """A2."""
    target = tmp_path / "c" / "a"
    target.parent.mkdir()
    digests = {checkpoint.save(make_linear(0), target), checkpoint.digest(make_linear(1))}
    trace = tmp_path / "trace"
    traced = ["strace", "-f", "-o", str(trace), "-e", f"trace={CALLS}", "-P", str(target.parent)]
    command = [sys.executable, "-c", SAVE, str(HERE), str(target)]
    whole = subprocess.run(
        ["strace", "-f", "-o", str(trace), "-e", f"trace={CALLS}", *command], check=True, capture_output=True
    )
    del traced, whole
    lines = trace.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if "/proc/self/comm" in line)
    counts: dict[str, int] = {}
    cases = []
    for i, line in enumerate(lines):
        if (match := re.match(r"\d+ +(\w+)\(", line)) is not None:
            counts[match[1]] = counts.get(match[1], 0) + 1
            if i > start + 1:
                cases.append((match[1], counts[match[1]]))
    assert len(cases) > 15
    for call, number in cases:
        shutil.rmtree(target.parent)
        target.parent.mkdir()
        checkpoint.save(make_linear(0), target)
        injected = [
            "strace",
            "-f",
            "-o",
            "/dev/null",
            "-e",
            f"trace={call}",
            "-e",
            f"inject={call}:{fault}:when={number}",
        ]
        done = subprocess.run([*injected, *command], check=False, capture_output=True, text=True)
        assert done.returncode in {0, 4, -signal.SIGKILL, 128 + signal.SIGKILL}, done.stderr
        assert open_checkpoint(target).digest in digests, (call, number)
        if done.returncode == 4:
            assert done.stdout.split()[0] in {str(errno.EIO), str(errno.ENOSPC)}
        sweep(LOCAL, target.parent, alive=lambda pid: False)
        assert listed(target.parent) == ["a"]


FULL = """
import sys, os
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from torch import nn
from steploop import Optimizer, TrainState, checkpoint
from steploop.checkpoint import CheckpointStore
from steploop.errors import CheckpointWriteError
import steploop.checkpoint.commit as commit
waits = []
commit.time.sleep = waits.append
torch.set_num_threads(1)
torch.manual_seed(0)
state = TrainState.create(nn.Linear(600, 600), Optimizer(torch.optim.SGD, lr=0.1))
store = CheckpointStore(Path(sys.argv[2]), keep=50)
store.prepare()
saved = 0
try:
    while saved < 40:
        store.save(state.replace(applied_steps=saved + 1))
        saved += 1
except CheckpointWriteError as error:
    left = os.listdir(sys.argv[2])
    loaded = store.load(like=state)
    print(saved, error.errno, error.exit_code, loaded.step, len(left), sum(n.startswith(".") for n in left), waits)
"""


def test_a_full_disk_is_an_error_and_the_older_steps_stay(tmp_path):
    """A4. Three tries with growing waits, nothing half written is left, no good step is deleted to make room."""
    program = tmp_path / "full.py"
    program.write_text(FULL)
    disk = tmp_path / "disk"
    disk.mkdir()
    inside = f"mount -t tmpfs -o size=8m none {disk} && exec {sys.executable} {program} {HERE} {disk}"
    unshare = shutil.which("unshare")
    probed = (
        unshare
        and subprocess.run([unshare, "-Urm", "true"], check=False, capture_output=True).returncode == 0
    )
    if not probed:
        pytest.skip("needs user namespaces; the limit on file sizes is tested besides")
    done = subprocess.run([unshare, "-Urm", "sh", "-c", inside], check=False, capture_output=True, text=True)
    saved, number, code, step, names, litter, first, second = done.stdout.replace(",", "").split()
    assert (int(number), int(code)) == (errno.ENOSPC, 4), done.stderr
    assert int(saved) == int(step) == int(names) > 2
    assert (int(litter), first, second) == (0, "[0.5", "1.0]")


LIMITED = """
import sys
sys.path.insert(0, sys.argv[1])
import os, resource
from pathlib import Path
from checkpoint_helpers import make_linear
from steploop import checkpoint
from steploop.errors import CheckpointWriteError
import steploop.checkpoint.commit as commit
commit.time.sleep = lambda seconds: None
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
try:
    checkpoint.save(make_linear(1), Path(sys.argv[2]) / "b")
except CheckpointWriteError as error:
    print(error.errno, os.listdir(sys.argv[2]))
"""


def test_a_limit_on_the_size_of_files_is_an_error_too(tmp_path):
    """A4. Python ignores SIGXFSZ, and so it stays: the write fails with EFBIG."""
    checkpoint.save(make_linear(0), tmp_path / "a")
    done = run("-c", LIMITED, HERE, tmp_path)
    assert done.stdout.strip() == f"{errno.EFBIG} ['a']", done.stderr
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 500
