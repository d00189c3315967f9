"""What became of each command, in a file, and as the table of docs/integrations.md."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.trainers._commands import COMMANDS, ROOT, Command
from tests.trainers._launch import Outcome

MEASURED = Path(__file__).with_name("measured.json")
PAGE = ROOT / "docs" / "integrations.md"
BEGIN, END = "<!-- measured: python -m tests.trainers -->\n", "<!-- end of what was measured -->\n"
WORDS = {True: "yes", False: "no", None: "not verified"}


@dataclass(frozen=True)
class Row:
    """What the table says of one command."""

    versions: str
    difference: float | None
    """None: it was not resumed."""
    exact: bool | None
    reason: str | None = None

    @classmethod
    def of(cls, command: Command, outcome: Outcome) -> Row:
        """The row of an outcome, with the versions of the command's environment."""
        says = outcome.exact
        return cls(versions(command), float(f"{outcome.difference:.0e}"), says.exact, says.reason)


def versions(command: Command) -> str:
    """Such as `trl 1.16.0, transformers 5.23.0`."""
    script = "import sys\nfrom importlib.metadata import version\nprint(*map(version, sys.argv[1:]))"
    asked = [str(command.python), "-c", script, *command.packages]
    found = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()
    return ", ".join(
        f"{name} {one.partition('+')[0]}" for name, one in zip(command.packages, found, strict=True)
    )


def read() -> dict[str, Row]:
    """What was measured last, by command."""
    return {name: Row(**row) for name, row in json.loads(MEASURED.read_text()).items()}


def write(rows: dict[str, Row]) -> None:
    """Keep what was measured, and put the table into the page."""
    MEASURED.write_text(json.dumps({name: asdict(row) for name, row in rows.items()}, indent=1) + "\n")
    PAGE.write_text(page(rows))


def page(rows: dict[str, Row]) -> str:
    """The page with the table of these rows."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table(rows) + END + after


def table(rows: dict[str, Row]) -> str:
    lines = [
        "| command after `cloudtrain launch --` | tested with | resumed differs by | exact | limits |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        command = COMMANDS[name]
        differs = (
            "not resumed" if row.difference is None else f"{row.difference:.0e}" if row.difference else "0.0"
        )
        says = WORDS[row.exact] if row.reason is None else f"{WORDS[row.exact]}: {row.reason}"
        lines.append(
            f"| `{command.shown or command.line}` | {row.versions} | {differs} | {says} | {command.limits} |"
        )
    return "\n".join(lines) + "\n"
