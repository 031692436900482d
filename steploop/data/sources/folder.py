"""A folder of images, one directory per class, decoded once into one tensor per set."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from steploop.core.validators import require_int
from steploop.data.sources.progress import Progress, showing
from steploop.errors import DataError, EmptyDataError

__all__ = ["load_folder"]

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})
_CHUNK = 256  # files per task: a task per file spends more on handing over than on decoding
_LIMIT_BYTES = 16 << 30  # a set larger than this does not belong in memory

Pixels = npt.NDArray[np.uint8]  # (H, W, 3)
Split = tuple[Tensor, Tensor]


def load_folder(
    root: Path, *, size: int | None = None, progress: Progress | None = None
) -> tuple[Split, Split, tuple[str, ...], int]:
    """The images under ``root/train`` and ``root/test`` (or ``root/val``), sorted into one directory per class.

    Classes are numbered in the order of their names, files taken in that of theirs. Images become RGB. With
    ``size``, or where an image differs from the first one, the shorter side is scaled and the middle cut out.

    Args:
        root: the directory.
        size: height and width of the result, pixels; that of the first image unless given.
        progress: told how far the decoding is.

    Returns:
        ``(images, labels)`` to train on and to test on (``(N, 3, H, W)`` uint8, ``(N,)`` int64), the class names,
        and how many images were brought to another size.

    Raises:
        DataError: the tree is not as described, or an image cannot be read.
        EmptyDataError: a set has no images.
    """
    if size is not None:
        require_int("size", size, minimum=1)
    train = root / "train"
    test = next((root / name for name in ("test", "val", "valid") if (root / name).is_dir()), None)
    if not train.is_dir() or test is None:
        there = sorted(p.name for p in root.iterdir())[:10] if root.is_dir() else "no such directory"
        raise DataError(f"{root} must hold the directories train/ and test/ (or val/); found: {there}")
    classes = _classes(train)
    if (others := _classes(test)) != classes:
        odd = sorted(set(classes) ^ set(others))[:5]
        raise DataError(f"{train} and {test} must have the same classes; only in one of them: {odd}")
    files = {part: list(_files(part, classes)) for part in (train, test)}
    for part, found in files.items():
        if not found:
            raise EmptyDataError(
                f"{part} holds no images ({', '.join(sorted(_SUFFIXES))}) in its directories"
            )
    shape = _decoded(files[train][0][0]).shape[:2] if size is None else (size, size)
    if (need := 3 * shape[0] * shape[1] * sum(map(len, files.values()))) > _LIMIT_BYTES:
        raise DataError(
            f"these images, {shape[0]}x{shape[1]}, would take {need / 2**30:.0f} GiB of memory: give a smaller size=, "
            "or read them sample by sample (a Loader over torchvision.datasets.ImageFolder, with num_workers)"
        )
    total, resized = sum(map(len, files.values())), 0
    splits: list[Split] = []
    with showing(progress) as show:
        for part in (train, test):
            before = sum(len(labels) for _, labels in splits)
            images, changed = _read([path for path, _ in files[part]], shape, show, before, total)
            splits.append((images, torch.tensor([label for _, label in files[part]])))
            resized += changed
    return splits[0], splits[1], classes, resized


def _classes(part: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in os.scandir(part) if entry.is_dir() and entry.name[0] != "."))
    if not names:
        raise EmptyDataError(f"{part} must hold one directory per class, and holds none")
    return names


def _files(part: Path, classes: Sequence[str]) -> Iterator[tuple[str, int]]:
    for label, name in enumerate(classes):
        for entry in sorted(os.scandir(part / name), key=lambda entry: entry.name):
            if Path(entry.name).suffix.lower() in _SUFFIXES and entry.is_file():
                yield entry.path, label


def _read(
    paths: Sequence[str], shape: tuple[int, ...], show: Progress, before: int, total: int
) -> tuple[Tensor, int]:
    """Decode into one tensor, on all cores.

    PIL releases Python's lock while it decodes. Of 32x32 pixels there is little to decode: there the lock is what
    counts, and 10,000 such files take about 2.2 s however many threads there are.
    """
    images = torch.empty(len(paths), 3, *shape, dtype=torch.uint8)

    def chunk(first: int) -> int:
        decoded = [_decoded(path) for path in paths[first : first + _CHUNK]]
        odd = [i for i, pixels in enumerate(decoded) if pixels.shape[:2] != shape]
        for i in odd:
            decoded[i] = _fitted(decoded[i], shape)
        images[first : first + len(decoded)] = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)
        return len(odd)

    pool = ThreadPoolExecutor(
        max_workers=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    )
    resized, done = 0, 0
    try:
        for changed in pool.map(chunk, range(0, len(paths), _CHUNK)):
            resized += changed
            done = min(done + _CHUNK, len(paths))
            show("decoding images", before + done, total)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C or a bad image: what has not begun need not
    return images, resized


def _decoded(path: str) -> Pixels:
    try:
        with Image.open(path) as file:
            return np.asarray(file.convert("RGB"))
    except Exception as error:
        raise DataError(
            f"{path} cannot be read as an image: {type(error).__name__}: {error}; remove or replace the file"
        ) from error


def _fitted(pixels: Pixels, shape: tuple[int, ...]) -> Pixels:
    """Scaled so that it just covers ``shape``, and cut to it around the middle."""
    height, width = shape
    fitted = ImageOps.fit(Image.fromarray(pixels), (width, height), method=Image.Resampling.BILINEAR)
    return np.asarray(fitted)
