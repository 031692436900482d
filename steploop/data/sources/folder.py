"""Read a folder of images, one directory per class, into one tensor per set."""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import numpy as np
import torch
from torch import Tensor

from steploop.core.validators import require_int
from steploop.data.sources.decoding import Unreadable, decoded, fitted
from steploop.data.sources.folder_files import FolderFiles, find_classes, find_files
from steploop.data.sources.progress import Progress, showing
from steploop.errors import DataError, EmptyDataError

__all__ = ["FolderImages", "load_folder"]

_CHUNK = 256  # files per task: a task per file spends more on handing over than on decoding
_LIMIT_BYTES = 16 << 30  # a set larger than this does not belong in memory
_TEST_NAMES = ("test", "val", "valid")

Split = tuple[Tensor, Tensor]


@attrs.frozen(eq=False)
class FolderImages:
    """What a folder holds.

    Attributes:
        train: images (N, 3, H, W) uint8, and labels (N,) int64, to train on.
        test: the same, to evaluate on.
        classes: the name of each class.
        note: what was done to the images, and what was left out, with numbers.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    note: str


@attrs.frozen(eq=False)
class _Set:
    """One set, decoded."""

    images: Tensor
    labels: Tensor
    resized: int
    paged: int  # files that hold more than one picture
    unreadable: list[Unreadable]


def load_folder(root: Path, *, size: int | None = None, progress: Progress | None = None) -> FolderImages:
    """Read the images under ``root/train`` and ``root/test`` (or ``root/val``), in one directory per class.

    Classes are numbered in the order of their names, files taken in that of their paths; directories within a class
    belong to it. Images become upright RGB of 8 bits. With ``size``, or where an image differs from the first one,
    the shorter side is scaled and the middle cut out. Files that are no images or damaged are left out, and counted
    in the note.

    Args:
        root: the directory.
        size: height and width of the result, pixels; that of the first image unless given.
        progress: called with how far the decoding is.

    Raises:
        DataError: the tree is not as described, a file cannot be opened, or its values have no known range.
        EmptyDataError: a class has no images.
    """
    if size is not None:
        require_int("size", size, minimum=1)
    train = root / "train"
    tests = [root / name for name in _TEST_NAMES if (root / name).is_dir()]
    if not train.is_dir() or not tests:
        there = sorted(p.name for p in root.iterdir())[:10] if root.is_dir() else "no such directory"
        raise DataError(f"{root} must hold the directories train/ and test/ (or val/); found: {there}")
    classes = find_classes(train)
    if (others := find_classes(tests[0])) != classes:
        odd = sorted(set(classes) ^ set(others))[:5]
        raise DataError(f"{train} and {tests[0]} must have the same classes; only in one of them: {odd}")
    found = [find_files(part, classes) for part in (train, tests[0])]
    shape = _shape(found[0]) if size is None else (size, size)
    total = sum(len(part.files) for part in found)
    if (need := 3 * shape[0] * shape[1] * total) > _LIMIT_BYTES:
        raise DataError(
            f"these images, {shape[0]}x{shape[1]}, would take {need / 2**30:.0f} GiB of memory: give a smaller size=, "
            "or read them sample by sample (a Loader over torchvision.datasets.ImageFolder, with num_workers)"
        )
    sets: list[_Set] = []
    with showing(progress) as show:
        for part in found:
            before = sum(len(each.files) for each in found[: len(sets)])
            sets.append(_read(part, shape, show, before, total))
            _check_classes(part, sets[-1], classes)
    first, second = ((s.images, s.labels) for s in sets)
    return FolderImages(first, second, classes, _note(root, found, sets, unused=tests[1:]))


def _shape(part: FolderFiles) -> tuple[int, ...]:
    """Height and width of the first image that can be read."""
    for path, _ in part.files:
        first = decoded(path)
        if not isinstance(first, Unreadable):
            return first[0].shape[:2]
    raise EmptyDataError(f"none of the {len(part.files)} files in {part.part} can be read as an image")


def _read(part: FolderFiles, shape: tuple[int, ...], show: Progress, before: int, total: int) -> _Set:
    """Decode into one tensor, on all cores.

    PIL releases Python's lock while it decodes. Of 32x32 pixels there is little to decode: there the lock is what
    counts, and 10,000 such files take about 2.2 s however many threads there are.
    """
    paths = [path for path, _ in part.files]
    images = torch.zeros(len(paths), 3, *shape, dtype=torch.uint8)
    keep = torch.ones(len(paths), dtype=torch.bool)

    def chunk(first: int) -> tuple[int, int, list[Unreadable]]:
        resized, paged = 0, 0
        unreadable: list[Unreadable] = []
        for at, path in enumerate(paths[first : first + _CHUNK], start=first):
            result = decoded(path)
            if isinstance(result, Unreadable):
                unreadable.append(result)
                keep[at] = False
                continue
            pixels, more = result
            if pixels.shape[:2] != shape:
                pixels = fitted(pixels, shape)
                resized += 1
            paged += more > 0
            images[at] = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
        return resized, paged, unreadable

    pool = ThreadPoolExecutor(
        max_workers=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    )
    labels = torch.tensor([label for _, label in part.files])
    resized, paged, done = 0, 0, 0
    unreadable: list[Unreadable] = []
    try:
        for one, two, three in pool.map(chunk, range(0, len(paths), _CHUNK)):
            resized, paged, unreadable = resized + one, paged + two, unreadable + three
            done = min(done + _CHUNK, len(paths))
            show("decoding images", before + done, total)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C or a bad image: what has not begun need not
    if unreadable:
        images, labels = images[keep], labels[keep]
    return _Set(images, labels, resized, paged, unreadable)


def _check_classes(part: FolderFiles, read: _Set, classes: tuple[str, ...]) -> None:
    for label in sorted(set(range(len(classes))) - set(read.labels.tolist())):
        raise EmptyDataError(
            f"no image in {part.part / classes[label]} can be read: {_first(read.unreadable, part.part)}"
        )


def _note(root: Path, found: Sequence[FolderFiles], sets: Sequence[_Set], *, unused: Sequence[Path]) -> str:
    """Say what was changed and what was left out; a plain sentence where nothing was."""
    resized, paged = sum(s.resized for s in sets), sum(s.paged for s in sets)
    unreadable = [item for s in sets for item in s.unreadable]
    others = sum((part.others for part in found), Counter[str]())
    classless = sum(part.classless for part in found)
    left_out = []
    if unreadable:
        left_out.append(f"{_files(len(unreadable))} that cannot be read: {_first(unreadable, root)}")
    if others:
        kinds = ", ".join(f"{kind} {count}" for kind, count in others.most_common(5))
        left_out.append(f"{_files(others.total())} of another kind ({kinds})")
    if classless:
        left_out.append(f"{_files(classless)} in no class")
    if paged:
        left_out.append(f"all but the first picture of {_files(paged)}")
    left_out += [f"the directory {path.name}/" for path in unused]
    note = f"The images under {root}" + (
        f", of which {resized} were brought to one size." if resized else "."
    )
    return note + (f" Left out: {'; '.join(left_out)}." if left_out else "")


def _files(count: int) -> str:
    return f"{count} file" + ("" if count == 1 else "s")


def _first(skipped: Sequence[Unreadable], folder: Path) -> str:
    shown = [f"{os.path.relpath(item.path, folder)} ({item.reason})" for item in skipped[:3]]
    return ", ".join(shown) + (", ..." if len(skipped) > len(shown) else "")
