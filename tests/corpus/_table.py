"""What was measured, in a file, and as a table in docs/guarantees.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_cloudtrain.checkpoints.exactness import Exactness
from tests.corpus._harness import Outcome

MEASURED = Path(__file__).with_name("measured.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "guarantees.md"
BEGIN, END = "<!-- measured: python -m tests.corpus -->\n", "<!-- end of what was measured -->\n"
WORDS = {True: "yes", False: "no", None: "not verified"}


def read() -> dict[str, Outcome]:
    """What was measured last, by set-up."""
    return {
        name: Outcome(row["difference"], Exactness(row["exact"], row["reason"]))
        for name, row in json.loads(MEASURED.read_text()).items()
    }


def write(outcomes: dict[str, Outcome]) -> None:
    """Keep what was measured, and put the table into the page."""
    rows: dict[str, dict[str, Any]] = {
        name: {
            "difference": float(f"{outcome.difference:.0e}"),  # more digits are those of one machine
            "exact": outcome.recorded.exact,
            "reason": outcome.recorded.reason,
        }
        for name, outcome in outcomes.items()
    }
    MEASURED.write_text(json.dumps(rows, indent=1) + "\n")
    PAGE.write_text(page(read()))


def page(outcomes: dict[str, Outcome]) -> str:
    """The page with the table of these outcomes."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table(outcomes) + END + after


def table(outcomes: dict[str, Outcome]) -> str:
    exact = [outcome for outcome in outcomes.values() if outcome.is_exact]
    sure = [outcome for outcome in exact if outcome.recorded.exact]
    lines = [
        f"Of {len(outcomes)} set-ups, {len(exact)} are really exact; the manifest says so for {len(sure)} of them.",
        "",
        "| set-up | resumed differs by | exact | reason |",
        "|---|---|---|---|",
    ]
    for name, outcome in outcomes.items():
        differs = "0.0" if outcome.is_exact else f"{outcome.difference:.0e}"
        wrong = f" ({outcome.fault})" if outcome.fault else ""
        reason = (outcome.recorded.reason or "").replace("|", "\\|")
        lines.append(f"| {name} | {differs} | {WORDS[outcome.recorded.exact]}{wrong} | {reason} |")
    return "\n".join(lines) + "\n"
