"""`run watch`: follow a run until it is over, as a live picture on a terminal and as a line for each change elsewhere.

It only reads. `tracking/watcher.py` decides when the run is over. Ctrl-C ends the watching, not the run.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.titles import Titles
from hf_cloudtrain.cli import status, tables
from hf_cloudtrain.cli.curve import curve
from hf_cloudtrain.cli.output import (
    at_least,
    format_or_none,
    loss_text,
    messages_hidden,
    of_total,
    print_json,
    rate_text,
    say,
)
from hf_cloudtrain.cli.tables import Columns
from hf_cloudtrain.runtime.text import clean, duration_text, time_text
from hf_cloudtrain.tracking.status import RunState
from hf_cloudtrain.tracking.watcher import View, Watcher

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

CURVE_LINES = 5
WIDEST = 120
"""Columns of the curve on a wide terminal: it has only as many points as losses are kept."""
MOST_ATTEMPTS = 8
"""Attempts in the table: the newest."""
ATTEMPTS: Columns = {
    name: cell for name, cell in status.ATTEMPTS.items() if name not in ("ran", "resumed from")
}
"""The table of attempts."""


class _Waiting:
    """Whether a new attempt will follow; says once what is waited for."""

    def __init__(self, awaited: Callable[[], str | None]) -> None:
        self.tell: Callable[[str], object] = say
        self._awaited = awaited
        self._is_told = False

    def __call__(self) -> bool:
        what = self._awaited()
        if what is not None and not self._is_told:
            self._is_told = True
            self.tell(f"{what}; waiting for training to begin. Ctrl-C leaves it alone.")
        return what is not None


def watch(catalog: Catalog, *, as_json: bool, awaited: Callable[[], str | None] = lambda: None) -> RunState:
    """Watch until the run is over; its last state.

    Args:
        awaited: what may begin a new attempt, as the beginning of a sentence; None if nothing will.
    """
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    waiting = _Waiting(awaited)
    watcher = Watcher(catalog, waiting)
    with messages_hidden(logging.CRITICAL):
        if as_json or not console.is_terminal or console.is_dumb_terminal:
            return _print_changes(watcher, Titles(catalog), as_json)
        return _draw(watcher, Titles(catalog), console, waiting)


def _print_changes(watcher: Watcher, titles: Titles, as_json: bool) -> RunState:
    shown: View | None = None
    for view in watcher.views():
        if not view.same_but_time(shown):
            if as_json:
                print_json(view.record(), line=True)
            else:
                typer.echo(clean(_line(view, titles)))
            sys.stdout.flush()  # the reader of a pipe waits for this line
            shown = view
    return watcher.view.state


def _draw(watcher: Watcher, titles: Titles, console: Console, waiting: _Waiting) -> RunState:
    from rich.live import Live

    ascii_only = console.options.ascii_only
    with Live(console=console, auto_refresh=False) as live:
        waiting.tell = lambda text: live.console.print(clean(text))  # above the picture, and not into it
        for view in watcher.views():
            shown = picture(view, titles, console.width, ascii_only=ascii_only)
            live.update(shown, refresh=True)
    return watcher.view.state


def picture(view: View, titles: Titles, width: int, *, ascii_only: bool = False) -> RenderableType:
    """What a terminal of `width` columns shows."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    now = view.state
    head = Text.assemble(
        (clean(now.run_url), "bold"),
        "\n",
        (clean(now.state), _style(now)),
        f"  attempt {now.attempt}, {_heartbeat(now)}",
    )
    parts: list[RenderableType] = [head]
    if view.trouble:
        parts.append(Text(f"Cannot read the run: {clean(view.trouble)}", style="yellow"))
    elif now.stalled:
        parts.append(Text(f"Stalled, {now.stalled}", style="yellow"))
    if now.step is not None:
        bar = Table.grid(padding=(0, 2, 0, 0))
        steps = Text(str(of_total(now.step, now.total_steps, percent=True)), style="bold")
        done = (
            [ProgressBar(now.total_steps, min(now.step, now.total_steps), width=40)]
            if now.total_steps
            else []
        )
        bar.add_row(*done, steps)
        parts.append(bar)
    parts += [Text.assemble((name, "bold"), rest) for name, rest in tables.facts(_facts(view, titles), width)]
    losses = [loss for _, loss in view.losses]
    lines = curve(losses, min(width, WIDEST), CURVE_LINES, ascii_only=ascii_only)
    if len(view.losses) > 1:
        parts += [Text(), Text("\n".join(lines), style="cyan"), Text(_range(view.losses), style="dim")]
    layout = tables.table(ATTEMPTS, _attempts(view), width, status.SPARE)
    parts += [Text(), Text(layout.heading, style="bold"), *map(Text, layout.rows)]
    return Group(*parts)


def _facts(view: View, titles: Titles) -> dict[str, str | None]:
    now = view.state
    committed = now.last_committed and titles.of(now.last_committed)
    lag = "{}, {} after its save"
    return {
        "rate": rate_text(vars(now)),
        "eta": duration_text(now.eta_seconds),
        "loss": loss_text(now.loss, now.loss_step, now.step),
        "learning rate": format_or_none(now.learning_rate, ".3g"),
        "last committed": _with_time(committed, lag, now.commit_lag_seconds) or "none yet",
        "uploading": _with_time(_of_step(now.uploading), "{}, for {}", now.uploading_seconds),
        "goodput": at_least(format_or_none(view.goodput, ".1%"), view.is_goodput_bound),
        "+": status.killed_text(_attempts(view)),
    }


def _attempts(view: View) -> list[dict[str, Any]]:
    """The newest attempts; the last one as its heartbeat has it, which is newer than the records of its steps."""
    now = view.state
    records = status.attempt_records(view.attempts)[-MOST_ATTEMPTS:]
    for record in records:
        if record["number"] == now.attempt:
            record |= {
                "state": now.state,
                "last_step": max(record["last_step"], now.step or 0),
                "was_killed": now.state == "killed",
            }
    return records


def _line(view: View, titles: Titles) -> str:
    """One line for a log."""
    now = view.state
    parts = [f"{time_text(time.time())}  attempt {now.attempt} {now.state}"]
    if now.step is not None:
        parts.append(f"step {of_total(now.step, now.total_steps, percent=True)}")
    if now.loss is not None:
        parts.append(f"loss {loss_text(now.loss, now.loss_step, now.step)}")
    if eta := duration_text(now.eta_seconds):
        parts.append(f"eta {eta}")
    committed = "none yet" if now.last_committed is None else titles.of(now.last_committed)
    parts.append(f"last committed {committed}")
    if now.stalled:
        parts.append(f"stalled, {now.stalled}")
    if view.trouble:
        parts.append(f"cannot read the run: {view.trouble}")
    return ", ".join(parts)


def _style(now: RunState) -> str:
    if now.stalled or now.state in ("failed", "overtaken"):
        return "bold red"
    return "bold green" if now.state in ("finished", "training") else "bold"


def _heartbeat(now: RunState) -> str:
    age = duration_text(now.heartbeat_age_seconds)
    if age is None:
        return "no heartbeat yet"
    return f"ended {age} ago" if now.is_over else f"heartbeat {age} ago"


def _with_time(title: str | None, text: str, seconds: float | None) -> str | None:
    """A checkpoint as people call it, with a span of time where it is known."""
    span = duration_text(seconds)
    return text.format(title, span) if title and span else title


def _of_step(key: str | None) -> str | None:
    """A checkpoint that is not committed yet, so that its folder is not known."""
    found = None if key is None else CheckpointKey.named(key)
    return f"checkpoint-{found.step}" if found else key


def _range(losses: list[tuple[int, float]]) -> str:
    (first, begin), (last, end) = losses[0], losses[-1]
    return f"loss {begin:.4g} at step {first} to {end:.4g} at step {last}"
