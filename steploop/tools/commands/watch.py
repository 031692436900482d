"""``steploop watch``: the report of runs in a browser, which follows them."""

import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from steploop.core.interruption import Interrupted
from steploop.runs.safe_text import safe_text
from steploop.tools.commands.completion import complete_run

__all__ = ["watch"]

RUNS = typer.Argument(
    help="Run directories; several are compared.", show_default=False, autocompletion=complete_run
)
PORT = typer.Option(
    min=0, max=65535, help="Default: 8123, or the next that is free.", show_default=False, metavar="N"
)
OPEN = typer.Option("--open", help="Open the page in the browser.")


def watch(
    runs: Annotated[list[Path], RUNS],
    *,
    port: Annotated[int | None, PORT] = None,
    open_page: Annotated[bool, OPEN] = False,
) -> None:
    """Serve the report of RUNS, live, to a browser on this machine.

    Reads the files that a run writes, and changes nothing: it may begin and end at any time. Nobody but who has the
    printed address can open the page. For a run on another machine, start it there and open a tunnel from yours:
    ssh -N -L 8123:127.0.0.1:8123 HOST
    """
    from steploop.runs.signals import heeded
    from steploop.tools.watch.live_page import LivePage
    from steploop.tools.watch.server import open_server

    for run in runs:
        _await_start(run)
    page = LivePage(runs)
    page.current()  # a directory that is no run is refused here
    with open_server(page.current, port) as server:
        at = server.server_port
        sys.stdout.write(f"{server.address}\n")
        sys.stdout.flush()
        sys.stderr.write(
            f"Open this address in a browser. From another machine, first: ssh -N -L {at}:127.0.0.1:{at} HOST\n"
            "Ctrl-C ends this page, not the run.\n"
        )
        sys.stderr.flush()
        if open_page:
            typer.launch(server.address)
        try:
            server.serve_forever()
        except Interrupted as interrupted:
            if interrupted.signum != signal.SIGINT:
                raise
            heeded()


def _await_start(run: Path) -> None:
    """Wait while a process owns the directory and has not recorded a run in it yet: it loads torch, or data."""
    from steploop.runs.directory_lock import run_owner
    from steploop.runs.standing import is_run

    said = False
    while run.is_dir() and not is_run(run) and run_owner(run) is not None:
        if not said:
            sys.stderr.write(f"{safe_text(run)} is about to begin: waiting for it.\n")
            sys.stderr.flush()
        said = True
        time.sleep(0.3)
