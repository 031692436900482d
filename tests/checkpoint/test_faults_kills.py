"""SIGKILL at random moments, at each system call, and a disk that is full."""

import collections
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import listed, make_linear

from steploop import checkpoint
from steploop.checkpoint.loading import open_checkpoint
from steploop.checkpoint.packing import collect
from steploop.checkpoint.saving import write_collected
from steploop.checkpoint.storage.litter import sweep
from steploop.checkpoint.storage.local import LOCAL
from steploop.errors import CheckpointWriteError

HERE = Path(__file__).parents[1] / "helpers"


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, **options
    )


def test_two_hundred_kills_lose_nothing_that_was_saved(tmp_path):
    """The newest checkpoint loads without a hand's turn, equals the uninterrupted run, and the step never goes back."""
    done = run(HERE / "kill_server.py", tmp_path, 200, timeout=900)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["kills"] == 200
    assert (seen["mismatches"], seen["steps_back"], seen["litter_left"]) == (0, 0, 0)
    assert seen["inside_a_save"] > 0
    assert seen["steps"] > 0


# all that a save asks of the system; what it does to memory and threads is left alone
CALLS = "mkdir,openat,write,fsync,close,rename,renameat,renameat2,unlink,unlinkat,rmdir,getdents64,newfstatat,fstat"


def saved_under(strace, target, collected):
    """Save in a fork of this process that ``strace`` watches, from its first call on; the exit code, or minus a signal.

    The code is 0, or the errno of the error that was raised. Forking spares each case the import of torch.
    """
    go, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 255
        try:
            os.read(go, 1)
            write_collected(LOCAL, target, collected, torch.device("cpu"), overwrite=True, wait_s=0.0)
            code = 0
        except CheckpointWriteError as error:
            code = error.errno
        finally:
            os._exit(code)
    watching = subprocess.Popen(
        ["strace", "-f", *strace, "-p", str(pid)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    try:
        attached = watching.stderr.readline()
        assert b"attached" in attached, attached
        os.write(ready, b".")
        _, status = os.waitpid(pid, 0)
        watching.wait(30)
    finally:
        watching.kill()
        watching.wait()
        watching.stderr.close()
        os.close(go)
        os.close(ready)
    return os.waitstatus_to_exitcode(status)


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("fault", ["signal=KILL", "error=EIO", "error=ENOSPC"])
def test_a_fault_at_each_system_call_leaves_the_old_or_the_new(tmp_path, fault, replacing):
    """Never neither, never a half; an error has the system's number; what is left over is swept at the next start."""
    folder, collected = tmp_path / "c", collect(make_linear(1))
    target, old, new = folder / "a", make_linear(0), checkpoint.digest(make_linear(1))

    def laid():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return {checkpoint.save(old, target)} if replacing else {None}

    laid()
    trace = tmp_path / "trace"
    assert saved_under(["-o", str(trace), "-e", f"trace={CALLS}"], target, collected) == 0
    called = re.findall(r"^\d+ +(\w+)\(", trace.read_text(), re.MULTILINE)
    assert called.count("fsync") == 6
    assert called.count("write") >= 4
    endings = collections.Counter()
    for number, call in enumerate(called):
        before = laid()
        nth = called[: number + 1].count(call)
        inject = ["-o", os.devnull, "-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={nth}"]
        ended = saved_under(inject, target, collected)
        found = open_checkpoint(target).digest if target.exists() or (folder / ".old-a").exists() else None
        case = f"{call} {nth}, call {number} of {len(called)}: ended with {ended}"
        assert found in {*before, new}, case
        if fault == "signal=KILL":
            assert ended == -signal.SIGKILL, case
        else:
            assert ended in {0, errno.EIO if fault == "error=EIO" else errno.ENOSPC}, case
            assert ended != 0 or found == new, case
        sweep(LOCAL, folder, alive=lambda pid: False)
        assert listed(folder) == ([] if found is None else ["a"]), case
        assert found is None or open_checkpoint(target).digest == found, case
        endings[ended, found == new] += 1
    assert len(endings) > 1, endings
    print(fault, "replacing" if replacing else "new", dict(endings))  # noqa: T201  (the figures of the release)


FULL = """
import sys, os
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from torch import nn
from steploop import Optimizer, TrainState, checkpoint
from steploop.checkpoint import CheckpointStore
from steploop.errors import CheckpointWriteError
import steploop.checkpoint.storage.commit as commit
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
    """Three tries with growing waits, nothing half written is left, no good step is deleted to make room."""
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
import steploop.checkpoint.storage.commit as commit
commit.time.sleep = lambda seconds: None
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
try:
    checkpoint.save(make_linear(1), Path(sys.argv[2]) / "b")
except CheckpointWriteError as error:
    print(error.errno, os.listdir(sys.argv[2]))
"""


def test_a_limit_on_the_size_of_files_is_an_error_too(tmp_path):
    """Python ignores SIGXFSZ, and so it stays: the write fails with EFBIG."""
    checkpoint.save(make_linear(0), tmp_path / "a")
    done = run("-c", LIMITED, HERE, tmp_path)
    assert done.stdout.strip() == f"{errno.EFBIG} ['a']", done.stderr
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 500
