"""What a run says last: one JSON object in a pipe or a file, a sentence with the next command in a terminal."""

import json
import shlex
import sys
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from steploop.runs.ranks.launcher import rank_here
from steploop.runs.safe_text import safe_text
from steploop.tools.commands.terminals import window_width

if TYPE_CHECKING:
    from steploop.runs.summary import Summary

__all__ = ["finish", "interrupted_early"]

_TRAINING = {"run", "resume", "sweep"}


def finish(summary: "Summary") -> int:
    """Say how a run ended, and how to go on.

    Returns:
        The exit code.
    """
    import attrs

    if rank_here() > 0:  # rank 0 speaks
        return summary.exit_code
    interrupted = summary.state == "interrupted"
    if sys.stdout.isatty():
        go_on = interrupted or summary.ending == "limit"
        following = (
            f"Go on with: {summary.resume}"
            if go_on
            else f"Look at it with: steploop report {shlex.quote(summary.run)}"
        )
        said = textwrap.fill(
            safe_text(summary), window_width(), break_long_words=False, break_on_hyphens=False
        )
        _say(sys.stdout, f"{said}\n{safe_text(following)}")  # a command is in one piece, to be copied
        return summary.exit_code
    line = attrs.asdict(summary)
    if not interrupted:
        del line["resume"]
    else:
        _say(
            sys.stderr,
            safe_text(
                f"Interrupted after step {summary.steps_attempted}, which is saved. Go on with: {summary.resume}"
            ),
        )
    _write_json(line)
    return summary.exit_code


def interrupted_early(signum: int, arguments: list[str]) -> int:
    """Say that a command was interrupted before it had anything to save.

    Args:
        signum: the signal.
        arguments: the words of the command line.

    Returns:
        The exit code: of a training command, one by which a scheduler starts it again.
    """
    from steploop.runs.signals import exit_code_of

    if rank_here() > 0:
        return exit_code_of(signum)
    command = next((word for word in arguments if not word.startswith("-")), None)
    if command not in _TRAINING:
        _say(sys.stderr, "steploop: interrupted.")
        return 128 + signum
    code = exit_code_of(signum)
    _say(sys.stderr, "steploop: interrupted before the first step; there was nothing to save.")
    if not sys.stdout.isatty():
        again = shlex.join(["steploop", *arguments])
        _write_json(
            {"state": "interrupted", "exit_code": code, "run": None, "steps_attempted": 0, "again": again}
        )
    return code


def _say(stream: Any, text: str) -> None:
    stream.write(text + "\n")
    stream.flush()


def _write_json(line: Mapping[str, Any]) -> None:
    _say(sys.stdout, json.dumps(line, allow_nan=False))
