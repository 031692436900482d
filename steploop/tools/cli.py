"""The command line: registers the commands, and turns errors into one sentence and an exit code."""

import sys
import traceback
from typing import Annotated

import typer

from steploop.core.interruption import Interrupted
from steploop.errors import SteploopError
from steploop.tools.commands.bench import bench
from steploop.tools.commands.check import check
from steploop.tools.commands.diff import diff
from steploop.tools.commands.docs import docs
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

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
app.command(cls=RunCommand)(run)
for command in (
    bench,
    resume,
    recipes,
    new,
    inspect,
    diff,
    status,
    runs,
    report,
    plot,
    schedules,
    lr_find,
    replay,
    check,
    docs,
):
    app.command()(command)


def _version(value: bool) -> None:
    if value:
        from steploop import __version__

        sys.stdout.write(f"steploop {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Train PyTorch models: an epoch is functools.reduce(train_step, batches, state)."""


def main() -> None:
    """The ``steploop`` command. Exit codes: 0 done, 2 usage, 3 to 6 by the error, 75 and 130 interrupted, 1 others."""
    for stream in (sys.stdout, sys.stderr):  # a locale that cannot show a character must not end a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    debug = "--debug" in sys.argv[1:]
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    raise SystemExit(call(arguments, debug=debug))


def call(arguments: list[str], *, debug: bool = False) -> int:
    """Run a command.

    Args:
        arguments: the words after ``steploop``.
        debug: show tracebacks of our own errors too.

    Returns:
        The exit code. What went wrong is one sentence on stderr.
    """
    try:
        app(args=arguments, prog_name="steploop")  # ends in SystemExit, usage errors with their message and 2
    except SteploopError as error:
        if debug:
            traceback.print_exc()
        else:
            from steploop.runs.safe_text import safe_lines

            sys.stderr.write(f"steploop: {safe_lines(error)}\n")
        return error.exit_code
    except Interrupted as interrupted:
        from steploop.runs.signals import exit_code_of

        sys.stderr.write("steploop: interrupted before the first step; there was nothing to save.\n")
        return exit_code_of(interrupted.signum)
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    return 0
