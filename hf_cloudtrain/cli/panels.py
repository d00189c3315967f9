"""Panels for what one thing is: an overview, a tree of files, metadata; and a framed table.

They fit 80 columns, or the terminal if it is wider. A line that does not fit, such as a long URL, is not wrapped, so that it
can be copied: it has no right border. In a pipe they look the same.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_cloudtrain.cli import tables
from hf_cloudtrain.cli.output import WIDE, show, show_table
from hf_cloudtrain.runtime.text import clean, size_text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.text import Text
    from rich.tree import Tree

    from hf_cloudtrain.cli.tables import Columns

COLUMNS = 80
"""Columns of a pipe, and of the narrowest terminal that is supported."""
CORNERS = ("╭", "╮", "╰", "╯", "─", "│")
ASCII_CORNERS = ("+", "+", "+", "+", "-", "|")
"""For an encoding that has no lines."""


def show_panels(*panels: tuple[str, RenderableType]) -> None:
    """Print panels of one width to stdout, each with its title.

    Example:
        >>> show_panels(("Overview", facts_of({"run": url})), ("Files", tree_of("checkpoint-5", files)))
    """
    show(_Panels(panels, _width()))


def show_framed(columns: Columns, records: Iterable[Any], *, spare: Sequence[str] = ()) -> None:
    """Print a table with lines to stdout; without them if it would be too wide. For `spare` see `show_table`."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found = list(records)
    framed = Table(box=box.HEAVY_HEAD, header_style="bold")
    for heading in columns:
        justify = "right" if heading.startswith(">") else "left"
        framed.add_column(heading.lstrip(">"), justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for record in found:
        cells = (cell_of(record) for cell_of in columns.values())
        framed.add_row(*(Text("" if cell is None else clean(cell)) for cell in cells))
    if Console(width=WIDE).measure(framed).maximum <= _width():
        show(framed)
    else:
        show_table(columns, found, spare=spare)


def facts_of(facts: Mapping[str, object]) -> Text:
    """Names and values for a panel; values that are None are left out."""
    from rich.text import Text

    lines = tables.facts(facts, _width() - 4)
    return Text("\n").join(Text.assemble((name, "bold"), rest) for name, rest in lines)


def tree_of(title: str, files: Iterable[tuple[str, int]]) -> Tree:
    """A tree of (path with `/`, size in bytes); a folder shows the size of its content."""
    from rich.text import Text
    from rich.tree import Tree

    def label(name: str, size: int, style: str = "") -> Text:
        return Text.assemble((clean(name), style), (f"  {size_text(size)}", "dim"))

    files = sorted(files)
    sizes: dict[str, int] = {}
    for path, size in files:
        for folder in _parents(path):
            sizes[folder] = sizes.get(folder, 0) + size
    branches = {"": Tree(label(f"{title}/", sum(size for _, size in files), "bold"))}
    for path, size in files:
        for folder in _parents(path):
            if folder not in branches:
                above, _, name = folder.rpartition("/")
                branches[folder] = branches[above].add(label(f"{name}/", sizes[folder], "bold"))
        above, _, name = path.rpartition("/")
        branches[above].add(label(name, size))
    return branches[""]


class _Panels:
    def __init__(self, panels: tuple[tuple[str, RenderableType], ...], width: int) -> None:
        self._panels = panels
        self._width = width

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.segment import Segment
        from rich.text import Text

        bodies = []
        for _, body in self._panels:
            lines = console.render_lines(body, options, pad=False)
            texts = [
                Text.assemble(*((part.text, part.style or "") for part in Segment.simplify(line)))
                for line in lines
            ]
            for text in texts:
                text.rstrip()
            bodies.append(texts)
        fitting = [text.cell_len for texts in bodies for text in texts if text.cell_len <= self._width - 4]
        inner = max([*fitting, *(len(title) + 2 for title, _ in self._panels)])
        left, right, below_left, below_right, line, side = ASCII_CORNERS if options.ascii_only else CORNERS
        for (title, _), texts in zip(self._panels, bodies, strict=True):
            before, rest = divmod(inner - len(title), 2)
            yield Text.assemble(
                (left + line * before, "dim"), (f" {title} ", "bold"), (line * (before + rest) + right, "dim")
            )
            for text in texts:
                end = f"{' ' * (inner - text.cell_len)} {side}" if text.cell_len <= inner else ""
                yield Text.assemble((f"{side} ", "dim"), text, (end, "dim"))
            yield Text(below_left + line * (inner + 2) + below_right, style="dim")


def _width() -> int:
    return max(COLUMNS, shutil.get_terminal_size((COLUMNS, 24)).columns) if sys.stdout.isatty() else COLUMNS


def _parents(path: str) -> Iterator[str]:
    """'a/b/c' -> 'a', 'a/b'."""
    parts = path.split("/")
    for end in range(1, len(parts)):
        yield "/".join(parts[:end])
