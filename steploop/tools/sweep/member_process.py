"""The process of one member: ``python -m steploop.tools.sweep.member_process DIR NUMBER``."""

import os
import signal
import sys
import threading
from pathlib import Path

from steploop.errors import SteploopError
from steploop.runs.signals import (
    catch_signals,
    exit_code_of,
    exit_soon_with,
    heeded,
    interruption_of,
    process_flag,
)

__all__ = ["main"]


def _stop_with_the_sweep() -> None:
    """Ask this process to stop when the sweep that holds the other end of stdin is gone, even by a kill."""
    while os.read(0, 64):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Run the member; the exit code is that of ``steploop run``."""
    catch_signals()
    signal.signal(
        signal.SIGUSR2, signal.SIG_IGN
    )  # submitit's, to the whole job: the job itself passes SIGTERM on
    threading.Thread(target=_stop_with_the_sweep, daemon=True, name="sweep gone").start()
    path, number, *words = sys.argv[1:]
    try:
        code = _run(Path(path), int(number), trust="--trust" in words)
    except BaseException as error:
        if (interrupted := interruption_of(error)) is not None:
            heeded()
            code = exit_code_of(interrupted.signum)
        elif isinstance(error, SteploopError):
            sys.stderr.write(f"steploop: {error}\n")
            code = error.exit_code
        else:
            raise
    exit_soon_with(code)
    raise SystemExit(code)


def _run(path: Path, number: int, *, trust: bool) -> int:
    from steploop.runs.logs.screens import PlainScreen
    from steploop.runs.trust import require_trust
    from steploop.tools.sweep.any_member import run_any_member
    from steploop.tools.sweep.member_run import recorded_recipe
    from steploop.tools.sweep.sweep_record import read_sweep

    require_trust(path, trust=trust, command="sweep --resume")
    sweep = read_sweep(path)
    file = recorded_recipe(sweep)
    return run_any_member(sweep, number, file, screen=PlainScreen(), stop=process_flag(), trust=trust)


if __name__ == "__main__":
    main()
