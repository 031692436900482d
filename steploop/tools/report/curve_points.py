"""Prepare curves for drawing: smooth them, bound their values, thin them out."""

from itertools import accumulate

from steploop.runs.reading import Curve

__all__ = ["drawable", "smoothed", "thinned"]

MAX_POINTS = 800  # of one curve; more than there are pixels shows nothing more and makes the file heavy
_LARGEST = 1e100


def drawable(curve: Curve) -> Curve:
    """The curve with a gap for each value beyond 1e100, and 0 for one below 1e-100: axes would overflow there."""
    values = tuple(None if value is None else _drawable(value) for value in curve.values)
    return curve if values == curve.values else Curve(curve.steps, values)


def _drawable(value: float) -> float | None:
    size = abs(value)
    return None if not size <= _LARGEST else value if size >= 1 / _LARGEST else 0.0


def smoothed(curve: Curve, *, window: int | None = None) -> Curve:
    """The curve with each value the mean of those around it; None stays None and counts for nothing.

    With h half of the window and r = min(h, i, n - 1 - i), so that there is no lag and the ends stay as they are:

        m_i = mean(v_{i-r}, ..., v_{i+r})

    Args:
        curve: any curve.
        window: how many points a mean is taken over; None means a fiftieth of them, odd.
    """
    n, curve = len(curve), drawable(curve)
    half = (window if window is not None else n // 50) // 2
    if half < 1:
        return curve
    sums = _sums([value or 0.0 for value in curve.values], half)
    counts = _sums([float(value is not None) for value in curve.values], half)
    means = (total / max(count, 1.0) for total, count in zip(sums, counts, strict=True))
    values = (None if v is None else mean for v, mean in zip(curve.values, means, strict=True))
    return Curve(curve.steps, tuple(values))


def _sums(values: list[float], half: int) -> list[float]:
    """The sum around each value, of ``half`` values to both sides, fewer towards the ends.

    Nothing is subtracted: in differences of running sums a loss that exploded once would drown all that follows it.
    """
    n, width = len(values), 2 * half + 1
    first, last = list(accumulate(values[:width])), list(accumulate(values[: -width - 1 : -1]))
    # a window is the end of one block of its width and the beginning of the next
    ends: list[float] = []
    starts: list[float] = []
    for at in range(0, n, width):
        block = values[at : at + width]
        starts += accumulate(block)
        ends += reversed(list(accumulate(reversed(block))))
    found = []
    for i in range(n):
        reach = min(half, i, n - 1 - i)
        low, high = i - reach, i + reach
        if low == 0:
            found.append(first[high])
        elif high == n - 1:
            found.append(last[high - low])
        else:
            found.append(ends[low] if low % width == 0 else ends[low] + starts[high])
    return found


def thinned(curve: Curve, most: int = MAX_POINTS) -> Curve:
    """At most about ``most`` points: of each stretch the lowest and the highest, so that peaks stay.

    A stretch in which all values are None stays a gap; the first and the last point are kept.
    """
    n = len(curve)
    if n <= most:
        return curve
    size = -(-n // (most // 2))
    kept = [0]
    for start in range(1, n - 1, size):
        stretch = range(start, min(start + size, n - 1))
        known = [(value, i) for i in stretch if (value := curve.values[i]) is not None]
        kept += sorted({min(known)[1], max(known)[1]}) if known else [stretch[0]]
    kept.append(n - 1)
    return Curve(tuple(curve.steps[i] for i in kept), tuple(curve.values[i] for i in kept))
