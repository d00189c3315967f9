"""Run all benchmarks or those that are named: `python -m benchmarks [NAME ...] [--quick]`.

Each runs in a separate process, so that it does not inherit threads and memory.
"""

from __future__ import annotations

import argparse
import importlib
import os
import time

from benchmarks.apart import run_apart
from benchmarks.measure import Scale
from benchmarks.report import PAGE, Row, machine, print_table, write_page

NAMES = (
    *("stall", "staging", "peers", "interval", "start", "step", "loop", "functions"),
    *("upload", "cpu", "restore", "training", "memory", "finding", "seam", "serve", "predict"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure the cost of the package, side by side with other clients."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(NAMES)}; default all")
    parser.add_argument("--quick", action="store_true", help="small sizes: check that the benchmarks run")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"unknown benchmark: {', '.join(sorted(unknown))}. Choose from {', '.join(NAMES)}.")
    load = os.getloadavg()[0]
    sections: dict[str, list[Row]] = {}
    for name in options.names or NAMES:
        start = time.monotonic()
        sections[name] = run_apart(name, Scale(options.quick))
        print(f"{name}: measured in {time.monotonic() - start:.0f} s", flush=True)
        for row in sections[name]:
            print("  " + " | ".join(row.cells()), flush=True)
    where = machine(load)
    print_table(sections)
    print(where)
    if not options.names and not options.quick:
        write_page(sections, {name: story(name) for name in sections}, where)
        print(f"Written to docs/{PAGE.name}")


def story(name: str) -> str:
    """Return the docstring of a benchmark."""
    return importlib.import_module(f"benchmarks.{name}").__doc__ or ""


if __name__ == "__main__":
    main()
