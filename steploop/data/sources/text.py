"""Read text that needs no network: the source files of Python's standard library."""

import sysconfig
from pathlib import Path

from steploop.errors import DataError

__all__ = ["library_files", "read_text"]

# Not source that somebody wrote for people to read: generated tables, tests, and what pip put there.
_LEFT_OUT = {"__pycache__", "idle_test", "site-packages", "test", "tests", "pydoc_data"}


def library_files(package: str | None = None) -> list[Path]:
    """List the Python files of the standard library, sorted by name.

    Args:
        package: only those below this package, for instance "asyncio"; None takes the modules that stand in no
            package, which are the same on every installation of one version.

    Raises:
        DataError: there are none: this Python lacks the package, or keeps its library in an archive.

    Example:
        >>> [path.name for path in library_files("json")]
        ['__init__.py', 'decoder.py', 'encoder.py', 'scanner.py', 'tool.py']
    """
    root = Path(sysconfig.get_path("stdlib"))
    if package is None:
        files = sorted(root.glob("*.py"))
    else:
        below = (path for path in (root / package).rglob("*.py"))
        files = sorted(p for p in below if not _LEFT_OUT & set(p.relative_to(root).parts))
    if not files:
        raise DataError(
            f"no Python source was found in {root / (package or '')}: this installation of Python comes without it. Use one "
            "that has its library as files, or a text of your own."
        )
    return files


def read_text(path: str | Path) -> str:
    r"""Read a text file in UTF-8; bytes that are not become the replacement character.

    Raises:
        DataError: it cannot be read.

    Example:
        >>> _ = (folder / "a.txt").write_text("one\ntwo\n", encoding="utf-8")
        >>> read_text(folder / "a.txt")
        'one\ntwo\n'
    """
    try:
        return Path(path).expanduser().read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(
            f"{path} cannot be read as text: {error.strerror or error}. Give the path of a text file."
        ) from error
