"""Find the images below a folder that has one directory per class, and count what is left out."""

import os
from collections import Counter
from pathlib import Path

import attrs

from steploop.errors import DataError, EmptyDataError

__all__ = ["SUFFIXES", "FolderFiles", "find_files"]

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})


@attrs.frozen
class FolderFiles:
    """The files of one set.

    Attributes:
        part: its directory.
        files: path and label of each image, class by class, in the order of their paths.
        others: suffix (or name, where it has none) -> how many files are no images.
        classless: how many images lie in no class.
    """

    part: Path
    files: list[tuple[str, int]]
    others: Counter[str]
    classless: int


def find_classes(part: Path) -> tuple[str, ...]:
    """List the classes: the directories in ``part`` that are not hidden, by name.

    Raises:
        EmptyDataError: there is none.
    """
    names = tuple(sorted(entry.name for entry in os.scandir(part) if entry.is_dir() and entry.name[0] != "."))
    if not names:
        raise EmptyDataError(f"{part} must hold one directory per class, but it has none")
    return names


def find_files(part: Path, classes: tuple[str, ...]) -> FolderFiles:
    """Find the images of each class, in directories within its directory too.

    Raises:
        DataError: a directory cannot be read.
        EmptyDataError: a class has no images.
    """
    found: list[tuple[str, int]] = []
    others: Counter[str] = Counter()
    for label, name in enumerate(classes):
        images = _images_below(part / name, others)
        if not images:
            raise EmptyDataError(
                f"{part / name} holds no images ({', '.join(sorted(SUFFIXES))}): a class without samples. Add some, or "
                "remove the directory"
            )
        found += [(path, label) for path in images]
    beside = [entry.name for entry in os.scandir(part) if not entry.is_dir()]
    classless = sum(_is_image(name) for name in beside)
    others.update(_kind(name) for name in beside if not _is_image(name))
    return FolderFiles(part, found, others, classless)


def _images_below(folder: Path, others: Counter[str]) -> list[str]:
    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error

    found: list[str] = []
    # a link to a folder above would lead to the other classes
    roots = (folder.resolve().parent, folder.parent.resolve())
    seen = {str(above) for root in roots for above in (root, *root.parents)}
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # or to one below, a second time
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if name[0] != "."]
        found += [os.path.join(here, name) for name in names if _is_image(name)]  # noqa: PTH118  (a million of them)
        others.update(_kind(name) for name in names if not _is_image(name))
    return sorted(found)


def _is_image(name: str) -> bool:
    return name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122


def _kind(name: str) -> str:
    return name if name[0] == "." else os.path.splitext(name)[1].lower() or name  # noqa: PTH122
