"""Draw discs, squares and triangles, with a mask that labels every pixel."""

import math

import torch
from torch import Tensor

from steploop.core.seeds import fold_in

__all__ = ["SHAPE_CLASSES", "draw_shapes"]

SHAPE_CLASSES = ("background", "disc", "square", "triangle")


def draw_shapes(
    count: int, *, size: int = 64, seed: int = 0, shapes: int = 3, noise: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Draw images of a few coloured shapes on a coloured background, and their masks.

    Each shape has a class, a place, a radius of 0.15 to 0.3 of the side, a turn and a colour of its own; a later
    one hides what it covers. The colours say nothing about the class, and Gaussian noise of standard deviation
    ``noise`` (of a range of 1) lies over all: the form has to be learned. A pure function of its arguments.

    Args:
        count: how many images, N.
        size: their side S, in pixels.
        seed: another one gives other images.
        shapes: how many shapes in an image.
        noise: standard deviation of the noise.

    Returns:
        Images (N, 3, S, S) uint8, and masks (N, S, S) uint8 that index ``SHAPE_CLASSES``.

    Example:
        >>> images, masks = draw_shapes(2, size=16)
        >>> images.shape, masks.shape
        (torch.Size([2, 3, 16, 16]), torch.Size([2, 16, 16]))
    """
    g = torch.Generator().manual_seed(fold_in(seed, count, size, shapes))

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=g)

    axis = (torch.arange(size) + 0.5) / size
    y, x = axis[:, None], axis[None, :]  # of each pixel's centre, 0..1
    images = draw(0.0, 1.0, 3, 1, 1).expand(count, 3, size, size).clone()
    masks = torch.zeros(count, size, size, dtype=torch.uint8)
    for _ in range(shapes):
        kind = torch.randint(1, len(SHAPE_CLASSES), (count, 1, 1), generator=g)
        radius, turn = draw(0.15, 0.3, 1, 1), draw(0.0, 2 * math.pi, 1, 1)
        dx, dy = x - draw(0.2, 0.8, 1, 1), y - draw(0.2, 0.8, 1, 1)
        inside = _inside(kind, dx * turn.cos() + dy * turn.sin(), dy * turn.cos() - dx * turn.sin(), radius)
        masks = torch.where(inside, kind.to(torch.uint8), masks)
        images = torch.where(inside[:, None], draw(0.0, 1.0, 3, 1, 1), images)
    images += noise * torch.randn(images.shape, generator=g)
    return (images.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8), masks


def _inside(kind: Tensor, u: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    """Whether points (u, v), in the shape's own axes, lie inside; corners lie on the circle of ``radius``.

    A regular polygon is the intersection of half-planes: of four for the square, of three for the triangle.
    """
    disc = u**2 + v**2 <= radius**2
    square = torch.maximum(u.abs(), v.abs()) <= radius / math.sqrt(2)
    slope = math.sqrt(3) / 2
    triangle = torch.maximum(-v, torch.maximum(slope * u + v / 2, v / 2 - slope * u)) <= radius / 2
    return torch.where(kind == 1, disc, torch.where(kind == 2, square, triangle))
