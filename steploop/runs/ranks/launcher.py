"""What torchrun tells its processes in their environment, read without importing torch."""

import os

__all__ = ["attempt", "launch_id", "local_ranks", "rank_here", "several_ranks", "under_torchrun"]


def several_ranks() -> bool:
    """Whether this process is one of several that a launcher such as torchrun has started."""
    return "RANK" in os.environ and _number("WORLD_SIZE", 1) > 1


def rank_here() -> int:
    """The number of this process among the ranks; 0 where it is the only one."""
    return _number("RANK", 0) if several_ranks() else 0


def local_ranks() -> int:
    """How many ranks there are on this machine."""
    return _number("LOCAL_WORLD_SIZE", _number("WORLD_SIZE", 1))


def under_torchrun() -> bool:
    """Whether torchrun has started this process: it passes signals on, and ends all ranks when one has failed."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def attempt() -> int:
    """How often torchrun has started the ranks again (--max-restarts)."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def launch_id(number: int) -> str | None:
    """What a run of this launch has in common with the attempts after it, on rank 0; None without torchrun.

    Args:
        number: of the run among those of this process, from 1.
    """
    if not under_torchrun():
        return None
    import socket  # slow to import, and whoever imports this module wants to catch signals soon

    return f"{os.environ['TORCHELASTIC_RUN_ID']} {socket.gethostname()} {os.getppid()} {number}"


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
