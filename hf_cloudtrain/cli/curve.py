"""Curves in a few lines of text: one, or several on the same axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

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


Cell = tuple[str, int | None]
"""A character, and the number of the curve that it belongs to."""


def overlay(
    curves: Sequence[Sequence[tuple[float, float]]], width: int, height: int, *, marks: str = ""
) -> list[list[Cell]]:
    """Several curves of (x, y) on the same axes, in `height` lines of `width` cells. Where two meet, the later one is seen.

    Args:
        marks: a character for each curve, where colours do not tell them apart; "": dots.
    """
    columns, rows = (width, height) if marks else (2 * width, 4 * height)
    points = [[point for point in one if math.isfinite(point[1])] for one in curves]
    known = [point for one in points for point in one]
    if not known:
        return []
    left, right = min(x for x, _ in known), max(x for x, _ in known)
    low, high = min(y for _, y in known), max(y for _, y in known)
    cells: dict[tuple[int, int], tuple[int, int]] = {}
    for number, one in enumerate(points):
        at = {}
        for column, y in _by_column(one, left, right, columns):
            at[column] = round((high - y) / (high - low) * (rows - 1)) if high > low else rows // 2
        for column, row in _joined(at):
            place = (row, column) if marks else (row // 4, column // 2)
            bits, owner = cells.get(place, (0, number))
            own = bits if owner == number else 0
            cells[place] = own | (0 if marks else BRAILLE[row % 4][column % 2]), number
    return [[_cell(cells.get((row, column)), marks) for column in range(width)] for row in range(height)]


def _by_column(
    points: Sequence[tuple[float, float]], left: float, right: float, columns: int
) -> list[tuple[int, float]]:
    """The mean of each column that has points."""
    found: dict[int, list[float]] = {}
    for x, y in points:
        column = round((x - left) / (right - left) * (columns - 1)) if right > left else 0
        found.setdefault(column, []).append(y)
    return [(column, math.fsum(values) / len(values)) for column, values in sorted(found.items())]


def _joined(at: dict[int, int]) -> Iterator[tuple[int, int]]:
    """The points of a line through one row for each column."""
    for (column, row), (after, new) in itertools.pairwise(at.items()):
        for between in range(column, after):
            start, end = (
                round(row + (new - row) * (place - column) / (after - column))
                for place in (between, between + 1)
            )
            step = 1 if end >= start else -1
            yield from ((between, filled) for filled in range(start, end, step))
            yield between, start
    yield from list(at.items())[-1:]


def _cell(found: tuple[int, int] | None, marks: str) -> Cell:
    if found is None:
        return " ", None
    bits, number = found
    return (marks[number % len(marks)] if marks else chr(0x2800 + bits)), number
