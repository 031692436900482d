"""Say an error in one line."""

import traceback
from pathlib import Path

__all__ = ["one_line", "shortened"]

_LONGEST = 400


def one_line(error: BaseException, file: Path | None = None) -> str:
    """The type of an error and the first line of its text, cut at 400 characters.

    Args:
        error: any.
        file: where it passed through this file, the line is named.
    """
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    text = shortened(text)
    frames = [] if file is None else traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if file is not None and Path(frame.filename).name == file.name]
    return f"{text} ({file.name}:{lines[-1]})" if file is not None and lines else text


def shortened(text: str) -> str:
    """The text cut at 400 characters."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
