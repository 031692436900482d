"""The command line: catches signals from the first moment, turns errors into one sentence and an exit code.

Little is imported at the top: a signal that comes before ``main`` ends the process without a word.
"""

import sys

from steploop.errors import RankFailedError, SteploopError
from steploop.runs.ranks.launcher import rank_here
from steploop.runs.signals import catch_signals, exit_soon_with, heeded, interruption_of
from steploop.runs.standard_streams import settle_streams, watched_streams

__all__ = ["call", "main"]


def main() -> None:
    """The ``steploop`` command. Exit codes: 0 done, 2 usage, 3 to 6 by the error, 75 and 130 interrupted, 1 others."""
    code = 1
    try:
        catch_signals()
        for stream in (sys.stdout, sys.stderr):  # a locale that cannot show a character must not end a run
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        with watched_streams():
            code = call(sys.argv[1:])
            exit_soon_with(code)
    finally:
        settle_streams()
    raise SystemExit(code)


def call(arguments: list[str]) -> int:
    """Run a command.

    Args:
        arguments: the words after ``steploop``. ``--debug`` among them shows tracebacks of our own errors too.

    Returns:
        The exit code. What went wrong is one sentence on stderr.
    """
    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"]
    try:
        return _call(arguments, debug=debug)
    except BaseException as error:
        if (interrupted := interruption_of(error)) is None:
            raise
        heeded()
        from steploop.tools.commands.endings import interrupted_early

        return interrupted_early(interrupted.signum, arguments)


def _call(arguments: list[str], *, debug: bool) -> int:
    """Run a command, and say in a sentence what went wrong; a signal that comes meanwhile raises too."""
    try:
        from steploop.tools.application import app

        app(args=arguments, prog_name="steploop")  # ends in SystemExit, usage errors with their message and 2
    except SteploopError as error:
        if not isinstance(error, RankFailedError) and interruption_of(error):
            raise
        if isinstance(error, RankFailedError) and error.said and not debug:
            return error.exit_code
        if debug:
            import traceback

            traceback.print_exc()
        else:
            from steploop.runs.safe_text import safe_lines

            who = f"rank {rank_here()}: " if rank_here() and not isinstance(error, RankFailedError) else ""
            sys.stderr.write(f"steploop: {who}{safe_lines(error)}\n")
        return error.exit_code
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    return 0
