"""Run torch's DataLoader workers so that they end cleanly, can be interrupted, and name the one that died.

What is changed about it, and why:

- Workers ignore the signals that stop a run, which reach the whole process group: the training process decides when to
  stop, and its workers must still serve the batches until then. They die with it (Linux: PR_SET_PDEATHSIG).
- torch reports a dead worker from a signal handler, as an exception in any line of the main thread, in the
  middle of a commit too. Here it is reported while waiting for a batch, and nowhere else.
- Waiting returns to Python every second at the latest, so that a flag set by a signal handler is seen.
"""

import atexit
import multiprocessing as mp
import multiprocessing.connection
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch._C import _remove_worker_pids, _set_worker_pids
from torch.utils.data import DataLoader, Sampler

from steploop.core.seeds import fold_in
from steploop.data.batch_requests import Fetcher, Request, listed
from steploop.data.order import WORKERS
from steploop.data.worker_start import start_hint, start_worker, starting, unsendable
from steploop.errors import DataError

__all__ = ["WorkerPool"]

POLL_S = 0.5  # how long a wait lasts at most before Python code runs again
GRACE_S = 1.0  # how long a worker may take to finish when it is no longer needed
KILLED_S = 10.0  # how long a busy machine may take to end a process that was killed


def _as_is(batch: Any) -> Any:
    return batch


class _Plan(Sampler[Request]):
    """The requests of the epoch that is about to begin."""

    def __init__(self) -> None:
        self.requests: Sequence[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)


class WorkerPool:
    """Keep worker processes that make the batches of one epoch at a time.

    Args:
        fetcher: what the workers run.
        num_workers: how many processes, at least 1.
        pin_memory: whether batches are copied into page-locked memory.
        prefetch: batches that each worker makes ahead.
        seed: the run's seed.
    """

    def __init__(
        self, fetcher: Fetcher, *, num_workers: int, pin_memory: bool, prefetch: int, seed: int
    ) -> None:
        self._iterator: Any = None
        self._fetcher = fetcher
        self._plan = _Plan()
        # PR_SET_PDEATHSIG fires when the forking *thread* ends, so only the main thread may ask for it
        main = threading.current_thread() is threading.main_thread()
        self._loader = DataLoader(
            fetcher,
            batch_size=None,  # a request is a batch
            sampler=self._plan,
            num_workers=num_workers,
            collate_fn=_as_is,
            pin_memory=pin_memory,
            timeout=POLL_S,
            worker_init_fn=partial(start_worker, die_with_parent=main),
            generator=torch.Generator().manual_seed(
                fold_in(seed, WORKERS)
            ),  # else it draws from the global one
            prefetch_factor=prefetch,
            persistent_workers=True,  # so that the pool, not the DataLoader, decides when they end
        )
        self._requests: Sequence[Request] = ()
        self._received = 0
        self._owner = os.getpid()
        _live.add(self)

    @property
    def idle(self) -> bool:
        """Whether every batch that was asked for has been received, so that another epoch can begin."""
        return self._received == len(self._requests)

    @property
    def pids(self) -> list[int]:
        """List the process ids of the workers, by worker id."""
        return [w.pid for w in self._processes]

    @property
    def _processes(self) -> list[Any]:
        return (
            [] if self._iterator is None else self._iterator._workers
        )  # torch has no public name for its workers

    def begin(self, requests: Sequence[Request]) -> None:
        """Start on the batches of an epoch, in new workers or in those that are idle.

        Raises:
            DataError: the workers could not be started.
        """
        self._plan.requests = self._requests = requests
        self._received = 0
        if self._iterator is not None:
            with suppress(
                RuntimeError
            ):  # the machine is so busy that they did not answer in time: begin anew
                iter(self._loader)
                return
            self.close()
        try:
            with starting():
                self._iterator = iter(self._loader)
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{self._loader.num_workers} worker processes could not be started: {error}; try fewer workers, or "
                "num_workers=0, which makes the same batches in this process"
            ) from error
        except Exception as error:  # anything in the dataset may refuse to be pickled
            raise unsendable(self._fetcher.parts, error) from error
        # torch's handler for SIGCHLD stays, but from here on knows none of our workers
        _remove_worker_pids(id(self._iterator))
        self._iterator._worker_pids_set = False  # else torch takes them off a second time

    def receive(self, poll: Callable[[], None] | None) -> Any:
        """The next batch; ``poll`` is called about twice a second while there is none.

        Raises:
            DataError: a worker died; names it and the samples it was to make.
        """
        while True:
            self._raise_if_a_worker_died(None)
            try:
                with self._watched():
                    batch = next(self._iterator)
            except (RuntimeError, OSError, EOFError) as error:
                late = str(error).startswith("DataLoader timed out")
                # a worker's sockets close a moment before the system says that it is dead
                self._raise_if_a_worker_died(error, patience_s=0 if late else GRACE_S)
                if not late:
                    raise DataError(f"the workers' batches could not be received: {error}") from error
            else:
                self._received += 1
                return batch
            if poll is not None:
                poll()

    def close(self) -> None:
        """End the workers: at once when they are idle, within a second when one is stuck."""
        if self._iterator is None or os.getpid() != self._owner or sys.is_finalizing():
            return
        iterator, processes = self._iterator, self._processes
        self._iterator = self._loader._iterator = None  # the DataLoader keeps a persistent one
        # torch joins each for five seconds, then sends a SIGTERM, which they ignore
        killer = threading.Timer(GRACE_S, _kill, [processes])
        killer.daemon = True
        killer.start()
        try:
            iterator._shutdown_workers()  # its only way to end persistent workers before __del__
        finally:
            killer.cancel()
            killer.join()  # if two threads wait for one process, one of them gets an error
            _kill(processes)

    def __del__(self) -> None:
        self.close()

    def kill(self) -> None:
        """End the workers at once, as this process ends."""
        if os.getpid() == self._owner:
            _kill(self._processes)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Let torch's SIGCHLD handler see our workers: it can wake a read that a killed worker left unfinished."""
        _set_worker_pids(id(self), tuple(self.pids))
        try:
            yield
        finally:
            _remove_worker_pids(id(self))

    def _raise_if_a_worker_died(self, error: BaseException | None, *, patience_s: float = 0) -> None:
        if patience_s:
            ended = mp.connection.wait([process.sentinel for process in self._processes], timeout=patience_s)
            for process in self._processes:
                if process.sentinel in ended:
                    # its files are closed a moment before the system says that it is dead
                    process.join(KILLED_S)
        for worker, process in enumerate(self._processes):
            if process.is_alive():
                continue
            code, pid = process.exitcode, process.pid
            how = (
                f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            )
            owed = ""
            # torch deals the requests out to the workers in turn
            first = self._received + (worker - self._received) % self._loader.num_workers
            if first < len(self._requests):
                request = self._requests[first]
                owed = f"; the first batch that it owed is {request.batch}, {listed(request.indices)}"
            self.close()
            raise DataError(f"data worker {worker} (pid {pid}) {how}{owed}; {start_hint(code)}") from error


def _kill(processes: list[Any]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join(KILLED_S)


# Daemonic children that ignore SIGTERM would let Python's own exit handler wait for them for ever. Registered
# after torch's handlers (imported above), this one runs before them.
_live: "weakref.WeakSet[WorkerPool]" = weakref.WeakSet()


@atexit.register
def _kill_remaining() -> None:
    for pool in list(_live):
        pool.kill()
