"""Where a rank is: the line of code that its main thread executes, and whether it waits for other ranks there."""

import sys
from pathlib import Path
from types import FrameType

import attrs
import torch

__all__ = ["Place"]

_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parents[2])
# The innermost line of Python is in one of these while a rank waits for the others.
_WAITING = tuple(
    str(path)
    for path in (
        Path(_TORCH, "distributed"),
        Path(_OURS, "runs", "ranks"),
        Path(_OURS, "core", "ranks.py"),
        Path(_OURS, "core", "steps", "part_"),
    )
)


@attrs.frozen
class Place:
    """How far a rank is.

    Attributes:
        steps: how many it has begun.
        beat: a number that grows as long as it lives.
        waits: whether it waits for other ranks.
        line: the innermost line that belongs neither to torch nor to steploop, such as "recipe.py, line 40".
    """

    steps: int
    beat: int
    waits: bool
    line: str

    @classmethod
    def of_thread(cls, thread: int, *, steps: int, beat: int) -> "Place":
        """Look at what a thread of this process executes now."""
        innermost = frame = sys._current_frames().get(thread)
        waits = innermost is not None and innermost.f_code.co_filename.startswith(_WAITING)
        while frame is not None and _foreign(frame):
            frame = frame.f_back
        frame = frame or innermost
        line = "" if frame is None else f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}"
        return cls(steps, beat, waits, line)


def _foreign(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith((_TORCH, _OURS, "<", sys.base_prefix))
