"""``steploop diff``: compare two checkpoints bit for bit, and show what differs."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steploop.tools.commands.completion import complete_run
from steploop.tools.commands.inspect import newest_checkpoint

if TYPE_CHECKING:
    from steploop.checkpoint import Checkpoint

__all__ = ["diff"]

_SHOWN = 10
_LONGEST = 200  # characters of a value
A = typer.Argument(
    help="A checkpoint, or a run: its newest one.",
    show_default=False,
    metavar="A",
    autocompletion=complete_run,
)
B = typer.Argument(
    help="The one to compare it with.", show_default=False, metavar="B", autocompletion=complete_run
)
JSON = typer.Option("--json", help="Print one JSON object.")


def diff(a: Annotated[Path, A], b: Annotated[Path, B], *, as_json: Annotated[bool, JSON] = False) -> None:
    """Compare checkpoints A and B bit for bit.

    Exit code 1 if they differ, with what differs first.
    """
    from steploop.checkpoint import open_checkpoint
    from steploop.runs.safe_text import safe_text

    one, other = open_checkpoint(newest_checkpoint(a)), open_checkpoint(newest_checkpoint(b))
    found = [] if one.digest == other.digest else list(_differences(one, other))
    if as_json:
        result = {"equal": not found, "a": one.digest, "b": other.digest, "differences": found}
        sys.stdout.write(json.dumps(result) + "\n")
    elif not found:
        digests = " and ".join(
            dict.fromkeys((one.digest, other.digest))
        )  # two for two versions of the format
        sys.stdout.write(f"equal: both hold the state {digests}\n")
    else:
        more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        lines = (safe_text(line) for line in [*found[:_SHOWN], *more])
        sys.stdout.write("\n".join(["different:", *(f"  {line}" for line in lines)]) + "\n")
    if found:
        raise typer.Exit(1)


def _differences(one: "Checkpoint", other: "Checkpoint") -> Iterator[str]:
    """Yield each tensor that differs, in the order of the files, then each number."""
    from steploop.core.trees import first_difference

    for file in dict.fromkeys([*one.tensors, *other.tensors]):
        left, right = one.tensors.get(file, {}), other.tensors.get(file, {})
        for name in dict.fromkeys([*left, *right]):
            if name not in left or name not in right:
                yield f"{name}: only in {'A' if name in left else 'B'}"
            elif (difference := first_difference(left[name], right[name], name)) is not None:
                yield difference
    yield from _unequal_values(one.manifest.state, other.manifest.state, "")


def _unequal_values(x: Any, y: Any, name: str) -> Iterator[str]:
    if isinstance(x, dict) and isinstance(y, dict):
        for key in dict.fromkeys([*x, *y]):
            path = f"{name}.{key}" if name else key
            if key in x and key in y:
                yield from _unequal_values(x[key], y[key], path)
            else:
                yield f"{path}: only in {'A' if key in x else 'B'}"
    elif x != y or type(x) is not type(y):
        yield f"{name.removeprefix('states.').lstrip('.')}: {_short(x)} in A, {_short(y)} in B"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
