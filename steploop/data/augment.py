"""Augment whole batches of images, with pure functions that take a random generator.

They work on the batch as one tensor: a crop of 128 images of 32x32 takes about a tenth of a millisecond, where
a loop over images takes ten times that and a call per image and transform a hundred times.

The generator is on the CPU for images on any device (a ``Loader`` gives such a one): its few numbers
are drawn there and sent over, without waiting for the device, and every device sees the same crops and flips.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from steploop.core.validators import require_int
from steploop.errors import ConfigError

__all__ = ["normalize", "random_crop", "random_flip"]


def random_crop(
    images: Tensor,
    *,
    padding: int,
    generator: torch.Generator,
    mode: Literal["constant", "reflect"] = "constant",
) -> Tensor:
    """Move each image by up to ``padding`` pixels in each direction, at random.

    Each image is padded by P pixels on all sides and a window of its old size cut out, at an offset drawn
    uniformly from ``0 .. 2P``, for rows and columns apart. What ``torchvision.transforms.RandomCrop(size,
    padding=P)`` does to one image, done to all.

    Args:
        images: shape ``(B, C, H, W)``, any dtype and device.
        padding: P, at least 0.
        generator: on the CPU; draws 2B integers.
        mode: the padding: ``"constant"`` is black (0), ``"reflect"`` mirrors without repeating the edge.

    Returns:
        Shape ``(B, C, H, W)``, same dtype and device, contiguous; the images themselves are untouched.

    Raises:
        ConfigError: the images have another number of axes, or the padding does not fit them.

    Source:
        The augmentation of He et al., "Deep Residual Learning for Image Recognition" (2016), section 4.2.

    Example:
        >>> images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        >>> random_crop(images, padding=2, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 8, 8])
    """
    B, C, H, W = _shape(images)  # noqa: N806  (torch's own letters for these axes)
    require_int("padding", padding, minimum=0, maximum=min(H, W) - 1 if mode == "reflect" else None)
    offsets = torch.randint(0, 2 * padding + 1, (2, B), generator=generator)
    padded = _pad(images, padding, mode)
    height, width = padded.shape[2:]
    # Seen as one line of pixels, a row of a window is W neighbours, whose first pixel is an arithmetic matter:
    # cutting out all windows is one gather of B * C * H runs. (Advanced indexing of the windows takes four times
    # as long, a loop over images ten times.)
    top, left = (offsets[i].view(B, 1, 1) for i in (0, 1))
    plane = torch.arange(B * C).view(B, C, 1)
    first = ((plane * height + top + torch.arange(H)) * width + left).view(-1)
    runs = padded.view(-1).unfold(0, W, 1)
    return runs.index_select(0, first.to(images.device, non_blocking=True)).view(B, C, H, W)


def random_flip(images: Tensor, *, generator: torch.Generator, p: float = 0.5) -> Tensor:
    """Mirror each image left to right with probability ``p``.

    Args:
        images: shape ``(B, C, H, W)``, any dtype and device.
        generator: on the CPU; draws B numbers.
        p: probability, 0..1.

    Returns:
        Same shape, dtype and device; the images themselves are untouched.

    Raises:
        ConfigError: the images have another number of axes, or ``p`` is no probability.

    Example:
        >>> images = torch.arange(4.0).reshape(1, 1, 1, 4)
        >>> random_flip(images, p=1.0, generator=torch.Generator().manual_seed(0))
        tensor([[[[3., 2., 1., 0.]]]])
    """
    _shape(images)
    if not 0 <= p <= 1:
        raise ConfigError(f"p must be a probability in 0..1, got {p!r}")
    mirrored = torch.rand(images.shape[0], generator=generator) < p
    rows = torch.arange(images.shape[0]) + images.shape[0] * mirrored
    # both versions of all, and a choice of rows: a selection or an assignment by mask takes four times as long
    return torch.cat([images, images.flip(3)]).index_select(0, rows.to(images.device, non_blocking=True))


def normalize(
    images: Tensor, *, mean: Sequence[float], std: Sequence[float], channels_last: bool = False
) -> Tensor:
    """Convert pixels to floats around zero.

    With x the pixel in 0..1 (a uint8 pixel divided by 255; a float one as it is), for each channel::

        (x - mean) / std

    Args:
        images: shape ``(B, C, H, W)``, uint8 in 0..255 or floating point in 0..1.
        mean: C numbers, of pixels in 0..1.
        std: C numbers greater than 0, of pixels in 0..1.
        channels_last: whether the result is laid out with the channels innermost
            (``torch.channels_last``), in which convolutions are faster on most devices.

    Returns:
        Same shape and device, float32 (floating-point images keep their dtype).

    Raises:
        ConfigError: the numbers do not fit the images.

    Example:
        >>> pixels = torch.full((2, 3, 4, 4), 127, dtype=torch.uint8)
        >>> normalize(pixels, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)).shape
        torch.Size([2, 3, 4, 4])
    """
    channels = _shape(images)[1]
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ConfigError(
            f"mean and std must have {channels} numbers each, one per channel, and std only positive ones; got "
            f"mean={tuple(mean)}, std={tuple(std)}"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ConfigError(f"images must be uint8 or floating point, got {images.dtype}")
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    dtype = torch.float32 if images.dtype == torch.uint8 else images.dtype
    constants = torch.tensor([[m * scale for m in mean], [s * scale for s in std]], dtype=dtype)
    shift, size = constants.to(images.device, non_blocking=True)
    if not channels_last:
        values = images.to(dtype, copy=True)
        return values.sub_(shift.view(-1, 1, 1)).div_(size.view(-1, 1, 1))
    # Reordered while the pixels are still bytes, and as the only large allocation: fresh pages from the system
    # cost more than the arithmetic. One row of all channels at a time is long enough to be fast.
    pixels = torch.stack(images.unbind(1), dim=-1)
    width = pixels.shape[2]
    values = pixels.to(dtype, copy=True)  # (B, H, W, C)
    values.view(-1, width * channels).sub_(shift.repeat(width)).div_(size.repeat(width))
    return values.permute(0, 3, 1, 2)


def _shape(images: Tensor) -> tuple[int, int, int, int]:
    if images.dim() != 4:
        raise ConfigError(f"images must have shape (B, C, H, W), got {tuple(images.shape)}")
    b, c, h, w = images.shape
    return b, c, h, w


def _pad(images: Tensor, padding: int, mode: str) -> Tensor:
    B, C, H, W = _shape(images)  # noqa: N806  (torch's own letters for these axes)
    if mode == "reflect":  # torch's own has no uint8
        rows, columns = (_mirrored(n, padding, images.device) for n in (H, W))
        return images.index_select(2, rows).index_select(3, columns).contiguous()
    if mode != "constant":
        raise ConfigError(f"mode must be 'constant' or 'reflect', got {mode!r}")
    padded = images.new_zeros(B, C, H + 2 * padding, W + 2 * padding)
    padded[:, :, padding : padding + H, padding : padding + W] = images
    return padded


def _mirrored(n: int, padding: int, device: torch.device) -> Tensor:
    """Return the source index for each place of a padded axis: 2 1 | 0 1 2 3 | 2 1."""
    places = torch.arange(-padding, n + padding).abs()
    return torch.minimum(places, 2 * (n - 1) - places).to(device, non_blocking=True)
