"""Write the command that goes on with a run."""

import shlex

__all__ = ["resume_command"]


def resume_command(run: str, *, restart_epoch: bool) -> str:
    """The words that go on with a run.

    Args:
        run: its directory.
        restart_epoch: whether it stands in the middle of an epoch whose batches cannot begin there.
    """
    return f"steploop resume {shlex.quote(run)}{' --restart-epoch' if restart_epoch else ''}"
