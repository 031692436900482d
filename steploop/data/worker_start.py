"""Start worker processes by fork, spawn or forkserver, and say what cannot be sent to them."""

import ctypes
import multiprocessing as mp
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from steploop.core.file_modules import file_modules, offer_modules
from steploop.errors import DataError

__all__ = ["SentModules", "start_hint", "start_worker", "starting", "unsendable"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_STOPPING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}  # they stop a run, not its workers


def start_worker(_: int, *, die_with_parent: bool) -> None:
    """Run first in every worker."""
    for signum in _STOPPING:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    parent = mp.parent_process()
    if parent is not None and parent.pid != os.getppid():
        # the system's parent is the fork server, which lives as long as its children
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    elif die_with_parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent is not None and not parent.is_alive():  # it died before the line above
            os._exit(1)


def _end_with(parent: Any) -> None:
    """Wait for the training process to end, however it ends, and end this one."""
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def starting() -> Iterator[None]:
    """Delay signals while workers are started: one that arrives before they ignore it would kill them.

    A fork server inherits the delay and keeps it: a signal for the whole process group must not end it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        if _start_method() == "forkserver":
            _preload()
        if _start_method() != "fork":
            # this helper process of multiprocessing inherits the delay as well, and its start lifts it here
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        with warnings.catch_warnings():
            # our own error says what cannot be sent
            warnings.filterwarnings("ignore", "Got pickle error", UserWarning)
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _preload() -> None:
    """Let a fork server that is still to be started import torch once, not every worker in every epoch (8 s to 0.5 s)."""
    server: Any = forkserver._forkserver
    # as it is unless somebody chose; __main__ stays, as Python has it
    chosen, pid = getattr(server, "_preload_modules", None), getattr(server, "_forkserver_pid", None)
    if pid is None and chosen == ["__main__"]:
        mp.set_forkserver_preload(["__main__", "steploop.data.batch_requests"])


def _start_method() -> str:
    """How a process would be started now; asking mp for it would settle it for good."""
    return mp.get_start_method(allow_none=True) or mp.get_all_start_methods()[0]


class SentModules:
    """Modules that were loaded by path, such as a recipe; unpickled, it lets the new process find them."""

    def __reduce__(self) -> Any:
        return _sent_modules, (file_modules(),)


def _sent_modules(modules: list[tuple[str, str, bytes | None]]) -> SentModules:
    offer_modules(modules)
    return SentModules()


def unsendable(parts: Mapping[str, Any], error: Exception) -> DataError:
    """Make the error for a loader that cannot be sent to a new process; names the part."""
    found: list[str] = []
    for name, part in parts.items():
        try:
            ForkingPickler.dumps(part)
        except Exception as cause:  # noqa: BLE001  (any object may be in there)
            found.append(f"{name} ({type(cause).__name__}: {cause})")
    what = ", ".join(found) or f"the loader ({type(error).__name__}: {error})"
    return DataError(
        f"workers are started by {_start_method()!r}, which sends them the dataset, transform and collate by "
        f"pickle, and it cannot send: {what}. Define functions and classes at the top level of a file, use "
        "num_workers=0, or call multiprocessing.set_start_method('fork') first"
    )


def start_hint(code: int) -> str:
    """What to do about a worker that ended with an exit code."""
    if code == 1 and _start_method() != "fork":
        return (
            f"its own error is on stderr; workers are started by {_start_method()!r}, which imports the main "
            "script again: it must train below `if __name__ == '__main__':`, and classes of the dataset must be "
            "defined in a file"
        )
    return (
        "SIGKILL usually means that memory ran out, SIGBUS that /dev/shm is full: use fewer workers or smaller "
        "batches"
    )


def _generator(device: str, state: bytes) -> torch.Generator:
    generator = torch.Generator(device)
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return generator


def _reduced(generator: torch.Generator) -> Any:
    return _generator, (str(generator.device), generator.get_state().numpy().tobytes())


# torch sends a generator's state as a temporary tensor in shared memory, whose file is closed before a spawned process
# opens it ("unable to resize file"): a dataset with a generator could not be sent.
ForkingPickler.register(torch.Generator, _reduced)
