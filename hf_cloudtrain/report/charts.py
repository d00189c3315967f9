"""All charts of the page, in their order."""

from __future__ import annotations

from dataclasses import replace

from hf_cloudtrain.report.curves import learning_rate_chart, loss_chart, metrics_chart, step_time_chart
from hf_cloudtrain.report.figure import Chart
from hf_cloudtrain.report.timeline import commit_chart, time_chart, timeline
from hf_cloudtrain.tracking.history import History


def charts_of(history: History) -> list[Chart]:
    """The charts of a run that have data."""
    candidates = (
        loss_chart(history),
        timeline(history),
        time_chart(history),
        learning_rate_chart(history),
        step_time_chart(history),
        commit_chart(history),
        metrics_chart(history),
    )
    charts = [chart for chart in candidates if chart is not None]
    narrow = [chart for chart in charts if not chart.wide]
    if len(narrow) % 2:  # the last one would be alone in its row
        charts[charts.index(narrow[-1])] = replace(narrow[-1], wide=True)
    return charts
