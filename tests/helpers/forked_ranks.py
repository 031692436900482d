"""Runs on several ranks for the tests: forks of this interpreter, with the environment that torchrun gives to its processes."""

import os
from contextlib import contextmanager

from running import Forked
from torch.distributed import TCPStore

_stores = []  # kept: a fork in which one is collected would wait for a thread that it does not have


@contextmanager
def environment(**values):
    """The environment of a rank; only entered in a fork, which does not leave it."""
    os.environ.update({name: str(value) for name, value in values.items()})
    yield


def _without_torchs_own(text):
    """The lines that are steploop's: gloo in torch 2.9 says on stdout, from C++, how many peers it found."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("[Gloo] Rank "))


class ForkedRanks:
    """``steploop ...`` on ``size`` ranks; on one, a plain process.

    They find each other in a store of this process, as under torchrun in one of torchrun; which starts them again with the
    same one: ``again`` are the ranks before.
    """

    def __init__(self, folder, size, *arguments, again=None, **variables):
        self.size = size
        self.attempt = 0 if again is None else again.attempt + 1
        if again is None:
            _stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        self.store = store = _stores[-1] if again is None else again.store
        self.ranks = []
        for rank in range(size):
            (own := folder / f"rank-{rank}").mkdir(exist_ok=True, parents=True)
            where = {
                "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "GLOO_SOCKET_IFNAME": "lo",
                "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "test",
                "TORCHELASTIC_RESTART_COUNT": self.attempt,
            }  # fmt: skip
            inside = environment(**(where if size > 1 else {}), **variables)
            self.ranks.append(Forked(own, *arguments, inside=inside))

    def end(self, timeout_s=600):
        """(exit codes, what each said on stdout, on stderr)."""
        ended = [rank.end(timeout_s) for rank in self.ranks]
        codes, said, errors = zip(*ended, strict=True)
        return codes, tuple(map(_without_torchs_own, said)), errors

    def kill(self):
        """End those that still run."""
        for rank in self.ranks:
            rank.kill()
