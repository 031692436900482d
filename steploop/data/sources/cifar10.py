"""Load CIFAR-10 from disk, or download it with a progress bar and a time limit."""

import hashlib
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steploop.core.extras import import_extra
from steploop.data.sources.network import open_url
from steploop.data.sources.progress import Progress, showing
from steploop.errors import DataError

__all__ = ["load_cifar10"]

# Of cifar-10-python.tar.gz as its authors publish it; torchvision knows its MD5 only, which can be forged.
_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
_CHUNK = 1 << 18  # bytes between two looks at the progress
_STALL_S = 15.0  # a download that brings nothing for so long is given up

Split = tuple[Tensor, Tensor]


def load_cifar10(
    root: Path, *, timeout_s: float, progress: Progress | None = None
) -> tuple[Split, Split, tuple[str, ...]]:
    """Read the 50,000 and 10,000 images of CIFAR-10; download them, checked by SHA-256, unless they are there.

    Args:
        root: the directory that holds, or will hold, ``cifar-10-batches-py``.
        timeout_s: seconds after which the server counts as out of reach.
        progress: called with how far the download is.

    Returns:
        ``(images, labels)`` to train on and to test on (``(N, 3, 32, 32)`` uint8, ``(N,)`` int64), and the class
        names.

    Raises:
        DataError: it is not on disk, and cannot be downloaded.
        MissingExtraError: torchvision is not installed.

    Source:
        Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009).
    """
    try:
        return _read(root)
    except RuntimeError:  # torchvision: not found, or the digest of a file is wrong
        archive = root / _dataset().filename
        if not (archive.is_file() and _sha256(archive) == _SHA256):
            _download(archive, timeout_s, progress)
    try:
        _unpack(archive)
        return _read(root)
    except (RuntimeError, OSError, EOFError, tarfile.TarError) as error:
        raise DataError(
            f"{archive} could not be unpacked: {error}; delete it, and it is downloaded anew"
        ) from error


def _dataset() -> Any:
    """The class of torchvision, which only those need who read CIFAR-10."""
    module: Any = import_extra("torchvision.datasets", extra="recipes", purpose="Reading CIFAR-10")
    return module.CIFAR10


def _read(root: Path) -> tuple[Split, Split, tuple[str, ...]]:
    train, test = (_dataset()(root, train=part) for part in (True, False))  # checks the digest of every file
    return _tensors(train), _tensors(test), tuple(train.classes)


def _tensors(part: Any) -> Split:
    return torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)


def _unpack(archive: Path) -> None:
    """Unpack beside the archive; torchvision does so without a filter, of which Python 3.12 warns."""
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):  # from 3.11.4 on
            tar.extractall(archive.parent, filter="data")
        else:
            tar.extractall(archive.parent)  # noqa: S202  (its bytes are those that were published: SHA-256)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(archive: Path, timeout_s: float, progress: Progress | None) -> None:
    """Fetch the archive: it appears whole and verified, or not at all."""
    url = _dataset().url
    try:
        response = open_url(url, timeout_s=timeout_s)
    except DataError as error:
        raise DataError(f"it is not in {archive.parent}, and {error}") from error
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        with response, tempfile.TemporaryDirectory(dir=archive.parent, prefix=".cifar-10-") as beside:
            part = Path(beside) / archive.name
            _receive(response, part, progress)
            part.replace(archive)
    except Exception as error:  # the network can fail in many ways, http.client's own among them
        raise DataError(
            f"it is not in {archive.parent}, and {url} cannot be downloaded: {type(error).__name__}: {error}"
        ) from error


def _receive(response: Any, part: Path, progress: Progress | None) -> None:
    """Write what comes to ``part``; an OSError if it is not the archive."""
    total, done = int(response.headers.get("Content-Length") or 0), 0
    digest = hashlib.sha256()
    _allow_pauses(response)
    with part.open("wb") as file, showing(progress) as show:
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            show("downloading CIFAR-10", done, max(total, done))
    if digest.hexdigest() != _SHA256:
        raise OSError(f"{done:,} bytes came, of {total:,}, and their SHA-256 digest is not that of CIFAR-10")


def _allow_pauses(response: Any) -> None:
    """Allow longer pauses once a server has answered."""
    sock = getattr(getattr(getattr(response, "fp", None), "raw", None), "_sock", None)
    if sock is not None:
        sock.settimeout(_STALL_S)
