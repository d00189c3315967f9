"""Charts over steps: loss, learning rate, step time, evaluations."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hf_cloudtrain.report.figure import (
    COLOURS,
    LOST,
    MOST_POINTS,
    MOST_ROWS,
    Chart,
    colour,
    new_figure,
    safe,
)
from hf_cloudtrain.runtime.text import clean, count_text, duration_text
from hf_cloudtrain.runtime.values import metric
from hf_cloudtrain.tracking.history import History

MOST_RATES = 400
"""Points of the curve of the throughput."""
MOST_METRICS = 6
"""Evaluation metrics that one chart can show."""

Point = tuple[float, float, int]
"""x, y and the number of the attempt."""


def loss_chart(history: History, smoothing: float = 0.0) -> Chart | None:
    """Training loss and evaluation loss by step."""
    kept, lost = _logged(history.logs, "loss"), _logged(history.superseded, "loss")
    evals = _logged(history.logs, "eval_loss")
    if not kept and not evals:
        return None
    traces = [
        *_curves(kept, "loss", "loss %{y:.5g}", smoothing=smoothing),
        *_curves(lost, "redone", "loss %{y:.5g}", lost=True),
    ]
    if evals:
        marks = {"mode": "lines+markers", "marker": {"size": 7, "symbol": "diamond", "color": "#7a64d1"}}
        traces.append(
            {**_line(_thin(evals), "evaluation loss %{y:.5g}"), **marks, "name": "evaluation"}
            | {"line": {"width": 1, "dash": "dot", "color": "#7a64d1"}}
        )
    seen = kept or evals
    first, last, least = seen[0], seen[-1], min(seen, key=lambda point: point[1])
    title = f"Loss: {last[1]:.4g} at step {last[0]:,.0f}"
    broken = [log for log in history.logs if not math.isfinite(metric(log.get("loss")) or 0.0)]
    if broken and (not kept or broken[-1]["step"] > kept[-1][0]):
        title = f"Loss: not finite at step {broken[-1]['step']:,.0f}"
    text = f"From {first[1]:.4g} at step {first[0]:,.0f}; lowest {least[1]:.4g} at step {least[0]:,.0f}. "
    if broken:
        text += (
            f"It was not finite {count_text(len(broken), 'time')}, first at step {broken[0]['step']:,.0f}. "
        )
    return Chart("loss", title, text + _lost_text(history), _by_step(traces, "loss", history), 380, True)


def learning_rate_chart(history: History) -> Chart | None:
    """Learning rate by step."""
    return _logged_chart(history, "learning_rate", "rate", "learning rate")


def grad_norm_chart(history: History, smoothing: float = 0.0) -> Chart | None:
    """Norm of the gradient by step."""
    return _logged_chart(history, "grad_norm", "gradnorm", "gradient norm", smoothing)


def throughput_chart(history: History) -> Chart | None:
    """Samples per second: the mean of each interval of steps."""
    samples = {info.number: info.samples_per_step for info in history.attempts if info.samples_per_step}
    steps = sorted(step for step, number in history.step_attempts.items() if number in samples)
    size = _interval(len(steps), MOST_RATES)
    points: list[Point] = []
    for start in range(0, len(steps), size):
        part = steps[start : start + size]
        number, seconds = history.step_attempts[part[-1]], sum(history.step_seconds[step] for step in part)
        if seconds > 0:
            points.append((part[-1], len(part) * (samples[number] or 0) / seconds, number))
    if not points:
        return None
    traces = list(_curves(points, "throughput", "%{y:.4g} samples/s"))
    figure = _by_step(traces, "samples per second", history, rangemode="tozero")
    text = f"Highest {max(rate for _, rate, _ in points):.4g}. Time between steps is not part of it."
    return Chart("throughput", f"Throughput: {points[-1][1]:.4g} samples per second", text, figure)


def _logged_chart(history: History, key: str, name: str, words: str, smoothing: float = 0.0) -> Chart | None:
    kept = _logged(history.logs, key)
    if not kept:
        return None
    lost = _logged(history.superseded, key)
    label = f"{words} %{{y:.4g}}"
    traces = [
        *_curves(kept, name, label, smoothing=smoothing),
        *_curves(lost, "redone", label, lost=True),
    ]
    highest = max(kept, key=lambda point: point[1])
    title = f"{words.capitalize()}: {kept[-1][1]:.3g} at step {kept[-1][0]:,.0f}"
    text = f"Highest {highest[1]:.3g} at step {highest[0]:,.0f}."
    return Chart(name, title, text, _by_step(traces, words, history))


def step_time_chart(history: History, smoothing: float = 0.0) -> Chart | None:
    """Duration of each step."""
    attempts = history.step_attempts
    kept: list[Point] = [
        (step, seconds, attempts.get(step, 0))
        for step, seconds in sorted(history.step_seconds.items())
        if seconds > 0
    ]
    if not kept:
        return None
    lost: list[Point] = sorted(
        (step, seconds, number) for number, step, seconds in history.redone_step_seconds if seconds > 0
    )
    usual = statistics.median(seconds for _, seconds, _ in kept)
    slowest = max(kept, key=lambda point: point[1])
    label = "%{y:.4g} s"
    traces = [
        *_curves(kept, "steps", label, smoothing=smoothing),
        *_curves(lost, "redone", label, lost=True),
    ]
    wide_range = slowest[1] > 10 * usual
    scale = {"type": "log", "dtick": 1} if wide_range else {"rangemode": "tozero"}
    figure = _by_step(traces, "seconds per step" + (" (logarithmic)" if wide_range else ""), history, **scale)
    title = f"Step time: median {duration_text(usual)}"
    text = f"Slowest {duration_text(slowest[1])}, step {slowest[0]:,.0f}."
    if len(kept) > MOST_POINTS:
        text += " The curve shows the fastest and the slowest step of each interval."
    return Chart("steptime", title, text, figure)


def metrics_chart(history: History) -> Chart | None:
    """Evaluation metrics besides the loss."""
    noise = ("eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    names = sorted(
        {key for log in history.logs for key in log if key.startswith("eval_") and key not in noise}
    )
    found = [(name, _logged(history.logs, name)) for name in names]
    found = [(name, points) for name, points in found if points][:MOST_METRICS]
    if not found:
        return None
    traces = []
    for number, (name, points) in enumerate(found):
        shown = safe(name.removeprefix("eval_"), 40)
        style = {"color": COLOURS[number % len(COLOURS)]}
        trace = _line(_thin(points), f"{shown} %{{y:.5g}}")
        traces.append({**trace, "mode": "lines+markers", "line": style, "marker": style, "name": shown})
    title = "Evaluations: " + ", ".join(
        f"{clean(name)[5:45]} {points[-1][1]:.4g}" for name, points in found[:3]
    )
    return Chart("metrics", title, "Last reported values.", _by_step(traces, "", history))


def _by_step(traces: list[dict[str, Any]], title: str, history: History, **y: Any) -> dict[str, Any]:
    """A figure with a dashed line where an attempt resumed, and a band over the steps that were redone."""
    shapes: list[dict[str, Any]] = []
    across = {"yref": "paper", "y0": 0, "y1": 1}
    for before, info in list(zip(history.attempts, history.attempts[1:], strict=False))[-MOST_ROWS:]:
        if info.resumed_from is None:
            continue
        line = {"width": 1, "dash": "dash", "color": colour(info.number)}
        ends = {"x0": info.first_step, "x1": info.first_step}
        shapes.append({"type": "line", **ends, **across, "line": line, "opacity": 0.5})
        if before.redone_steps and before.last_step > info.first_step:
            band = {"x0": info.first_step, "x1": before.last_step, "fillcolor": LOST, "opacity": 0.12}
            shapes.append({"type": "rect", **band, **across, "line": {"width": 0}, "layer": "below"})
    x = {"title": "step", "tickformat": ",d"}
    return new_figure(traces, x, {"title": title, **y}, shapes=shapes)


def _logged(logs: Iterable[dict[str, Any]], name: str) -> list[Point]:
    found = []
    for log in logs:
        value = log.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
            found.append((float(log["step"]), float(value), int(log["attempt"])))
    return found


def _curves(
    points: list[Point], name: str, label: str, *, lost: bool = False, smoothing: float = 0.0
) -> Iterator[dict[str, Any]]:
    """One line for all attempts of a colour, interrupted between two attempts; a smoothed one is drawn over its values."""
    if smoothing:
        for trace in _curves(points, name, label):
            yield {**trace, "opacity": 0.25, "showlegend": False}
        points = _smooth(points, smoothing)
        label += " (smoothed)"
    by_attempt: dict[int, list[Point]] = {}
    for point in points:
        by_attempt.setdefault(point[2], []).append(point)
    numbers = sorted(by_attempt)
    for index, drawn in enumerate(dict.fromkeys(map(colour, numbers))):
        mine = [number for number in numbers if colour(number) == drawn]
        joined: list[Point | None] = []
        for number in mine:
            joined += [*_thin(by_attempt[number], max(40, MOST_POINTS // len(numbers))), None]
        # A line needs two points: a single one needs a marker.
        single = any(len(by_attempt[number]) == 1 for number in mine)
        style = {"color": drawn, "width": 2, "dash": "dot" if lost else "solid"}
        yield {
            **_line(joined, label),
            "mode": "lines+markers" if lost or single else "lines",
            "line": style,
            "marker": {"size": 4, "color": drawn, "symbol": "circle-open" if lost else "circle"},
            "opacity": 0.75 if lost else 1.0,
            "name": name if lost else f"attempt {mine[0]}" + (" …" if len(mine) > 1 else ""),
            "showlegend": index == 0 if lost else len(numbers) > 1,
        }


def _line(points: Sequence[Point | None], label: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "x": [None if point is None else point[0] for point in points],
        "y": [None if point is None else float(f"{point[1]:.6g}") for point in points],
        "customdata": [None if point is None else point[2] for point in points],
        "hovertemplate": f"step %{{x:,d}}<br>{label}<br>attempt %{{customdata}}<extra></extra>",
        "connectgaps": False,
    }


def _thin(points: list[Point], most: int = MOST_POINTS) -> list[Point]:
    """The lowest and the highest point of each interval, so that peaks stay visible."""
    if len(points) <= most:
        return points
    size = _interval(len(points), most // 2)
    kept: list[Point] = []

    def height(index: int) -> float:
        return points[index][1]

    for start in range(0, len(points), size):
        interval = range(start, min(start + size, len(points)))
        kept += [points[index] for index in sorted({min(interval, key=height), max(interval, key=height)})]
    return kept


def _interval(count: int, most: int) -> int:
    """Points of one interval. A power of two, so that while a run grows its old intervals stay, and only new points are sent."""
    return 1 << max(0, math.ceil(math.log2(count / most))) if count > most else 1


def _smooth(points: list[Point], weight: float) -> list[Point]:
    """Exponential means of each attempt, unbiased at its begin as in Adam (https://arxiv.org/abs/1412.6980)."""
    sums: dict[int, tuple[float, float]] = {}
    smoothed = []
    for x, y, number in points:
        total, norm = sums.get(number, (0.0, 0.0))
        total, norm = weight * total + (1 - weight) * y, weight * norm + (1 - weight)
        sums[number] = total, norm
        smoothed.append((x, total / norm, number))
    return smoothed


def _lost_text(history: History) -> str:
    lost = sum(info.redone_steps for info in history.attempts)
    bound = "At least " if history.is_redone_bound else ""
    if not lost:
        return "A killed attempt may have done steps that were redone." if bound else "No step was redone."
    return f"{bound}{count_text(lost, 'step')} {'was' if lost == 1 else 'were'} redone after a restart: the bands mark them."


def compared_curves(key: str, runs: Sequence[tuple[str, History]], smoothing: float = 0.0) -> Chart | None:
    """One metric of several runs by step, a colour for each run, without redone steps."""
    traces: list[dict[str, Any]] = []
    lasts = []
    for index, (name, history) in enumerate(runs):
        points: list[Point] = _logged(history.logs, key)
        if not points:
            continue
        shown, line = safe(name, 80), {"color": COLOURS[index % len(COLOURS)], "width": 2}
        label = f"{shown}: {safe(key, 40)} %{{y:.5g}}"
        style = {"mode": "lines+markers" if len(points) < 40 else "lines", "line": line, "name": shown}
        style |= {"marker": {"size": 5, "color": line["color"]}}
        if smoothing:
            traces.append({**_line(_thin(points), label), **style, "opacity": 0.25, "showlegend": False})
            points = _smooth([(x, y, 0) for x, y, _ in points], smoothing)
        traces.append({**_line(_thin(points), label), **style})
        lasts.append(f"{clean(name)[:40]} {points[-1][1]:.4g}")
    if not traces:
        return None
    words = clean(key)[:60].replace("_", " ")
    figure = new_figure(traces, {"title": "step", "tickformat": ",d"}, {"title": safe(words)})
    # Two metrics may differ in a digit only, or have no letter of ASCII.
    chart = f"c{hashlib.sha256(key.encode(errors='replace')).hexdigest()[:16]}"
    title = f"{words.capitalize()}: {', '.join(lasts[:4])}"
    return Chart(chart, title, "Last values.", figure, 340, wide=key == "loss")
