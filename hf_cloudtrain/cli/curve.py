"""A curve in a few lines of text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of the eight dots of a character, from the top left: https://www.unicode.org/charts/PDF/U2800.pdf"""


def curve(values: Sequence[float], width: int, height: int, *, ascii_only: bool = False) -> list[str]:
    """The values from left to right in `height` lines of at most `width` characters, the highest on top.

    Where there are more values than columns, each column shows their mean. Empty without a value.
    """
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return []
    columns, rows = (width, height) if ascii_only else (2 * width, 4 * height)
    points = _means(values, columns)
    low, high = min(points), max(points)
    span = high - low or 1.0
    heights = [round((high - point) / span * (rows - 1)) if high > low else rows // 2 for point in points]
    if ascii_only:
        return ["".join("*" if at == row else " " for at in heights).rstrip() for row in range(rows)]
    dots = [[0] * ((len(heights) + 1) // 2) for _ in range(height)]
    before = heights[0]
    for column, at in enumerate(heights):
        # Joined to the point before, so that a steep slope is a line and not two dots.
        step = 1 if at >= before else -1
        for row in range(before + step if at != before else at, at + step, step):
            dots[row // 4][column // 2] |= BRAILLE[row % 4][column % 2]
        before = at
    return ["".join(chr(0x2800 + bits) for bits in line) for line in dots]


def _means(values: Sequence[float], columns: int) -> list[float]:
    if len(values) <= columns:
        return list(values)
    edges = [round(column * len(values) / columns) for column in range(columns + 1)]
    return [math.fsum(values[start:stop]) / (stop - start) for start, stop in itertools.pairwise(edges)]
