"""Ranks for tests: processes that join one gloo group once, and run the functions that tests send to them."""

import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta

WAIT_S = 600


def _serve(rank, size, store, pipe):
    """Join the group; then run what comes, until None comes."""
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group(
        "gloo", f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=WAIT_S)
    )
    while (call := pipe.recv()) is not None:
        function, arguments = call
        try:
            pipe.send((True, function(*arguments)))
        except BaseException as error:  # noqa: BLE001  (whatever it is, the test shall see it)
            pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc(-3)}"))
    distributed.destroy_process_group()


class RankProcesses:
    """``size`` processes in one group; start-up takes longer than the tests, so a module starts them once."""

    def __init__(self, size):
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("forkserver")
        # imported once, where every process is forked from
        context.set_forkserver_preload(
            ["pytest", "torch._dynamo", "steploop.core.steps.evaluation", "steploop.core.steps.update"]
        )
        self._pipes, self._processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            store = f"{self._folder.name}/store"
            process = context.Process(target=_serve, args=(rank, size, store, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def outcomes(self, function, *arguments):
        """(Whether it returned, what it returned or its error as text) of each rank, in their order."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        found = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(WAIT_S), f"rank {rank} of {self.size} said nothing"
            found.append(pipe.recv())
        return found

    def run(self, function, *arguments):
        """What the function returned on each rank, in their order."""
        found = self.outcomes(function, *arguments)
        for rank, (fine, value) in enumerate(found):
            assert fine, f"rank {rank} of {self.size}: {value}"
        return [value for _, value in found]

    def close(self):
        """End the processes."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()
