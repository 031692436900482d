"""The processes of a contender that trains on several ranks: asked together, they answer as one."""

import os
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from steploop.tools.bench.jobs import Job
from steploop.tools.bench.rounds import ContenderFailed, Worker

__all__ = ["RankWorkers"]

_JOINED: Mapping[str, Callable[[list[float]], float]] = {
    "steps": max,
    "peak_mib": max,
    "loss": lambda told: sum(told) / len(told),
}


class RankWorkers:
    """``job.nproc`` processes of one contender, which find each other as torchrun's do.

    Args:
        job: the recipe.
        name: of the contender.

    Attributes:
        samples: in a batch of all ranks together.
    """

    def __init__(self, job: Job, name: str) -> None:
        self._processes: list[Worker] = []
        self._pool = ThreadPoolExecutor(job.nproc)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        for rank in range(job.nproc):
            self._processes.append(Worker(environment=_environment(rank, job.nproc, port)))
        self.samples: float = self._ask({"job": job.to_json(), "name": name}, "samples")[0]

    def call(self, method: str, count: int) -> Any:
        """Call a method of the contender on all ranks: the slowest one's time, the largest memory, the mean loss."""
        told = self._ask({"call": method, "count": count}, "value")
        return None if None in told else _JOINED[method](told)

    def _ask(self, request: dict[str, Any], key: str) -> list[Any]:
        asked = [self._pool.submit(worker.ask, request) for worker in self._processes]
        for answer in as_completed(asked):
            if (error := answer.exception()) is not None:
                self.close()  # the others wait for the one that failed
                raise ContenderFailed(str(error)) from error
        return [answer.result()[key] for answer in asked]

    def close(self) -> None:
        """End the processes."""
        for worker in self._processes:
            worker.close()
        self._pool.shutdown()


def _environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells a process on a single machine."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": threads}
    return {**os.environ, **{name: str(value) for name, value in told.items()}, **where}
