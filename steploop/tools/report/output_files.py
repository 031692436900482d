"""Write reports and figures to files, never through a link."""

import stat
from pathlib import Path

from steploop.core.atomic_files import replace_file
from steploop.errors import ConfigError

__all__ = ["write_output"]


def write_output(path: Path, data: bytes) -> Path:
    """Write a whole file, in the place of an older one; its folder is made if it is missing.

    The default place is the run directory, which a stranger may have made: a link there is not written through.

    Returns:
        The path.

    Raises:
        ConfigError: something else than a regular file has that name, or it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if _is_something_else(path):
            raise ConfigError(
                f"{path} is a link or no regular file, and is not written through. Remove it, or choose another file with --out."
            )
        replace_file(path, data)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}. Choose another file with --out."
        ) from error
    return path


def _is_something_else(path: Path) -> bool:
    try:
        return not stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False
