"""Data to stdout, words to stderr, and nothing that came from storage reaches a terminal as it is.

Tables are as wide as they need, in a pipe and on a terminal: a name that is folded or cut cannot be copied.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import signal
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from hf_cloudtrain.errors import CloudTrainError
from hf_cloudtrain.runtime.progress import Bar, Progress
from hf_cloudtrain.runtime.text import clean, size_text

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDE = 100_000
"""Columns that no table needs."""


def say(text: object) -> None:
    """A sentence for the person, on stderr."""
    typer.echo(clean(text), err=True)


def fail(text: object) -> NoReturn:
    """End with exit code 1 and one sentence."""
    say(f"Error: {text}")
    raise typer.Exit(1)


def confirm(question: str, yes: bool) -> None:
    """Ask before something is deleted; ends the command unless the answer is yes."""
    if yes:
        return
    if not sys.stdin.isatty():
        fail("Nothing was deleted: there is no terminal to ask on. Pass --yes to delete without a question.")
    if not typer.confirm(clean(question), err=True):
        fail("Nothing was deleted.")


def print_json(record: dict[str, Any], *, line: bool = False) -> None:
    """One JSON object on stdout, in ASCII; a number that JSON has no word for becomes null.

    Args:
        line: on one line, because another one follows.
    """
    typer.echo(json.dumps(_finite(record), indent=None if line else 2, allow_nan=False))


def show_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], numbers: Collection[str] = ()
) -> None:
    """A table on stdout; the columns in `numbers` are set to the right. None and "" show as nothing."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text("" if cell is None else clean(cell)) for cell in row))
    show(table)


def show_facts(facts: dict[str, object]) -> None:
    """Names and values on stdout, without the values that are None."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    for name, value in facts.items():
        if value is not None:
            table.add_row(Text(clean(name), style="bold"), Text(clean(value)))
    show(table)


def show_tree(title: str, files: Iterable[tuple[str, int]]) -> None:
    """A tree of ('/'-separated path, size in bytes) on stdout; a folder shows the size of what is below it."""
    from rich.text import Text
    from rich.tree import Tree

    files = sorted(files)
    sizes: dict[str, int] = {}
    for path, size in files:
        for folder in _parents(path):
            sizes[folder] = sizes.get(folder, 0) + size
    branches = {"": Tree(Text(f"{clean(title)}/  {size_text(sum(size for _, size in files))}"))}
    for path, size in files:
        for folder in _parents(path):
            if folder not in branches:
                above, _, name = folder.rpartition("/")
                branches[folder] = branches[above].add(Text(f"{clean(name)}/  {size_text(sizes[folder])}"))
        above, _, name = path.rpartition("/")
        branches[above].add(Text(f"{clean(name)}  {size_text(size)}"))
    show(branches[""])


def show(renderable: RenderableType) -> None:
    """Anything of rich on stdout; give it `Text`, because text alone would be read as markup."""
    from rich.console import Console

    # With the encoding of stdout, from which rich takes whether it may draw a tree with more than ASCII.
    page = io.TextIOWrapper(io.BytesIO(), sys.stdout.encoding or "utf-8", errors="backslashreplace")
    terminal = sys.stdout.isatty()
    Console(file=page, force_terminal=terminal, width=WIDE, markup=False, emoji=False, highlight=False).print(
        renderable
    )
    page.seek(0)
    typer.echo("\n".join(line.rstrip() for line in page.read().split("\n")[:-1]))


@contextlib.contextmanager
def transfer(title: str = "", size: int = 0) -> Iterator[Progress]:
    """Bytes under way: a bar on a terminal, and Ctrl-C is heard by the threads that move them."""
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
    """What the library logs as a warning or an error is said like our own words."""
    logger = logging.getLogger("hf_cloudtrain")
    words = _Words(logging.WARNING)
    logger.addHandler(words)
    try:
        yield
    finally:
        logger.removeHandler(words)


class _Words(logging.Handler):
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


def _parents(path: str) -> Iterator[str]:
    """'a/b/c' -> 'a', 'a/b'."""
    parts = path.split("/")
    for end in range(1, len(parts)):
        yield "/".join(parts[:end])


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def of_total(step: int | None, total: int | None, *, percent: bool = False) -> str | None:
    """'120/900 (13%)'."""
    if step is None or not total:
        return None if step is None else str(step)
    return f"{step}/{total}" + (f" ({step / total:.0%})" if percent else "")
