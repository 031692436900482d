"""Worker processes: the same batches, a clean end whatever happens, and the name of the one that died."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from steploop.core.trees import first_difference
from steploop.data.loader import Loader
from steploop.errors import DataError

linux = pytest.mark.skipif(sys.platform != "linux", reason="signals and process trees as Linux has them")


class Drawing(Dataset):
    """Samples that say who made them, and draw from the global generator."""

    def __len__(self):
        return 23

    def __getitem__(self, index):
        return index, torch.rand(())


class Naming(Drawing):
    def __getitem__(self, index):
        return index, os.getpid()


class Dying(Drawing):
    """The worker that is asked for sample 9 is killed; unshuffled batches of 2 give it to worker 0."""

    def __getitem__(self, index):
        if index == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


class Raising(Drawing):
    def __getitem__(self, index):
        return 1 / (index - 7)


class Stuck(Drawing):
    def __getitem__(self, index):
        time.sleep(1000)


def jitter(sample, generator):
    return *sample, torch.rand(2, generator=generator)


def add_noise(batch, generator):
    return batch, torch.rand(3, generator=generator)


def loader(data, num_workers, **how):
    return Loader(data, **({"batch_size": 4, "seed": 5, "num_workers": num_workers} | how))


def test_batches_and_augmentations_do_not_depend_on_the_number_of_workers():
    def everything(num_workers, *, persistent=False, prefetch=2):
        made = loader(
            Drawing(),
            num_workers,
            transform=jitter,
            augment=add_noise,
            persistent_workers=persistent,
            prefetch=prefetch,
        )
        got = [list(made.epoch(epoch, start)) for epoch, start in ((0, 0), (1, 0), (1, 4), (2, 6))]
        made.close()
        return got

    state = torch.get_rng_state()
    wanted = everything(0)
    assert first_difference(everything(1, prefetch=3), wanted) is None
    assert first_difference(everything(2, persistent=True), wanted) is None
    assert torch.get_rng_state().equal(state)


def test_tensors_pass_through_workers_unchanged():
    data = torch.arange(46).view(23, 2), torch.arange(23)
    assert first_difference(list(loader(data, 1).epoch(3)), list(loader(data, 0).epoch(3))) is None


def test_persistent_workers_live_on_and_others_do_not():
    made = loader(Naming(), 1, persistent_workers=True)
    first = {int(p) for _, pids in made.epoch(0) for p in pids}
    assert {int(p) for _, pids in made.epoch(1) for p in pids} == first
    unfinished = made.epoch(2)
    next(unfinished)
    # while it is under way, another epoch has workers of its own, and does not disturb it
    other = list(made.epoch(2))
    assert [b[0].tolist() for b in unfinished] == [b[0].tolist() for b in other[1:]]
    made.close()
    (pid,) = first
    assert not Path(f"/proc/{pid}").exists()


# torch looks for free file descriptors by a temporary file, in which the news of the death may interrupt it
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_worker_is_named_with_its_samples():
    batches = loader(Dying(), 2, batch_size=2, shuffle=False).epoch(0)
    got = []
    with pytest.raises(DataError) as excinfo:
        got.extend(batch.tolist() for batch in batches)
    owed = re.match(
        r"data worker 0 \(pid \d+\) was killed by SIGKILL; the first batch that it owed is (\d), samples \[(\d), (\d)\];",
        str(excinfo.value),
    )
    assert owed, excinfo.value
    # it dies at batch 4; one before that may have been on its way
    batch, *samples = map(int, owed.groups())
    assert batch in {0, 2, 4}
    assert samples == [2 * batch, 2 * batch + 1]
    assert got == [[0, 1], [2, 3], [4, 5], [6, 7]][: len(got)]


def test_a_death_is_reported_while_waiting_and_nowhere_else():
    batches = loader(Naming(), 1, batch_size=1).epoch(0)
    _, pid = next(batches)
    os.kill(int(pid), signal.SIGKILL)
    for _ in range(100):  # torch alone raises in here, in whatever line it is
        time.sleep(0.002)
    with pytest.raises(DataError, match="data worker 0"):
        next(batches)


def test_an_exception_in_a_worker_names_worker_sample_and_line():
    with pytest.raises(
        DataError, match=r"batch 3 failed at sample 7 in worker 1: ZeroDivisionError"
    ) as excinfo:
        list(loader(Raising(), 2, batch_size=2, shuffle=False).epoch(0))
    assert "return 1 / (index - 7)" in excinfo.value.__notes__[0]


def test_waiting_can_be_interrupted_and_a_stuck_worker_ends():
    class StopError(Exception):
        pass

    def poll():
        raise StopError

    batches = loader(Stuck(), 1).epoch(0, poll=poll)
    (process,) = torch.multiprocessing.active_children()
    with pytest.raises(StopError):
        next(batches)
    assert not process.is_alive()


SCRIPT = """
    import os, signal, sys, time, torch.multiprocessing as mp
    from steploop.data.loader import Loader

    class Slow:
        def __len__(self):
            return 1000
        def __getitem__(self, index):
            time.sleep(1000 if index >= 8 else 0)
            return index

    if __name__ == "__main__":
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: None)
        mp.set_start_method(sys.argv[2])
        batches = Loader(Slow(), batch_size=2, seed=0, shuffle=False, num_workers=int(sys.argv[3])).epoch(0)
        first = next(batches)
        print(*(p.pid for p in mp.active_children()), flush=True)
        if "group" in sys.argv[1]:
            os.killpg(0, signal.SIGINT)
            os.killpg(0, signal.SIGTERM)
            print([b.tolist() for b in (first, *(next(batches) for _ in range(3)))], flush=True)
        if "kill" in sys.argv[1]:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@linux
@pytest.mark.parametrize(
    ("how", "method", "workers"),
    [
        ("group", "fork", 2),
        ("kill", "fork", 2),
        ("group and kill", "spawn", 1),
        ("group and kill", "forkserver", 1),
    ],
)
def test_no_worker_outlives_the_run_however_it_ends(how, method, workers, tmp_path):
    """A signal to the whole process group does not hurt them; they go with their parent, stuck or not."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), how, method, str(workers)],
        capture_output=True,
        text=True,
        start_new_session=True,
        check=False,
    )
    pids, *rest = done.stdout.splitlines()
    assert done.stderr == ""
    assert rest == (["[[0, 1], [2, 3], [4, 5], [6, 7]]"] if "group" in how else [])
    assert done.returncode == (-signal.SIGKILL if "kill" in how else 0)
    for pid in pids.split():
        for _ in range(200):  # the system reaps them when it comes to it
            if not running(pid):
                break
            time.sleep(0.01)
        assert not running(pid)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
