"""Load small images for a recipe into memory: CIFAR-10, a folder of images, or synthetic ones."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import attrs
import torch
from torch import Tensor

from steploop.core.extras import import_extra
from steploop.data.sources.cifar10 import load_cifar10
from steploop.data.sources.progress import Progress
from steploop.data.sources.synthetic import SyntheticImageDataset
from steploop.errors import ConfigError, DataError, EmptyDataError, MissingExtraError

__all__ = ["ImageData", "ImageSource", "channel_statistics", "load_images"]

ImageSource = Literal["auto", "cifar10", "folder", "synthetic"]


@attrs.frozen(kw_only=True, eq=False)
class ImageData:
    """Labelled images of two sets, decoded.

    Attributes:
        name: where they come from: ``"cifar10"``, ``"folder"`` or ``"synthetic"``.
        train_images: shape ``(N, 3, H, W)``, uint8.
        train_labels: shape ``(N,)``, int64, indices into ``classes``.
        test_images: shape ``(M, 3, H, W)``, uint8.
        test_labels: shape ``(M,)``, int64.
        classes: the name of each class.
        note: what a reader of the results must know about the images, in a sentence or two.

    Example:
        >>> data = load_images("synthetic", size=8, train_samples=20, test_samples=10)
        >>> data.train[0].shape, len(data.classes)
        (torch.Size([20, 3, 8, 8]), 10)
    """

    name: str
    train_images: Tensor = attrs.field(repr=lambda t: str(tuple(t.shape)))
    train_labels: Tensor = attrs.field(repr=False)
    test_images: Tensor = attrs.field(repr=lambda t: str(tuple(t.shape)))
    test_labels: Tensor = attrs.field(repr=False)
    classes: tuple[str, ...]
    note: str

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        """The images and labels to train on, as a ``Loader`` takes them."""
        return self.train_images, self.train_labels

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        """The images and labels to evaluate on."""
        return self.test_images, self.test_labels


def load_images(
    data: ImageSource = "auto",
    *,
    root: str | os.PathLike[str] | None = None,
    size: int | None = None,
    seed: int = 0,
    train_samples: int = 10_000,
    test_samples: int = 2_000,
    timeout_s: float = 4.0,
    progress: Progress | None = None,
) -> ImageData:
    """Load the images that ``data`` names.

    Args:
        data: ``"cifar10"``: CIFAR-10, downloaded unless it is on disk. ``"folder"``: images sorted into
            ``root/train/CLASS/`` and ``root/test/CLASS/`` (or ``val``), in directories within a class too; 8 or 16
            bits, or floating point in 0..1, turned as their EXIF orientation says; the note counts what was left out.
            ``"synthetic"``: made up. ``"auto"``: CIFAR-10 if it is on disk or can be downloaded, else synthetic, and
            the note says so.
        root: the folder; for CIFAR-10 where it is or goes, ``data`` in the current directory unless given.
        size: for ``"folder"``, height and width to which the images are brought; needed where they differ.
            For ``"synthetic"`` the size in which they are made, 32 unless given. CIFAR-10 has its own.
        seed: of the synthetic images.
        train_samples: how many synthetic images to train on.
        test_samples: how many synthetic images to evaluate on.
        timeout_s: seconds after which the server of CIFAR-10 counts as out of reach.
        progress: called with how far a download or a decoding is; a progress bar on a terminal unless given.

    Raises:
        ConfigError: an argument is not legal, or does not go with ``data``.
        DataError: the images are not there, or cannot be read.
        EmptyDataError: a set or a class has no images.

    Example:
        >>> data = load_images("synthetic", size=8, train_samples=20, test_samples=10)
        >>> data.test_images.dtype
        torch.uint8
    """
    if data not in get_args(ImageSource):
        raise ConfigError(f"data must be one of {', '.join(get_args(ImageSource))}, got {data!r}")
    if data == "folder":
        if root is None:
            raise ConfigError(
                "data='folder' needs root=, the directory that holds train/ and test/ (or val/)"
            )
        return _folder(Path(root).expanduser(), size, progress)
    if data == "cifar10" and size not in {None, 32}:
        raise ConfigError(f"CIFAR-10's images are 32x32, and size={size} was asked for; leave size out")
    if data == "synthetic":
        return _synthetic(seed, size or 32, train_samples, test_samples, "Synthetic images, as asked for.")
    where = Path("data" if root is None else root).expanduser()
    try:
        return _cifar10(where, timeout_s, progress)
    except (DataError, MissingExtraError) as error:
        if data == "cifar10":
            raise
        note = f"CIFAR-10 could not be loaded: {error}. Using SYNTHETIC images; ignore their accuracy."
        return _synthetic(seed, size or 32, train_samples, test_samples, note)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute mean and standard deviation of each channel, of pixels in 0..1, for ``normalize``.

    Args:
        images: shape ``(N, C, H, W)``, uint8, not empty.

    Returns:
        ``(mean, std)``, C numbers each, computed from the exact histogram.

    Example:
        >>> channel_statistics(torch.full((2, 3, 4, 4), 255, dtype=torch.uint8))[0]
        (1.0, 1.0, 1.0)
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean: list[float] = []
    std: list[float] = []
    for channel in range(images.shape[1]):
        counts = torch.zeros(256, dtype=torch.float64)
        for part in torch.split(images[:, channel], 4096):  # bincount widens to 64 bits: not all at once
            counts += torch.bincount(part.reshape(-1).cpu(), minlength=256)
        share = counts / counts.sum()
        center = float((share * levels).sum())
        mean.append(center)
        std.append(float((share * (levels - center) ** 2).sum().sqrt()))
    return tuple(mean), tuple(std)


def _cifar10(root: Path, timeout_s: float, progress: Progress | None) -> ImageData:
    train, test, classes = load_cifar10(root, timeout_s=timeout_s, progress=progress)
    return _checked("cifar10", train, test, classes, f"CIFAR-10, from {root}.")


def _folder(root: Path, size: int | None, progress: Progress | None) -> ImageData:
    import_extra("PIL.Image", extra="recipes", purpose="Reading a folder of images")
    from steploop.data.sources.folder import load_folder

    found = load_folder(root, size=size, progress=progress)
    return _checked("folder", found.train, found.test, found.classes, found.note)


def _synthetic(seed: int, size: int, train_samples: int, test_samples: int, note: str) -> ImageData:
    train = SyntheticImageDataset(train_samples, size=size, seed=seed)
    # the same patterns, and other samples of them
    test = SyntheticImageDataset(test_samples, size=size, seed=seed, first=train_samples)
    return _checked("synthetic", train.tensors(), test.tensors(), train.classes, note)


def _checked(
    name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: Sequence[str], note: str
) -> ImageData:
    for what, (images, _) in (("train", train), ("test", test)):
        if len(images) == 0:
            raise EmptyDataError(f"the {what} set of {name} has no images")
    return ImageData(
        name=name,
        train_images=train[0],
        train_labels=train[1],
        test_images=test[0],
        test_labels=test[1],
        classes=tuple(classes),
        note=note,
    )
