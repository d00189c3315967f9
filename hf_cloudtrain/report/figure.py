"""What all charts share: colours, layout, legend, and the escaping of texts from storage, as hover labels may hold HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

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
    figure: Any
    height: int = 300
    wide: bool = False

    @property
    def legend(self) -> list[tuple[str, str, str]]:
        """(`line`, `dotted`, `dots` or `box`; colour; name) of each trace. Plotly's own legend leaves a phone no room."""
        found: dict[str, tuple[str, str, str]] = {}
        for trace in self.figure.data:
            if trace.name and trace.showlegend is not False and trace.name not in found:
                is_line = trace.type == "scatter" and "lines" in trace.mode
                colour = trace.line.color if is_line else trace.marker.color
                line = "dotted" if is_line and trace.line.dash == "dot" else "line"
                shape = line if is_line else "box" if trace.type == "bar" else "dots"
                known = colour if isinstance(colour, str) else "currentColor"
                found[trace.name] = (shape, known, html.unescape(trace.name))
        return list(found.values())


def new_figure(traces: Sequence[dict[str, Any]], x: str, y: str) -> Any:
    """A figure without a legend or colours of its own: the page's style sets them."""
    from plotly.graph_objects import Figure

    figure = Figure(data=list(traces))
    figure.update_layout(
        template="none",
        showlegend=False,
        margin={"l": 62, "r": 14, "t": 8, "b": 46},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "inherit", "size": 12},
        hovermode="closest",
        hoverlabel={"font": {"family": "inherit", "size": 12}},
    )
    axis = {"zeroline": False, "automargin": True, "exponentformat": "e"}
    figure.update_xaxes(title={"text": x, "standoff": 8}, nticks=8, **axis)
    figure.update_yaxes(title={"text": y, "standoff": 8}, nticks=6, **axis)
    return figure


def safe(text: object, most: int = 60) -> str:
    """A text from storage, escaped for plotly and cut."""
    shown = clean(text)
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
