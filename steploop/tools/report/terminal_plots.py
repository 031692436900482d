"""Draw curves in the terminal with Braille dots."""

import math
from collections.abc import Mapping, Sequence

__all__ = ["draw_curve", "draw_grid", "falling_window"]

# The dots of a Braille character, by column and row: Unicode block U+2800, https://www.unicode.org/charts/PDF/U2800.pdf
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_LABEL = 9  # characters for the numbers on the left


def _stretched(values: Sequence[float | None], count: int) -> list[float | None]:
    """Few values as ``count`` of them on the straight lines between; a gap stays one."""
    found: list[float | None] = []
    for i in range(count):
        place = i * (len(values) - 1) / max(count - 1, 1)
        left, right = values[math.floor(place)], values[math.ceil(place)]
        share = place - math.floor(place)
        found.append(None if left is None or right is None else left + share * (right - left))
    return found


def _cells(
    values: Sequence[float | None], width: int, height: int, low: float, high: float
) -> list[list[int]]:
    """The dots of one curve: 2 x 4 of them to a character, the gaps of steep parts filled upright."""
    columns, rows = 2 * width, 4 * height
    # what lies outside of the bounds runs along the edge
    values = [None if v is None or math.isnan(v) else min(max(v, low), high) for v in values]
    if len(values) < columns:
        values = _stretched(values, columns)
    cells = [[0] * width for _ in range(height)]
    before: int | None = None
    for x in range(columns):
        # every point that falls on this column: the whole of its range is drawn, so no peak is lost
        first, last = (
            x * len(values) // columns,
            max((x + 1) * len(values) // columns, x * len(values) // columns + 1),
        )
        known = [v for v in values[first:last] if v is not None]
        if not known:
            before = None
            continue
        ys = [round((v - low) / (high - low) * (rows - 1)) for v in (min(known), max(known))]
        if before is not None:
            ys = [min(*ys, before + (ys[0] > before)), max(*ys, before - (ys[1] < before))]
        for y in range(ys[0], ys[1] + 1):
            cells[height - 1 - y // 4][x // 2] |= _DOTS[x % 2][3 - y % 4]
        before = round((known[-1] - low) / (high - low) * (rows - 1))
    return cells


def draw_curve(
    values: Sequence[float | None],
    *,
    title: str = "",
    width: int = 40,
    height: int = 6,
    bounds: tuple[float, float] | None = None,
    ends: tuple[str, str] | None = None,
) -> list[str]:
    """One curve with its title, scale and horizontal range, as lines of equal length.

    Args:
        values: at equal distances; None is a gap.
        title: stands above it.
        width: of the whole drawing, in characters.
        height: of the curve, in lines.
        bounds: lowest and highest value of the vertical axis; None takes them from the values.
        ends: what stands below the left and the right end.
    """
    known = [v for v in values if v is not None and math.isfinite(v)]
    inner = max(width - _LABEL - 2, 4)
    lines = [title[:width].ljust(width)]
    if not known:
        return [*lines, "(no finite values)"[:width].ljust(width), *[" " * width] * (height + 1)]
    low, high = bounds or (min(known), max(known))
    if high <= low:
        low, high = low - (abs(low) * 0.5 or 1.0), high + (abs(high) * 0.5 or 1.0)
    for row, cells in enumerate(_cells(values, inner, height, low, high)):
        label = f"{high:.3g}" if row == 0 else f"{low:.3g}" if row == height - 1 else ""
        text = "".join(chr(0x2800 + dots) if dots else " " for dots in cells)
        lines.append(f"{label:>{_LABEL}} │{text}"[:width].ljust(width))
    left, right = ends or ("0", str(len(values) - 1))
    foot = left + right.rjust(inner - len(left))
    return [
        *lines,
        (" " * _LABEL + " └" + "─" * inner)[:width].ljust(width),
        (" " * (_LABEL + 2) + foot)[:width].ljust(width),
    ]


def falling_window(values: Sequence[float | None]) -> tuple[float, float] | None:
    """The part of a vertical axis in which a curve falls: one that explodes at its end would hide it otherwise."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return None
    low, start = min(known), known[0]
    top = start + 0.5 * max(start - low, abs(start) * 0.1, 1e-12)
    return low - 0.1 * (top - low), top


def draw_grid(
    curves: Mapping[str, Sequence[float | None]],
    *,
    ends: Mapping[str, tuple[str, str]] | None = None,
    width: int = 80,
    height: int = 6,
    same_scale: bool = True,
) -> str:
    """Curves side by side, as many to a line as fit.

    Args:
        curves: title -> values.
        ends: title -> what stands below the left and the right end; counts where it is not given.
        width: of the window, in characters.
        height: of each curve, in lines.
        same_scale: draw all over the same range, from 0 or the lowest value to the highest.
    """
    columns = max(1, min(len(curves), (width + 2) // 38))
    each = (width - 2 * (columns - 1)) // columns
    known = [v for values in curves.values() for v in values if v is not None and math.isfinite(v)]
    bounds = (min(0.0, *known), max(known)) if same_scale and known else None
    drawings = [
        draw_curve(values, title=name, width=each, height=height, bounds=bounds, ends=(ends or {}).get(name))
        for name, values in curves.items()
    ]
    blocks = []
    for start in range(0, len(drawings), columns):
        row = drawings[start : start + columns]
        blocks.append("\n".join("  ".join(parts).rstrip() for parts in zip(*row, strict=True)))
    return "\n\n".join(blocks)
