"""Convert file names and words of the command line to UTF-8 text, in any locale."""

import os
from pathlib import Path

__all__ = ["native", "readable"]


def readable(text: str | Path) -> str:
    r"""What Python was given by the system as text that can be written down.

    Where the locale is not UTF-8 (``LC_ALL=C``), Python holds the bytes of such a name as lone surrogates; they are
    UTF-8 nearly always. A byte that is not becomes ``\\xff``.
    """
    return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def native(text: str) -> str:
    """Convert a recorded name to the form of the system's calls."""
    return os.fsdecode(text.encode())
