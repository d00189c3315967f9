"""Watching a run until it is over: a picture that moves on a terminal, a line for each change anywhere else.

It only reads: two listings and a small record every few seconds, and the records of all steps anew when another attempt
has begun or a checkpoint was committed. Trouble with the storage is said, and looked over; Ctrl-C ends the watching alone.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import typer

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import parse_checkpoint_key
from hf_cloudtrain.cli.curve import curve
from hf_cloudtrain.cli.output import print_json
from hf_cloudtrain.errors import CloudTrainError
from hf_cloudtrain.runtime.text import clean, duration_text, time_text
from hf_cloudtrain.tracking.history import AttemptInfo, history_of
from hf_cloudtrain.tracking.status import RunState, run_state, state_of

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

LOOK_SECONDS = 2.0
"""Between two looks; a heartbeat comes every 15 s."""
MOST_LOSSES = 20_000
"""Losses that are remembered; a curve has some hundred places."""
CURVE = (48, 5)
"""Letters and lines of the curve."""
LAST = ("finished", "overtaken")
"""States after which no attempt comes, whatever the job does still."""
MOST_ATTEMPTS = 8
"""Attempts in the table: the newest."""


@dataclass
class View:
    """What a watcher knows."""

    state: RunState
    attempts: list[AttemptInfo]
    losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss), ascending."""
    goodput: float | None = None
    trouble: str | None = None
    """Why the last look failed."""

    def same_but_time(self, other: View | None) -> bool:
        """Whether nothing has happened between the two."""
        return other is not None and self._what() == other._what()

    def _what(self) -> tuple[Any, ...]:
        now = self.state
        return (
            now.state,
            now.attempt,
            now.step,
            now.last_committed,
            now.uploading,
            self.trouble,
            bool(now.stalled),
        )

    def record(self) -> dict[str, Any]:
        """What `--json` says."""
        return {**self.state.record(), "goodput": self.goodput, "trouble": self.trouble}


class Watcher:
    """Looks at one run, again and again; before its first attempt and between two of them as long as one is awaited.

    Args:
        is_awaited: whether another attempt will come.

    Example:
        >>> for view in Watcher(catalog).views():
        ...     print(view.state.step)
    """

    def __init__(self, catalog: Catalog, is_awaited: Callable[[], bool] = bool) -> None:
        self._catalog = catalog
        self._is_awaited = is_awaited
        while not catalog.attempts.numbers() and is_awaited():
            wait()
        catalog.attempts.check_any()
        self._view = self._whole(run_state(catalog))

    def views(self) -> Iterator[View]:
        """One view every `LOOK_SECONDS`; the last one is of a run that is over."""
        while True:
            yield self._view
            now = self._view.state
            if now.is_over and self._view.trouble is None and (now.state in LAST or not self._is_awaited()):
                return
            wait()
            self._view = self._look()

    def _look(self) -> View:
        before = self._view
        try:
            now = run_state(self._catalog)
            known = before.state
            if now.is_over or (now.attempt, now.last_committed) != (known.attempt, known.last_committed):
                return self._whole(now)
        except CloudTrainError as error:  # no answer, or a record that is damaged
            return replace(before, trouble=str(error))
        losses = before.losses
        if now.loss is not None and now.step is not None and (not losses or losses[-1][0] < now.step):
            losses = [*losses, (now.step, now.loss)][-MOST_LOSSES:]
        return View(now, before.attempts, losses, before.goodput)

    def _whole(self, now: RunState) -> View:
        """With what only the records of all steps tell."""
        history = history_of(self._catalog)
        losses = [
            (int(log["step"]), float(log["loss"]))
            for log in history.logs
            if isinstance(log.get("loss"), (int, float)) and abs(log["loss"]) < 1e300
        ]
        return View(now, history.attempts, losses[-MOST_LOSSES:], history.goodput)


def wait() -> None:
    """Until it is time to look again."""
    time.sleep(LOOK_SECONDS)


def watch(catalog: Catalog, *, as_json: bool, is_awaited: Callable[[], bool] = bool) -> RunState:
    """Watch until the run is over; how it ended. For `is_awaited` see `Watcher`."""
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    watcher = Watcher(catalog, is_awaited)
    with _words_of_records_held():
        if as_json or not console.is_terminal or console.is_dumb_terminal:
            return _print_changes(watcher, as_json)
        return _draw(watcher, console)


@contextlib.contextmanager
def _words_of_records_held() -> Iterator[None]:
    """The first look has said what is damaged: every later one would say it again, into the picture."""
    logger = logging.getLogger("hf_cloudtrain")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _print_changes(watcher: Watcher, as_json: bool) -> RunState:
    shown: View | None = None
    for view in watcher.views():
        if not view.same_but_time(shown):
            if as_json:
                print_json(view.record(), line=True)
            else:
                typer.echo(clean(_line(view)))
            sys.stdout.flush()  # whoever reads a pipe waits for it
            shown = view
    assert shown is not None
    return shown.state


def _draw(watcher: Watcher, console: Console) -> RunState:
    from rich.live import Live

    view: View | None = None
    ascii_only = console.options.ascii_only
    with Live(console=console, auto_refresh=False) as live:
        for view in watcher.views():
            live.update(picture(view, ascii_only=ascii_only), refresh=True)
    assert view is not None
    return view.state


def picture(view: View, *, ascii_only: bool = False) -> RenderableType:
    """What a terminal shows."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    now = view.state
    head = Text.assemble(
        (clean(now.run_url), "bold"),
        "\n",
        (clean(now.state), _style(now)),
        f"  attempt {now.attempt}, {_heart(now)}",
    )
    parts: list[RenderableType] = [head]
    if view.trouble:
        parts.append(Text(f"Cannot look: {clean(view.trouble)}", style="yellow"))
    elif now.stalled:
        parts.append(Text(f"Stalled, {now.stalled}", style="yellow"))
    if now.step is not None:
        bar = Table.grid(padding=(0, 2, 0, 0))
        words = Text(_steps(now), style="bold")
        if now.total_steps:
            bar.add_row(ProgressBar(max(1, now.total_steps), min(now.step, now.total_steps), width=40), words)
        else:
            bar.add_row(words)
        parts.append(bar)
    facts = Table.grid(padding=(0, 2, 0, 0))
    for name, value in _facts(view):
        facts.add_row(Text(name, style="bold"), Text(clean(value)))
    parts.append(facts)
    lines = curve([loss for _, loss in view.losses], *CURVE, ascii_only=ascii_only)
    if len(view.losses) > 1:
        parts += [Text(), Text("\n".join(lines), style="cyan"), Text(_range(view.losses), style="dim")]
    parts += [Text(), _attempts(view)]
    return Group(*parts)


def _facts(view: View) -> list[tuple[str, str]]:
    now = view.state
    found = [
        ("rate", _rate(now)),
        ("eta", duration_text(now.eta_seconds)),
        ("loss", None if now.loss is None else f"{now.loss:.6g}"),
        ("learning rate", None if now.learning_rate is None else f"{now.learning_rate:.3g}"),
        ("last committed", _committed(now)),
        ("uploading", _uploading(now)),
        ("goodput", None if view.goodput is None else f"{view.goodput:.1%}"),
    ]
    return [(name, value) for name, value in found if value]


def _attempts(view: View) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("attempt", "state", "started", "steps", "done again", "host"):
        table.add_column(
            column, justify="right" if column in ("attempt", "done again") else "left", no_wrap=True
        )
    for info in view.attempts[-MOST_ATTEMPTS:]:
        newest = info.number == view.state.attempt
        state = view.state.state if newest else state_of(info.state, info.last_seen, newest=False)
        last = max(info.last_step, view.state.step or 0) if newest else info.last_step
        row = (
            *(info.number, state, time_text(info.started), f"{info.first_step} to {last}", info.redone_steps),
            info.facts.get("host", ""),
        )
        table.add_row(*(Text(clean(cell)) for cell in row))
    return table


def _line(view: View) -> str:
    """One line for a log."""
    now = view.state
    parts = [f"{time_text(time.time())}  attempt {now.attempt} {now.state}"]
    if now.step is not None:
        parts.append(f"step {_steps(now)}")
    if now.loss is not None:
        parts.append(f"loss {now.loss:.6g}")
    if eta := duration_text(now.eta_seconds):
        parts.append(f"eta {eta}")
    parts.append(f"last committed {now.last_committed or 'nothing yet'}")
    if now.stalled:
        parts.append(f"stalled, {now.stalled}")
    if view.trouble:
        parts.append(f"cannot look: {view.trouble}")
    return ", ".join(parts)


def _style(now: RunState) -> str:
    if now.stalled or now.state in ("failed", "overtaken"):
        return "bold red"
    return "bold green" if now.state in ("finished", "training") else "bold"


def _heart(now: RunState) -> str:
    age = duration_text(now.heartbeat_age_seconds)
    if age is None:
        return "no heartbeat yet"
    return f"ended {age} ago" if now.is_over else f"heartbeat {age} ago"


def _steps(now: RunState) -> str:
    if not now.total_steps or now.step is None:
        return f"{now.step}"
    return f"{now.step}/{now.total_steps} ({now.step / now.total_steps:.0%})"


def _rate(now: RunState) -> str | None:
    parts = [
        now.step_seconds and f"{duration_text(now.step_seconds)} a step",
        now.samples_per_second and f"{now.samples_per_second:.4g} samples/s",
        now.tokens_per_second and f"{now.tokens_per_second:.4g} tokens/s",
    ]
    return ", ".join(part for part in parts if part) or None


def _committed(now: RunState) -> str:
    if now.last_committed is None:
        return "nothing yet"
    lag = duration_text(now.commit_lag_seconds)
    return f"{_title(now.last_committed)}, {lag} after its save" if lag else _title(now.last_committed)


def _uploading(now: RunState) -> str | None:
    if now.uploading is None:
        return None
    since = duration_text(now.uploading_seconds)
    return f"{_title(now.uploading)}, for {since}" if since else _title(now.uploading)


def _title(key: str) -> str:
    found = parse_checkpoint_key(key)
    return f"checkpoint-{found[1]} (attempt {found[0]})" if found else key


def _range(losses: list[tuple[int, float]]) -> str:
    (first, begin), (last, end) = losses[0], losses[-1]
    return f"loss {begin:.4g} at step {first} to {end:.4g} at step {last}"
