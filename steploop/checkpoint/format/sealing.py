"""Seal a JSON file with its own SHA-256, and read a sealed one back.

The digest stands in the file it digests: it is the SHA-256 of the file with 64 zeros in the digest's place. A file
is taken only if its bytes are exactly those that would be written for its content, so no byte in it is free.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any, Final

from steploop.checkpoint.format.json_values import read_json, write_json
from steploop.errors import CheckpointDamagedError

__all__ = ["SHA256", "ZEROS", "seal", "unseal"]

SHA256: Final = re.compile(r"[0-9a-f]{64}")
ZEROS: Final = "0" * 64


def seal(body: Mapping[str, Any]) -> tuple[bytes, str]:
    """Write ``body`` as JSON with its own SHA-256 in it; return the bytes and the digest."""
    blank = write_json({**body, "sha256": ZEROS})
    digest = hashlib.sha256(blank).hexdigest()
    return blank.replace(f'"sha256": "{ZEROS}"'.encode(), f'"sha256": "{digest}"'.encode()), digest


def unseal(text: bytes, name: str, *, limit: int) -> dict[str, Any]:
    """Read a sealed file and verify its digest.

    Raises:
        CheckpointDamagedError: it is not what ``seal`` writes, byte for byte.
    """
    body = read_json(text, name, limit=limit)
    found = body.get("sha256")
    if not isinstance(found, str) or not SHA256.fullmatch(found):
        raise CheckpointDamagedError(
            f"{name} has no SHA-256 of its own: it is damaged or was written by another program."
        )
    expected, digest = seal(body)
    if text != expected:
        raise CheckpointDamagedError(
            f"{name} says its SHA-256 is {found}, but its content has {digest}: its bytes have changed. "
            "Use another checkpoint."
        )
    return body
