"""A curve in a few lines of text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of the eight dots of one letter, from the top left: https://www.unicode.org/charts/PDF/U2800.pdf"""


def curve(values: Sequence[float], width: int, height: int, *, ascii_only: bool = False) -> list[str]:
    """The values from left to right in `height` lines of at most `width` letters, the highest on top.

    Where there are more values than places, each place shows their mean. Empty without a value.
    """
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return []
    columns, rows = (width, height) if ascii_only else (2 * width, 4 * height)
    points = _means(values, columns)
    low, high = min(points), max(points)
    span = high - low or 1.0
    places = [round((high - point) / span * (rows - 1)) if high > low else rows // 2 for point in points]
    if ascii_only:
        return ["".join("*" if place == row else " " for place in places).rstrip() for row in range(rows)]
    dots = [[0] * ((len(places) + 1) // 2) for _ in range(height)]
    before = places[0]
    for column, place in enumerate(places):
        # Joined to the one before, so that a steep slope is a line and not two dots.
        step = 1 if place >= before else -1
        for row in range(before + step if place != before else place, place + step, step):
            dots[row // 4][column // 2] |= BRAILLE[row % 4][column % 2]
        before = place
    return ["".join(chr(0x2800 + bits) for bits in line) for line in dots]


def _means(values: Sequence[float], places: int) -> list[float]:
    if len(values) <= places:
        return list(values)
    edges = [round(place * len(values) / places) for place in range(places + 1)]
    return [math.fsum(values[start:stop]) / (stop - start) for start, stop in itertools.pairwise(edges)]
