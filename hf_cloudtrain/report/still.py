"""A figure as a still picture: SVG without a script, for notebooks, which show it wherever they are opened."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

WIDTH, HEIGHT = 600, 150
"""Of the picture, in CSS pixels; it shrinks with its column."""
LEFT, BOTTOM, TOP = 62, 18, 6
"""Room for the numbers of the axes."""

Point = tuple[float, float]


def still(figure: dict[str, Any]) -> str:
    """The curves of a figure, with the least and the greatest value of each axis; empty if there is nothing to draw.

    Args:
        figure: of `charts_of`; its numbers and colours are ours, and none of its texts is shown.
    """
    curves = [(trace, list(_pieces(trace))) for trace in figure["data"] if trace["type"] == "scatter"]
    points = [point for _, pieces in curves for piece in pieces for point in piece]
    if len(points) < 2:
        return ""
    is_log = figure["layout"]["yaxis"].get("type") == "log"
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    across = (WIDTH - LEFT - 4) / ((right - left) or 1.0)
    down = (HEIGHT - TOP - BOTTOM) / ((_height(high, is_log=is_log) - _height(low, is_log=is_log)) or 1.0)

    def place(point: Point) -> Point:
        lower = _height(high, is_log=is_log) - _height(point[1], is_log=is_log)
        return LEFT + (point[0] - left) * across, TOP + lower * down

    drawn = [part for trace, pieces in curves for piece in pieces for part in _draw(trace, map(place, piece))]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="from {low:.4g} to {high:.4g}" '
        f'style="width:100%;max-width:{WIDTH}px;height:auto;display:block">'
        + _text(LEFT - 6, TOP + 9, f"{high:.4g}", "end")
        + _text(LEFT - 6, HEIGHT - BOTTOM, f"{low:.4g}", "end")
        + _text(LEFT, HEIGHT - 4, f"{left:,.0f}", "start")
        + _text(WIDTH - 4, HEIGHT - 4, f"step {right:,.0f}", "end")
        + "".join(drawn)
        + "</svg>"
    )


def _pieces(trace: dict[str, Any]) -> Iterator[list[Point]]:
    """The finite points of a trace; a gap begins a new piece."""
    piece: list[Point] = []
    for x, y in zip(trace["x"], trace["y"], strict=True):
        if isinstance(x, (int, float)) and isinstance(y, (int, float)):
            piece.append((float(x), float(y)))
        elif piece:
            yield piece
            piece = []
    if piece:
        yield piece


def _draw(trace: dict[str, Any], places: Iterator[Point]) -> Iterator[str]:
    points = _thin(list(places))
    has_line = "lines" in trace["mode"] and len(points) > 1
    colour = trace["line"]["color"] if has_line else trace["marker"]["color"]
    opacity = trace.get("opacity", 1)
    if has_line:
        dash = ' stroke-dasharray="3 3"' if trace["line"].get("dash") == "dot" else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5" opacity="{opacity}"{dash}/>'
    else:
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in points)


def _thin(points: list[Point]) -> list[Point]:
    """The highest and the lowest point of each column of pixels."""
    if len(points) <= 2 * WIDTH:
        return points
    columns: dict[int, list[Point]] = {}
    for point in points:
        columns.setdefault(int(point[0]), []).append(point)
    kept = []
    for column in columns.values():
        ends = {min(column, key=lambda point: point[1]), max(column, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _height(y: float, *, is_log: bool) -> float:
    return math.log10(y) if is_log and y > 0 else y


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="11" fill="currentColor" '
        f'opacity="0.65">{words}</text>'
    )
