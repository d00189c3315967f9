"""What all charts share: colours, layout, legend, and the escaping of texts from storage, as hover labels may hold HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from hf_cloudtrain.runtime.redaction import redact
from hf_cloudtrain.runtime.text import clean

COLOURS = ("#3b7dd8", "#e08a1e", "#2e9e6b", "#c2498f", "#7a64d1", "#1f9fb5", "#a5702c", "#6b7785")
"""Of the attempts, in turn; readable on white and on black."""
LOST = "#d1495b"
"""Colour of steps that were redone."""
MOST_POINTS = 4_000
"""Points of one curve: more than a screen has columns, few enough to zoom smoothly."""
MOST_ROWS = 60
"""Attempts that a chart shows one by one."""


@dataclass(frozen=True)
class Chart:
    """A figure, with a title and a sentence that say what it shows."""

    name: str
    """The id of its HTML element: letters only."""
    title: str
    text: str
    figure: dict[str, Any]
    """`data` and `layout` of plotly: numbers, escaped texts, lists and dictionaries, as JSON holds them."""
    height: int = 300
    wide: bool = False

    @property
    def legend(self) -> list[tuple[str, str, str]]:
        """(shape, colour, name) of each trace, in the place of plotly's own legend, which leaves a phone no room.

        The shape is `line`, `dotted`, `box`, or one of plotly's symbols, such as `triangle-up`: what the chart shows.
        """
        found: dict[str, tuple[str, str, str]] = {}
        for trace in self.figure["data"]:
            name = trace.get("name")
            if name and trace.get("showlegend", True) and name not in found:
                found[name] = (*_sample(trace), html.unescape(name))
        return list(found.values())

    def record(self) -> dict[str, Any]:
        """Everything about the chart, for JSON."""
        return {**vars(self), "legend": self.legend}


def _sample(trace: dict[str, Any]) -> tuple[str, str]:
    """The shape and the colour of a trace."""
    if trace["type"] == "bar":
        return "box", trace["marker"]["color"]
    symbol = trace["marker"].get("symbol", "circle")
    is_line = "lines" in trace["mode"] and symbol.startswith("circle")
    style = trace["line"] if is_line else trace["marker"]
    return ("dotted" if style.get("dash") == "dot" else "line") if is_line else symbol, style["color"]


def new_figure(
    traces: Sequence[dict[str, Any]], x: dict[str, Any], y: dict[str, Any], **layout: Any
) -> dict[str, Any]:
    """A figure without a legend or colours of its own: the page's style sets them.

    Args:
        x: settings of the axis; its `title` is a text.
        y: the same.
        layout: further settings.
    """
    common = {"zeroline": False, "automargin": True, "exponentformat": "e"}
    return {
        "data": list(traces),
        "layout": {
            "showlegend": False,
            "margin": {"l": 62, "r": 14, "t": 8, "b": 46},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"size": 12},
            "hovermode": "closest",
            "uirevision": "zoom",  # what a person zoomed into stays when data arrives
            "xaxis": {"nticks": 8, **common, **x, "title": {"text": x.get("title", ""), "standoff": 8}},
            "yaxis": {"nticks": 6, **common, **y, "title": {"text": y.get("title", ""), "standoff": 8}},
            **layout,
        },
    }


def safe(text: object, most: int = 60) -> str:
    """A text from storage, escaped for plotly, cut, and without known secrets."""
    shown = redact(clean(str(text)[: 8 * most]))  # a name may have megabytes
    return html.escape(shown if len(shown) <= most else shown[: most - 1] + "…").replace("%{", "% {")


def colour(attempt: int) -> str:
    """The colour of an attempt."""
    return COLOURS[(attempt - 1) % len(COLOURS)]


def utc(seconds: float) -> str:
    """A date for plotly; a time outside the calendar becomes the nearest one inside."""
    moment = datetime.fromtimestamp(min(max(seconds, 0.0), 250_000_000_000.0), timezone.utc)
    return moment.strftime("%Y-%m-%d %H:%M:%S.%f")


def clock(seconds: float) -> str:
    """The same, to the second, for a label."""
    return utc(seconds)[:19]
