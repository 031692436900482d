"""Names of files and words of the command line as text, whatever the locale: UTF-8 in all that is recorded."""

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
    """A recorded name as the system's calls take it."""
    return os.fsdecode(text.encode())
