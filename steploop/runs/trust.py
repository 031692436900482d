"""Asks before a command runs the recipe in a directory that another user wrote."""

import os
import pwd
from pathlib import Path

from steploop.errors import ConfigError

__all__ = ["require_trust"]

# The files that say which code runs. The directory itself may well be another's: an administrator made the mount.
_DECISIVE = ("recipe.py", "config.json", "capsule.json", "sweep.json")


def require_trust(directory: Path, *, trust: bool, command: str) -> None:
    """Refuse to run the code in a directory whose files belong to another user, unless the user trusts it.

    A user who goes on with a run of their own is never asked; root is a user like others.

    Args:
        directory: a run directory or a capsule.
        trust: whether the user gave ``--trust``.
        command: the command that would run the code, for the message.

    Raises:
        ConfigError: a file belongs to another user, and ``trust`` is false.
    """
    me = os.geteuid()
    for name in () if trust else _DECISIVE:
        path = directory / name
        for follow in (False, True):  # whose link it is, and whose file
            try:
                owner = path.stat(follow_symlinks=follow).st_uid
            except OSError:
                continue
            if owner != me:
                raise ConfigError(
                    f"{path} belongs to {_named(owner)}, and you are {_named(me)}. steploop {command} runs the recipe in this "
                    "directory as you. Read it first; if you trust it, give --trust."
                )


def _named(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} (user {uid})"
    except KeyError:
        return f"user {uid}"
