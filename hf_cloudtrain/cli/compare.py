"""`run compare`: several runs side by side, as curves and tables on a terminal, as JSON, and as a page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from hf_cloudtrain.cli import tables
from hf_cloudtrain.cli.curve import overlay
from hf_cloudtrain.cli.output import print_json, say, show_table
from hf_cloudtrain.cli.runs import open_run
from hf_cloudtrain.cli.tables import Columns, terminal_width
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.report.comparison import Compared, comparison, write_comparison
from hf_cloudtrain.report.page import Report
from hf_cloudtrain.runtime.text import clean, size_text
from hf_cloudtrain.runtime.threads import in_threads

LINES = 10
WIDEST = 120
RUNS_AT_ONCE = 4
"""Runs read at the same time; each reads its records in parallel."""
COLOURS = ("blue", "yellow", "green", "magenta", "cyan", "red")
MARKS = "abcdefghijklmnopqrstuvwxyz"
FIRST = ("state", "step", "goodput", "loss", "eval_loss")
"""The columns that are kept longest."""


def compare(runs: Sequence[str], *, output: Path | None, as_json: bool) -> None:
    """See `cloudtrain run compare`."""
    if len(runs) < 2:
        raise ConfigurationError(
            f"Only {runs[0]!r} is named. Name two runs or more: cloudtrain run compare A B"
        )
    (catalogs,) = in_threads(open_run, (list(runs), RUNS_AT_ONCE))
    (reports,) = in_threads(Report, (catalogs, RUNS_AT_ONCE))
    content = comparison(
        [Compared(catalog.storage.url, report) for catalog, report in zip(catalogs, reports, strict=True)]
    )
    size = None if output is None else write_comparison(content, output)
    if as_json:
        print_json({**_record(content), "path": None if output is None else str(output.absolute())})
        return
    _show_curves(content)
    _show_metrics(content)
    _show_differences(content)
    if output is not None and size is not None:
        say(f"Wrote {size_text(size)}. Open the file in a browser.")
        typer.echo(clean(output))


def _record(content: dict[str, Any]) -> dict[str, Any]:
    """For `--json`: by run, in the order in which they were named."""
    metrics, differences = (_cells(table) for table in content["tables"])
    return {
        "runs": [
            {
                "name": run["name"],
                "run_url": run["url"],
                "last": {name: values[index] or None for name, values in metrics.items()},
                "different": {name: values[index] or None for name, values in differences.items()},
            }
            for index, run in enumerate(content["runs"])
        ]
    }


def _cells(table: dict[str, Any]) -> dict[str, list[str]]:
    return {row[0][0]: [text for text, _ in row[1:]] for row in table["rows"]}


def _show_curves(content: dict[str, Any]) -> None:
    """The first chart, which is that of the loss where there is one."""
    from rich.console import Console
    from rich.text import Text

    if not content["charts"]:
        return
    chart = content["charts"][0]
    drawn = [_points(trace) for trace in chart["figure"]["data"]]
    names = [html.unescape(trace["name"]) for trace in chart["figure"]["data"]]
    console = Console(markup=False, emoji=False, highlight=False)
    has_colours = console.is_terminal and console.color_system is not None
    by_colour = has_colours and not console.options.ascii_only and len(drawn) <= len(COLOURS)
    width = min(WIDEST, (terminal_width() or 80))
    lines = overlay(drawn, width, LINES, marks="" if by_colour else MARKS)
    for line in lines:
        shown = Text()
        for mark, number in line:
            shown.append(mark, style=None if number is None or not by_colour else _colour(number))
        shown.rstrip()
        console.print(shown, soft_wrap=True)
    known = [point for points in drawn for point in points]
    heights = sorted(y for _, y in known)
    steps = sorted(x for x, _ in known)
    metric = chart["title"].partition(":")[0].lower()
    span = f"{metric}, {heights[0]:.4g} to {heights[-1]:.4g}, at steps {steps[0]:,.0f} to {steps[-1]:,.0f}"
    console.print(Text(clean(span), style="dim"), soft_wrap=True)
    for number, (name, points) in enumerate(zip(names, drawn, strict=True)):
        mark = "\u2501\u2501" if by_colour else MARKS[number % len(MARKS)]
        last = f"  {points[-1][1]:.4g} at step {points[-1][0]:,.0f}" if points else ""
        console.print(
            Text(f"{mark} ", style=_colour(number) if by_colour else ""),
            clean(name) + last,
            soft_wrap=True,
            sep="",
        )
    typer.echo()


def _points(trace: dict[str, Any]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in zip(trace["x"], trace["y"], strict=True) if x is not None and y is not None]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _show_metrics(content: dict[str, Any]) -> None:
    """A row for each run, because a terminal has more lines than columns."""
    metrics = _cells(content["tables"][0])
    names = [*(name for name in FIRST if name in metrics), *(name for name in metrics if name not in FIRST)]
    columns: dict[str, Any] = {"run": lambda index: content["runs"][index]["name"]}
    for name in names:
        columns[name if name == "state" else f">{name}"] = lambda index, name=name: metrics[name][index]
    rows = list(range(len(content["runs"])))
    show_table(columns, rows, spare=[name for name in reversed(names) if name not in FIRST[:2]])


def _show_differences(content: dict[str, Any]) -> None:
    """A column for each run where the terminal has room, else a line for each value."""
    table, runs = content["tables"][1], content["runs"]
    differences = _cells(table)
    typer.echo()
    if not differences:
        say("No argument differs.")
        return
    columns: Columns = {
        "different": lambda row: row[0],
        **{run["name"]: lambda row, index=index: row[1][index] for index, run in enumerate(runs)},  # type: ignore[misc]
    }
    width = terminal_width()
    layout = tables.table(columns, list(differences.items()), None)
    if width is None or max(map(len, (layout.heading, *layout.rows))) <= width:
        show_table(columns, list(differences.items()))
    else:
        for name, values in differences.items():
            typer.echo(clean(name))
            shown = {f"  {run['name']}": value for run, value in zip(runs, values, strict=True)}
            for label, rest in tables.facts(shown, width):
                typer.echo(f"{label}{rest}")
    say(table["text"])
