"""Decode an image file of any depth and colours into upright RGB bytes."""

import os
import stat

import attrs
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from steploop.errors import DataError

__all__ = ["Pixels", "Unreadable", "decoded", "fitted"]

Pixels = npt.NDArray[np.uint8]  # (H, W, 3)

# Pillow's modes of 8 bits and less, which it turns into RGB itself; transparency is dropped, as torchvision does.
_EIGHT_BITS = frozenset({
    "1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV",
})  # fmt: skip
# Formats whose mode "I" means 16 bits without a sign; in a TIFF it means 32.
_SIXTEEN_BITS_IN_I = frozenset({"PNG", "PPM"})


@attrs.frozen
class Unreadable:
    """A file that is no image, or a damaged one."""

    path: str
    reason: str


def decoded(path: str) -> tuple[Pixels, int] | Unreadable:
    """Decode a file.

    The picture is turned as its EXIF orientation says. With v the stored value, a pixel is v of 8 bits,
    ``round(v / 65535 * 255)`` of 16 bits, and ``round(v * 255)`` of floating point in 0..1.

    Returns:
        The pixels of its first picture, and how many more pictures (pages of a TIFF, frames) the file holds; or why
        it is no image.

    Raises:
        DataError: the file cannot be opened, or its values have no known range.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116  (a pipe would be waited for)
            return Unreadable(path, "no regular file")
        with Image.open(path) as file:
            more = (
                0 if file.format == "MPO" else getattr(file, "n_frames", 1) - 1
            )  # MPO: previews of a camera
            file.seek(0)
            file.load()
            ImageOps.exif_transpose(file, in_place=True)
            return _rgb(file, path), more
    except DataError:
        raise
    except Exception as error:
        # an error of the system says nothing about the image, and may be gone at the next start
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        return Unreadable(path, f"{type(error).__name__}: {error}")


def _rgb(image: Image.Image, path: str) -> Pixels:
    if image.mode in _EIGHT_BITS:
        return np.asarray(image.convert("RGB"))
    values = np.asarray(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BITS_IN_I):
        # + half of the divisor rounds to the nearest
        gray = (values.astype(np.int64) * 255 + 32767) // 65535
    elif image.mode == "F" and bool(np.isfinite(values).all()) and values.min() >= 0 and values.max() <= 1:
        gray = np.rint(values * 255)
    else:
        found = f" with values in {values.min()}..{values.max()}" if image.mode in {"F", "I"} else ""
        raise DataError(
            f"{path} is an image of Pillow's mode {image.mode!r}{found}, whose range is not known: 8 or 16 bits, or "
            "floating point in 0..1, are. Convert the images, or read them yourself (a Loader over a dataset)"
        )
    return np.repeat(gray.astype(np.uint8)[:, :, None], 3, axis=2)


def fitted(pixels: Pixels, shape: tuple[int, ...]) -> Pixels:
    """Scale so that the picture just covers ``shape``, and cut it around the middle."""
    height, width = shape
    image = ImageOps.fit(Image.fromarray(pixels), (width, height), method=Image.Resampling.BILINEAR)
    return np.asarray(image)
