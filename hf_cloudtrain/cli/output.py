"""What the commands print: results go to stdout, messages to stderr, and control characters never reach a terminal.

`tables.py` lays out tables and facts.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from hf_cloudtrain.cli import tables
from hf_cloudtrain.cli.tables import Columns
from hf_cloudtrain.errors import CloudTrainError
from hf_cloudtrain.runtime.progress import Bar, Progress
from hf_cloudtrain.runtime.text import clean, duration_text
from hf_cloudtrain.runtime.values import finite

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDE = 100_000
"""More columns than any tree needs."""


def say(text: object) -> None:
    """Write a message to stderr; on a terminal, lines end between words and outside of commands."""
    message = clean(text)
    if sys.stderr.isatty():
        message = tables.message(message, shutil.get_terminal_size().columns)
    typer.echo(message, err=True)


def fail(text: object) -> NoReturn:
    """Write an error message to stderr and exit with code 1."""
    say(f"Error: {text}")
    raise typer.Exit(1)


def confirm(question: str, yes: bool) -> None:
    """Ask before something is deleted; exit unless the answer is yes."""
    if yes:
        return
    if not sys.stdin.isatty():
        fail("Nothing was deleted: stdin is not a terminal, so nothing can be asked. Pass --yes to delete.")
    if not typer.confirm(clean(question), err=True):
        fail("Nothing was deleted.")


def print_json(record: dict[str, Any], *, line: bool = False) -> None:
    """Print a JSON object to stdout, in ASCII; NaN and infinities become null.

    Args:
        line: on one line, for commands that print several objects.
    """
    typer.echo(json.dumps(finite(record), indent=None if line else 2, allow_nan=False))


def show_table(
    columns: Columns, records: Iterable[Any], *, spare: Sequence[str] = (), prose: str | None = None
) -> None:
    """Print a table to stdout, one row a record. None and "" are empty cells.

    Args:
        spare: headings that are left out on a narrow terminal, the first one first.
        prose: the heading of the column whose text is wrapped there.

    Example:
        >>> show_table({"job": lambda job: job.id, ">starts": lambda job: len(job.starts)}, jobs, spare=["starts"])
    """
    width = tables.terminal_width()
    layout = tables.table(columns, records, width, spare, prose)
    typer.echo("\n".join([typer.style(layout.heading, bold=True), *layout.rows]))
    if layout.left_out:
        say(f"Not shown in {width} columns: {', '.join(layout.left_out)}. --json shows all.")


def show_facts(facts: Mapping[str, object]) -> None:
    """Print names and values to stdout; values that are None are left out."""
    lines = tables.facts(facts, tables.terminal_width())
    typer.echo("\n".join(f"{typer.style(name, bold=True)}{rest}" for name, rest in lines))


def show(renderable: RenderableType) -> None:
    """Print a rich object to stdout. Its texts must be `Text`: rich reads a plain string as markup."""
    from rich.console import Console

    # The encoding of stdout tells rich whether it may draw a tree with more than ASCII.
    page = io.TextIOWrapper(io.BytesIO(), sys.stdout.encoding or "utf-8", errors="backslashreplace")
    terminal = sys.stdout.isatty()
    Console(file=page, force_terminal=terminal, width=WIDE, markup=False, emoji=False, highlight=False).print(
        renderable
    )
    page.seek(0)
    typer.echo("\n".join(line.rstrip() for line in page.read().split("\n")[:-1]))


@contextlib.contextmanager
def transfer(title: str = "", size: int = 0) -> Iterator[Progress]:
    """Count the bytes of a transfer, with a bar on a terminal; Ctrl-C also stops the threads that move them."""
    progress = _Stoppable()
    progress.begin(title, size)

    def stop(number: int, frame: FrameType | None) -> None:
        progress.stopped = True
        signal.default_int_handler(number, frame)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        with Bar(progress, hidden=not sys.stderr.isatty()):
            yield progress
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def warnings_shown() -> Iterator[None]:
    """Write the library's warnings and errors to stderr like the command's own messages."""
    logger = logging.getLogger("hf_cloudtrain")
    handler = _Messages(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def messages_hidden(below: int) -> Iterator[None]:
    """Drop the library's messages below a level: what looks at a run again and again would warn of a damaged record each time."""
    logger = logging.getLogger("hf_cloudtrain")
    level = logger.level
    logger.setLevel(below)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Messages(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.capitalize()}: {record.getMessage()}")


class _StoppedError(CloudTrainError):
    """Ctrl-C was pressed; raised in the threads of a transfer, which no signal reaches."""


class _Stoppable(Progress):
    def __init__(self) -> None:
        super().__init__()
        self.stopped = False

    def add(self, count: int) -> None:
        if self.stopped and count > 0:
            raise _StoppedError("Stopped.")
        super().add(count)


def of_total(step: int | None, total: int | None, *, percent: bool = False) -> str | None:
    """A step and where it ends: '120/900 (13%)'."""
    if step is None or not total:
        return None if step is None else str(step)
    return f"{step}/{total}" + (f" ({step / total:.0%})" if percent else "")


def rate_text(record: Mapping[str, Any]) -> str | None:
    """How fast a run trains, from its `step_seconds`, `samples_per_second` and `tokens_per_second`."""
    parts = [
        record["step_seconds"] and f"{duration_text(record['step_seconds'])} per step",
        record["samples_per_second"] and f"{record['samples_per_second']:.4g} samples/s",
        record["tokens_per_second"] and f"{record['tokens_per_second']:.4g} tokens/s",
    ]
    return ", ".join(part for part in parts if part) or None


def loss_text(loss: float | None, loss_step: int | None, step: int | None) -> str | None:
    """A loss, and the step that reported it where that is not the step shown beside it: '0.25 (step 40)', 'not finite (nan)'."""
    if loss is None:
        return None
    shown = f"{loss:.6g}" if math.isfinite(loss) else f"not finite ({loss})"
    return shown if loss_step in (None, step) else f"{shown} (step {loss_step})"


def at_least(text: str | None, is_bound: bool) -> str | None:
    """A value that may be higher: 'at least 70 steps'."""
    return f"at least {text}" if is_bound and text is not None else text


def format_or_none(value: float | None, spec: str) -> str | None:
    """A number in a format, None where there is none."""
    return None if value is None else format(value, spec)


def _text(cell: object, style: str = "") -> Any:
    from rich.text import Text

    return Text("" if cell is None else clean(cell), style=style)


def _parents(path: str) -> Iterator[str]:
    """'a/b/c' -> 'a', 'a/b'."""
    parts = path.split("/")
    for end in range(1, len(parts)):
        yield "/".join(parts[:end])
