"""All charts of the page, in their order."""

from __future__ import annotations

from dataclasses import replace

from hf_cloudtrain.report.curves import (
    grad_norm_chart,
    learning_rate_chart,
    loss_chart,
    metrics_chart,
    step_time_chart,
    throughput_chart,
)
from hf_cloudtrain.report.figure import Chart
from hf_cloudtrain.report.timeline import commit_chart, time_chart, timeline
from hf_cloudtrain.tracking.history import History


def charts_of(history: History, smoothing: float = 0.0) -> list[Chart]:
    """The charts of a run that have data.

    Args:
        history: the run.
        smoothing: weight of the past in an exponential mean, 0 to 0.999, that is drawn over the values of noisy curves.
    """
    candidates = (
        loss_chart(history, smoothing),
        timeline(history),
        time_chart(history),
        learning_rate_chart(history),
        grad_norm_chart(history, smoothing),
        step_time_chart(history, smoothing),
        throughput_chart(history),
        commit_chart(history),
        metrics_chart(history),
    )
    charts = [chart for chart in candidates if chart is not None]
    narrow = [chart for chart in charts if not chart.wide]
    if len(narrow) % 2:  # the last one would be alone in its row
        charts[charts.index(narrow[-1])] = replace(narrow[-1], wide=True)
    return charts
