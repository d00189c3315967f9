"""A curve as small as a word, for the row of a table: the `d` attribute of an SVG path."""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDTH, HEIGHT = 120.0, 24.0
"""Of the view box that the path is made for."""
COLUMNS = 60
"""Points of the path: each is the mean of its part of the curve."""


def sparkline(points: Sequence[tuple[float, float]]) -> str:
    """A path through (x, y), ascending in x, from edge to edge of the view box; empty without two finite points."""
    points = [point for point in points if math.isfinite(point[1])]
    if len(points) < 2 or points[0][0] == points[-1][0]:
        return ""
    size = math.ceil(len(points) / COLUMNS)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    means = [(part[-1][0], math.fsum(y for _, y in part) / len(part)) for part in parts]
    left, right = points[0][0], points[-1][0]
    means[0] = (left, means[0][1])
    low, high = min(y for _, y in means), max(y for _, y in means)
    across, down = WIDTH / (right - left), (HEIGHT - 2) / ((high - low) or 1.0)
    return "M" + " ".join(f"{(x - left) * across:.1f},{1 + (high - y) * down:.1f}" for x, y in means)
