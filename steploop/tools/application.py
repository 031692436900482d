"""The commands of the command line, registered in one typer application."""

import sys
from typing import Annotated

import typer

from steploop.tools.commands.bench import bench
from steploop.tools.commands.check import check
from steploop.tools.commands.command_class import Command
from steploop.tools.commands.diff import diff
from steploop.tools.commands.docs import docs
from steploop.tools.commands.export import export
from steploop.tools.commands.inspect import inspect
from steploop.tools.commands.lr_find import lr_find
from steploop.tools.commands.new import new
from steploop.tools.commands.plot import plot
from steploop.tools.commands.recipes import recipes
from steploop.tools.commands.replay import replay
from steploop.tools.commands.report import report
from steploop.tools.commands.run import RunCommand, resume, run
from steploop.tools.commands.runs import runs
from steploop.tools.commands.schedules import schedules
from steploop.tools.commands.status import status
from steploop.tools.commands.sweep import sweep
from steploop.tools.commands.watch import watch

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
app.command(cls=RunCommand)(run)
app.command(cls=RunCommand)(resume)
app.command(cls=RunCommand)(sweep)
for command in (
    bench,
    recipes,
    new,
    inspect,
    export,
    diff,
    status,
    runs,
    report,
    watch,
    plot,
    schedules,
    lr_find,
    replay,
    check,
    docs,
):
    app.command(cls=Command)(command)


def _version(value: bool) -> None:
    if value:
        from steploop import __version__

        sys.stdout.write(f"steploop {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")
    ] = False,
) -> None:
    """Train PyTorch models: an epoch is functools.reduce(train_step, batches, state)."""
