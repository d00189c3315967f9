"""Charts over time: what each attempt did when, where the wall time went, and the upload lag."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any

from hf_cloudtrain.report.figure import (
    LOST,
    MOST_POINTS,
    MOST_ROWS,
    Chart,
    clock,
    colour,
    new_figure,
    safe,
    utc,
)
from hf_cloudtrain.runtime.text import count_text, duration_text, size_text
from hf_cloudtrain.tracking.history import AttemptInfo, History
from hf_cloudtrain.tracking.status import state_of

KINDS = {
    "steps": ("steps that count", "#2e9e6b"),
    "redone": ("redone (lost steps)", LOST),
    "start": ("startup, until the first step", "#6f8fb0"),
    "evaluation": ("evaluation", "#7a64d1"),
    "save": ("save", "#1f9fb5"),
    "pause": ("other pause", "#b9a44c"),
    "stall": ("stall: a step far slower than usual", "#e08a1e"),
    "down": ("no attempt running", "#a3adb8"),
    "rest": ("between steps, not recorded", "#77828e"),
}
"""What time is spent on, with name and colour."""

OTHER_END = "failed, killed or overtaken"
ENDS = {
    "finished": (("finished",), "circle", "#1d7d53"),
    "running": (("training", "started"), "triangle-right", "#1d7d53"),
    "preempted or stopped": (("preempted", "stopped"), "square", "#b9770e"),
    OTHER_END: ((), "x", "#a11d33"),
}
"""How attempts end: states, symbol and colour. A state that has no other mark has a cross."""
KNOWN_STATES = {state for states, _, _ in ENDS.values() for state in states}


def timeline(history: History) -> Chart | None:
    """A row for each attempt: what it did when, its saves and its uploads."""
    rows = [info for info in history.attempts if info.last_seen > 0][-MOST_ROWS:]
    if not rows:
        return None
    lanes = {info.number: -row for row, info in enumerate(rows)}
    traces = [*_stretch_bars(rows, lanes), *_uploads(history, lanes), *_ends(rows, lanes, history)]
    thickness = max(14, min(46, 640 // len(rows)))
    every = math.ceil(len(rows) / 20)
    shown = rows[::every]
    y = {
        "tickvals": [lanes[info.number] for info in shown],
        "ticktext": [f"attempt {info.number} " for info in shown],
        "range": [-len(rows) + 0.35, 0.6],
        "showgrid": False,
    }
    ends = [commit.committed for commit in history.commits.values() if commit.key.attempt in lanes]
    first, last = min(info.started for info in rows), max(*(info.last_seen for info in rows), *ends, 0.0)
    margin = max(1.0, 0.02 * (last - first))
    x = {"title": "time (UTC)", "type": "date", "range": [utc(first - margin), utc(last + margin)]}
    figure = new_figure(traces, x, y, barmode="overlay")
    title = f"{count_text(len(history.attempts), 'attempt')} in {duration_text(history.wall_seconds)}"
    left = len(history.attempts) - len(rows)
    text = "Triangles are saves; the thin bars are their uploads."
    text += f" It shows the newest {len(rows)} of {len(history.attempts)} attempts." if left else ""
    return Chart("timeline", title, text, figure, 78 + thickness * len(rows), True)


def time_chart(history: History) -> Chart | None:
    """Where the wall time of the run went."""
    spent = time_spent(history)
    wall = sum(spent.values())
    if wall <= 0:
        return None
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "y": ["run"],
            "x": [seconds / wall * 100],
            "name": f"{KINDS[kind][0]}: {duration_text(seconds)} ({seconds / wall:.1%})",
            "marker": {"color": KINDS[kind][1], "line": {"width": 0}},
            "hovertemplate": f"{KINDS[kind][0]}<br>{duration_text(seconds)}, %{{x:.1f}} %<extra></extra>",
        }
        for kind, seconds in spent.items()
    ]
    x = {"title": "% of the time since the run began", "range": [0, 100], "showgrid": False}
    figure = new_figure(traces, x, {"visible": False}, barmode="stack")
    figure["layout"]["margin"]["l"] = 14
    goodput = history.goodput_text or "none"
    text = "From the start of the first attempt to the last sign of life, including restarts."
    if spent.get("stall"):
        text += " Stalls are slow steps and are part of the goodput."
    title = f"Goodput: {goodput} of the time went into steps that count"
    return Chart("goodput", title, text, figure, 118, True)


def commit_chart(history: History) -> Chart | None:
    """Seconds from each save to its commit."""
    commits = sorted(history.commits.values(), key=lambda commit: commit.saved)[-MOST_POINTS:]
    if not commits:
        return None
    lags = [commit.lag for commit in commits]
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [utc(commit.saved) for commit in commits],
        "y": lags,
        "marker": {"size": 8, "color": [colour(commit.key.attempt) for commit in commits]},
        "text": [
            f"checkpoint-{commit.key.step}, attempt {commit.key.attempt}<br>on storage {duration_text(commit.lag)} after "
            "its save" + (f"<br>{size_text(commit.size)}" if commit.size else "")
            for commit in commits
        ],
        "hovertemplate": "%{text}<extra></extra>",
        "showlegend": False,
    }
    y = {"title": "seconds to the commit", "rangemode": "tozero"}
    figure = new_figure([trace], {"title": "time of the save (UTC)", "type": "date"}, y)
    median, most = duration_text(statistics.median(lags)), duration_text(max(lags))
    title = f"Upload lag: median {median}, maximum {most}"
    text = "From each save until it is on storage: losing the machine in between loses the checkpoint."
    return Chart("commits", title, text, figure)


def time_spent(history: History) -> dict[str, float]:
    """Seconds of the wall time by what they were spent on; kinds without any are left out."""
    wall = history.wall_seconds
    alive = _covered([(info.started, info.last_seen) for info in history.attempts])
    steps = min(wall, sum(info.productive_seconds for info in history.attempts))
    redone = sum(info.redone_seconds for info in history.attempts)
    stalls = sum(
        stretch.seconds
        for info in history.attempts
        for stretch in info.stretches
        if stretch.why == "stall" and stretch.began < info.kept_until
    )
    spent = {"steps": max(0.0, steps - stalls), "stall": min(steps, stalls), "redone": redone}
    for kind in ("start", "evaluation", "save", "pause"):
        spent[kind] = sum(
            stretch.seconds for info in history.attempts for stretch in info.stretches if stretch.why == kind
        )
    spent["down"] = max(0.0, wall - alive)
    left = wall
    for kind, seconds in spent.items():  # attempts that overlap add up to more than the wall time
        spent[kind] = min(seconds, max(0.0, left))
        left -= spent[kind]
    spent["rest"] = max(0.0, left)
    return {kind: seconds for kind, seconds in spent.items() if seconds > 0}


def _stretch_bars(rows: list[AttemptInfo], lanes: dict[int, int]) -> Iterator[dict[str, Any]]:
    for kind, (name, shade) in KINDS.items():
        bars = [(info, began, seconds) for info in rows for began, seconds in _stretches(info, kind)]
        bars = sorted(bars, key=lambda bar: -bar[2])[:MOST_POINTS]
        if bars:
            yield _bar(bars, lanes, name, shade)


def _stretches(info: AttemptInfo, kind: str) -> Iterator[tuple[float, float]]:
    if kind == "steps" and info.kept_until > info.started and info.kept_steps:
        yield info.started, info.kept_until - info.started
    elif kind == "redone" and info.redone_steps:
        yield info.kept_until, info.last_seen - info.kept_until
    elif kind == "start" and not info.kept_steps and not info.redone_steps:
        yield info.started, max(0.0, info.last_seen - info.started)
    else:
        yield from ((item.began, item.seconds) for item in info.stretches if item.why == kind)


def _bar(
    bars: list[tuple[AttemptInfo, float, float]], lanes: dict[int, int], name: str, shade: str
) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "base": [utc(began) for _, began, _ in bars],
        "x": [seconds * 1000 for _, _, seconds in bars],  # a date axis counts milliseconds
        "y": [lanes[info.number] for info, _, _ in bars],
        "width": 0.5,
        "name": name,
        "marker": {"color": shade, "line": {"width": 0}},
        "text": [
            f"attempt {info.number}: {name}<br>{duration_text(seconds)}, from {clock(began)}"
            for info, began, seconds in bars
        ],
        "textposition": "none",
        "hovertemplate": "%{text}<extra></extra>",
    }


def _uploads(history: History, lanes: dict[int, int]) -> Iterator[dict[str, Any]]:
    commits = sorted(history.commits.values(), key=lambda commit: commit.saved)
    commits = [commit for commit in commits if commit.key.attempt in lanes][-MOST_POINTS:]
    if not commits:
        return
    rows = [lanes[commit.key.attempt] - 0.36 for commit in commits]
    texts = [
        f"checkpoint-{commit.key.step}<br>saved {clock(commit.saved)}<br>on storage {duration_text(commit.lag)} later"
        for commit in commits
    ]
    common = {"text": texts, "hovertemplate": "%{text}<extra></extra>", "y": rows}
    yield {
        **common,
        "type": "bar",
        "orientation": "h",
        "base": [utc(commit.saved) for commit in commits],
        "x": [commit.lag * 1000 for commit in commits],
        "width": 0.12,
        "name": "upload",
        "textposition": "none",
        "marker": {"color": "#3b7dd8", "line": {"width": 0}},
    }
    yield {
        **common,
        "type": "scatter",
        "mode": "markers",
        "x": [utc(commit.saved) for commit in commits],
        "name": "save",
        "marker": {"symbol": "triangle-up", "size": 8, "color": "#3b7dd8"},
    }


def _ends(rows: list[AttemptInfo], lanes: dict[int, int], history: History) -> Iterator[dict[str, Any]]:
    newest = history.attempts[-1].number
    found = [
        (info, state_of(info.state, info.last_seen, newest=info.number == newest, now=history.read_at))
        for info in rows
    ]
    for end, (states, symbol, shade) in ENDS.items():
        ended = [(info, state) for info, state in found if state in states]
        if end == OTHER_END:
            ended = [(info, state) for info, state in found if state not in KNOWN_STATES]
        if ended:
            yield {
                "type": "scatter",
                "mode": "markers",
                "x": [utc(info.last_seen) for info, _ in ended],
                "y": [lanes[info.number] for info, _ in ended],
                "text": [
                    f"attempt {info.number}: {safe(state)}<br>last seen {clock(info.last_seen)}, step {info.last_step}"
                    for info, state in ended
                ],
                "marker": {
                    "symbol": symbol,
                    "size": 11,
                    "color": shade,
                    "line": {"width": 1, "color": "#ffffff"},
                },
                "name": end,
                "hovertemplate": "%{text}<extra></extra>",
            }


def _covered(spans: list[tuple[float, float]]) -> float:
    """Seconds that at least one of them covers."""
    total, end = 0.0, -math.inf
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
