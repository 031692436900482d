"""Open an address with a time limit that covers every stage of the connection."""

import threading
import urllib.request
from typing import Any

from steploop.data.sources.progress import say
from steploop.errors import DataError

__all__ = ["open_url"]


def open_url(url: str, *, timeout_s: float) -> Any:
    """Open ``url`` and return the server's response, which the caller closes.

    In a thread of its own, because looking up a name has no timeout in Python and can take minutes.

    Args:
        url: an https address.
        timeout_s: seconds after which it counts as out of reach.

    Raises:
        DataError: no answer in time, or one that says no.

    Example:
        >>> _ = (folder / "a.txt").write_text("text")
        >>> open_url((folder / "a.txt").as_uri(), timeout_s=1.0).read()
        b'text'
    """
    found: list[Any] = []

    def ask() -> None:
        try:
            found.append(urllib.request.urlopen(url, timeout=timeout_s))  # noqa: S310  (the caller's constant)
        except Exception as error:  # noqa: BLE001  (it is raised below, in the thread that asked)
            found.append(error)

    say(f"trying {url}, for {timeout_s:g} s at most ...")
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not found:
        raise DataError(f"{url} gave no answer within {timeout_s:g} s")
    if isinstance(found[0], Exception):
        raise DataError(f"{url} cannot be reached: {type(found[0]).__name__}: {found[0]}") from found[0]
    return found[0]
