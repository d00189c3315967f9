"""Several runs side by side: their curves on one axis, the arguments in which they differ, their last metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_cloudtrain.report.curves import compared_curves
from hf_cloudtrain.report.figure import COLOURS
from hf_cloudtrain.report.page import Report, Table, render, shown, write_file
from hf_cloudtrain.runtime.redaction import secrets_of_environment
from hf_cloudtrain.runtime.values import number

MOST_CHARTS = 12
MOST_ROWS = 200
NOISE = ("pid", "created", "nonce", "global_step", "epoch", "samples_seen", "output_dir")
"""Facts that differ between any two runs, or that say how far one came."""


@dataclass(frozen=True)
class Compared:
    """One of the runs."""

    url: str
    report: Report

    @property
    def name(self) -> str:
        """The last part of its URL."""
        return shown(self.url.rstrip("/").rpartition("/")[2] or self.url, 60)

    @property
    def arguments(self) -> dict[str, Any]:
        """What its newest manifest and attempt record about the training; objects of JSON are taken apart."""
        manifest = next((info.manifest for info in self.report.found if info.manifest), None)
        facts: dict[str, Any] = {**self.report.history.attempts[-1].facts}
        if manifest is not None:
            facts |= {**manifest.origin, **vars(manifest.position)}
        return {name: value for name, value in _flat(facts).items() if name not in NOISE}


def comparison(runs: Sequence[Compared], smoothing: float = 0.0) -> dict[str, Any]:
    """Charts and tables, as `Report.content` has them."""
    names = _distinct([run.name for run in runs])
    logged = {
        key: None
        for run in runs
        for log in run.report.history.logs
        for key in log
        if number(log[key]) is not None
    }
    wanted = ["loss", "eval_loss", "learning_rate", "grad_norm"]
    noise = (
        "step",
        "time",
        "attempt",
        "epoch",
        "eval_runtime",
        "eval_samples_per_second",
        "eval_steps_per_second",
    )
    metrics = [key for key in (*wanted, *sorted(logged)) if key in logged and key not in noise]
    charts = []
    for key in list(dict.fromkeys(metrics))[:MOST_CHARTS]:
        histories = [(name, run.report.history) for name, run in zip(names, runs, strict=True)]
        chart = compared_curves(key, histories, smoothing)
        if chart is not None:
            charts.append(chart.record())
    narrow = [chart for chart in charts if not chart["wide"]]
    if len(narrow) % 2:  # the last one would be alone in its row
        narrow[-1]["wide"] = True
    return {
        "name": " and ".join(names) if len(names) < 4 else f"{len(names)} runs",
        "runs": [
            {
                "name": name,
                "url": shown(run.url),
                "colour": COLOURS[index % len(COLOURS)],
                "state": shown(run.report.state.state, 20),
            }
            for index, (name, run) in enumerate(zip(names, runs, strict=True))
        ],
        "charts": charts,
        "tables": [vars(_last_metrics(names, runs, metrics)), vars(_differences(names, runs))],
    }


def write_comparison(content: dict[str, Any], path: Path) -> int:
    """Write what `comparison` returned as a page of one file; its size in bytes."""
    words = [f"{run['name']}: {run['state']}, {run['url']}" for run in content["runs"]]
    frame = {"state": "", "run_url": "", "notes": words, "key_figures": [], "trackers": []}
    return write_file(path, render({**frame, **content}, "cloudtrain run compare"))


def _last_metrics(names: list[str], runs: Sequence[Compared], metrics: list[str]) -> Table:
    rows: list[tuple[str, list[object]]] = [
        ("state", [run.report.state.state for run in runs]),
        ("step", [f"{run.report.history.attempts[-1].last_step:,}" for run in runs]),
        ("goodput", [run.report.history.goodput_text for run in runs]),
    ]
    for key in dict.fromkeys(metrics):
        values = [
            next(
                (
                    found
                    for log in reversed(run.report.history.logs)
                    if (found := number(log.get(key))) is not None
                ),
                None,
            )
            for run in runs
        ]
        rows.append((key, [None if value is None else f"{value:.6g}" for value in values]))
    return _table("Last values", names, rows[:MOST_ROWS], "number", "")


def _differences(names: list[str], runs: Sequence[Compared]) -> Table:
    arguments = [run.arguments for run in runs]
    keys = dict.fromkeys(key for found in arguments for key in found)
    different = [key for key in keys if any(found.get(key) != arguments[0].get(key) for found in arguments)]
    rows: list[tuple[str, list[object]]] = [
        (key, [found.get(key) for found in arguments]) for key in different
    ]
    text = f"{len(keys) - len(different)} others are the same." if different else "They are the same."
    return _table("Arguments that differ", names, rows[:MOST_ROWS], "text", text)


def _table(title: str, names: list[str], rows: list[tuple[str, list[object]]], kind: str, text: str) -> Table:
    hidden = secrets_of_environment()
    cells: list[list[tuple[str, ...]]] = [
        [
            (shown(key, 60, hidden), ""),
            *((("" if value is None else shown(value, 200, hidden)), kind) for value in values),
        ]
        for key, values in rows
    ]
    return Table(title, cells, [("", ""), *((name, kind) for name in names)], text)


def _flat(facts: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Texts that are JSON objects, such as the arguments of a Trainer, by their own keys."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        inner = value
        if isinstance(value, str) and value[:1] == "{":
            try:
                inner = json.loads(value)
            except (ValueError, RecursionError):
                inner = value
        if isinstance(inner, dict) and above.count(".") < 2:
            found |= _flat(inner, f"{above}{name}.")
        elif inner is not None:
            found[f"{above}{name}"] = inner
    return found


def _distinct(names: list[str]) -> list[str]:
    """Names with a number behind those that occur more than once."""
    return [name if names.count(name) == 1 else f"{name} ({index + 1})" for index, name in enumerate(names)]
