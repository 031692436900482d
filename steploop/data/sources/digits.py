"""Load handwritten digits as 28x28 images: MNIST if available, else the 1,797 of scikit-learn."""

import socket
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from steploop.core.extras import import_extra
from steploop.data.sources.network import open_url
from steploop.errors import ConfigError, DataError, MissingExtraError

__all__ = ["DigitSource", "Digits", "load_digits"]

DigitSource = Literal["auto", "mnist", "digits"]

# Of scikit-learn's 1,797, in the order of its file, the last 397 are for testing.
_TRAIN_SAMPLES = 1400


@attrs.frozen(eq=False)
class Digits:
    """Images and labels of two disjoint sets.

    Attributes:
        train: images (N, 1, 28, 28) uint8, 0 is the background, and labels (N,) int64, 0..9.
        test: images and labels in the same form.
        description: one sentence that says what these data are.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    description: str


def load_digits(source: DigitSource = "auto", *, root: str | Path = "data", timeout_s: float = 4.0) -> Digits:
    """Load digits from ``source``.

    Args:
        source: "mnist" (torchvision's, 60,000 + 10,000, downloaded into ``root`` unless it is there), "digits"
            (scikit-learn's, 1,400 + 397, which need no network) or "auto": MNIST if it is on disk or can be downloaded
            within ``timeout_s``, else scikit-learn's.
        root: the directory that holds ``MNIST/raw``.
        timeout_s: how long to wait for the network before giving up.

    Raises:
        ConfigError: there is no such source.
        DataError: MNIST was asked for, but is not on disk and cannot be downloaded.
        MissingExtraError: scikit-learn's digits are needed, and it is not installed.

    Example:
        >>> digits = load_digits("digits")
        >>> digits.train[0].shape
        torch.Size([1400, 1, 28, 28])
    """
    if source not in {"auto", "mnist", "digits"}:
        raise ConfigError(f'load_digits: source must be "auto", "mnist" or "digits", got {source!r}.')
    if source == "digits":
        return _scikit_learn_digits("")
    try:
        return _mnist(Path(root).expanduser(), timeout_s)
    except MissingExtraError:
        if source == "mnist":
            raise
        return _scikit_learn_digits("; MNIST needs torchvision, which is not installed")
    except (OSError, RuntimeError) as error:
        if source == "mnist":
            raise DataError(
                f"MNIST is not in {Path(root) / 'MNIST'} and could not be downloaded ({error}). Put it there, say where "
                'it is with root, or use source="digits", which needs no network.'
            ) from error
        return _scikit_learn_digits("; MNIST is not on disk and could not be downloaded")


def _mnist(root: Path, timeout_s: float) -> Digits:
    datasets: Any = import_extra("torchvision.datasets", extra="recipes", purpose="Reading MNIST")
    MNIST = datasets.MNIST  # noqa: N806  (a class)

    def load() -> Digits:
        train, test = (MNIST(str(root), train=train) for train in (True, False))
        return Digits(
            (train.data[:, None], train.targets),
            (test.data[:, None], test.targets),
            "MNIST: 60,000 handwritten digits for training, 10,000 for testing",
        )

    try:
        return load()
    except RuntimeError:  # it is not on disk
        open_url(MNIST.mirrors[0] + MNIST.resources[0][0], timeout_s=timeout_s).close()
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(
        4 * timeout_s
    )  # torchvision sets none: a download that stalls would hang for ever
    try:
        MNIST(str(root), download=True)
    finally:
        socket.setdefaulttimeout(before)
    return load()


def _scikit_learn_digits(why: str) -> Digits:
    """Enlarge 8x8 pixels of 0..16 to 20x20 of 0..255, in the middle of 28x28 as in MNIST."""
    datasets: Any = import_extra(
        "sklearn.datasets", extra="recipes", purpose="Training on handwritten digits without MNIST"
    )
    bunch = datasets.load_digits()
    small = torch.from_numpy(bunch.images).float()[:, None]
    large = F.interpolate(small, size=(20, 20), mode="bilinear", align_corners=False)
    images = F.pad((large * (255.0 / 16.0)).round(), (4, 4, 4, 4)).to(torch.uint8)
    labels = torch.from_numpy(bunch.target).long()
    n = _TRAIN_SAMPLES
    return Digits(
        (images[:n], labels[:n]),
        (images[n:], labels[n:]),
        f"scikit-learn's 1,797 handwritten digits enlarged to 28x28, {n:,} for training{why}",
    )
