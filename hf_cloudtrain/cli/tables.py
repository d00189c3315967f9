"""How tables and facts are laid out: in the columns that a terminal has, without breaking a word or cutting a name.

Where a table is too wide, these happen in turn, until it fits:

    1. a long first cell, which names its row, stands on a line of its own
    2. columns without a value, then those in `spare` are left out, the first of `spare` first
    3. the text of the column `prose` is wrapped between words

Outside of a terminal a table is as wide as its content.
"""

from __future__ import annotations

import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_cloudtrain.runtime.text import clean

Columns = Mapping[str, Callable[[Any], object]]
"""A table: each heading, and the function that takes its cell from a record. A heading with `>` in front is right-aligned."""

GAP = "  "
"""Between two columns."""
LONG_NAME = 32
"""Columns of a first cell that no other column makes room for."""
NARROWEST = 16
"""Columns below which no text is wrapped."""
JOINED = "\0"
"""Stands for a space that no line ends at; messages have no control characters."""


@dataclass(frozen=True)
class Layout:
    """A table as lines of text."""

    heading: str
    rows: list[str]
    left_out: list[str]
    """Headings of the columns with values that had no room."""


def terminal_width() -> int | None:
    """The columns of the terminal that stdout is; None where it is a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(
    columns: Columns,
    records: Iterable[Any],
    width: int | None,
    spare: Sequence[str] = (),
    prose: str | None = None,
) -> Layout:
    """Lay out a table, one row a record. None and "" are empty cells.

    Args:
        width: columns of the terminal; None for as many as are needed.
        spare: headings that may be left out, the first one first.
        prose: the heading of the column that may be wrapped.
    """
    found = list(records)
    cells = {
        heading.lstrip(">"): [_cell(cell_of(record)) for record in found]
        for heading, cell_of in columns.items()
    }
    right = {heading.lstrip(">") for heading in columns if heading.startswith(">")}
    first = next(iter(cells))
    left_out = [] if width is None else _leave_out(cells, width, spare)
    widths = _widths(cells)
    excess = _total(widths) - (width or sys.maxsize)
    if excess > 0 and first not in right:
        new = max(min(widths[first], LONG_NAME), widths[first] - excess)
        excess -= widths[first] - new
        widths[first] = new
    if excess > 0 and prose in cells:
        longest = max((_length(word) for text in cells[prose] for word in text.split()), default=0)
        widths[prose] = min(widths[prose], max(widths[prose] - excess, longest, NARROWEST))
    rows = [
        line
        for index in range(len(found))
        for line in _row({heading: values[index] for heading, values in cells.items()}, widths, right, prose)
    ]
    return Layout(_line({heading: heading for heading in cells}, widths, right), rows, left_out)


def facts(values: Mapping[str, object], width: int | None) -> list[tuple[str, str]]:
    """Lines of names and values: the name, padded, and the rest of the line. Values that are None are left out."""
    shown = {clean(name): clean(value) for name, value in values.items() if value is not None}
    indent = max(map(_length, shown), default=0)
    lines = []
    for name, value in shown.items():
        room = None if width is None else max(NARROWEST, width - indent - len(GAP))
        names = itertools.chain([name], itertools.repeat(""))
        for part, label in zip(_wrapped(value, room), names, strict=False):
            if room is None or _length(part) <= room:
                lines.append((_padded(label, indent), f"{GAP}{part}"))
            else:  # a URL: it may fit a line of its own
                lines += [*([(label, "")] if label else []), ("", f"{GAP}{part}")]
    return lines


def _leave_out(cells: dict[str, list[str]], width: int, spare: Sequence[str]) -> list[str]:
    """Remove columns until the table fits; the headings of those with values."""
    left_out = []
    empty = [heading for heading, values in list(cells.items())[1:] if values and not any(values)]
    for heading in (*empty, *spare):
        widths = _widths(cells)
        first = next(iter(widths))
        if _total({**widths, first: min(widths[first], LONG_NAME)}) <= width:
            break
        if any(cells.pop(heading, ())):
            left_out.append(heading)
    return left_out


def _row(cells: dict[str, str], widths: dict[str, int], right: set[str], prose: str | None) -> list[str]:
    first = next(iter(cells))
    lines = []
    if _length(cells[first]) > widths[first]:
        lines.append(cells[first])
        cells = {**cells, first: ""}
    parts = _wrapped(cells[prose], widths[prose]) if prose in cells else [""]
    for index, part in enumerate(parts):
        line = dict.fromkeys(cells, "") if index else cells
        lines.append(_line(line if prose is None else {**line, prose: part}, widths, right))
    return [line for line in lines if line]


def _line(cells: dict[str, str], widths: dict[str, int], right: set[str]) -> str:
    parts = [_padded(cells[heading], width, heading in right) for heading, width in widths.items()]
    return GAP.join(parts).rstrip()


def _padded(text: str, width: int, right: bool = False) -> str:
    spaces = " " * max(0, width - _length(text))
    return spaces + text if right else text + spaces


def message(text: str, width: int) -> str:
    """The text in lines that end between words. A command in backticks is one word, so that it can be copied."""
    spaced = re.sub(r"`[^`\n]*`", lambda command: command[0].replace(" ", JOINED), text)
    lines = [
        line
        for long in spaced.split("\n")
        for line in (_wrapped(long, width) if len(long) > width else [long])
    ]
    return "\n".join(lines).replace(JOINED, " ")


def _wrapped(text: str, width: int | None) -> list[str]:
    """The text in lines between words; a word that is longer than a line stays whole."""
    if width is None or _length(text) <= width:
        return [text]
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def _total(widths: Mapping[str, int]) -> int:
    return sum(widths.values()) + len(GAP) * (len(widths) - 1)


def _widths(cells: dict[str, list[str]]) -> dict[str, int]:
    return {heading: max(map(_length, (heading, *values))) for heading, values in cells.items()}


def _length(text: str) -> int:
    """Columns on a terminal: Chinese characters have two."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _cell(value: object) -> str:
    return "" if value is None else clean(value)
