"""Write the map of rooms in CONTRIBUTING.md from the docstrings of the package: `python docs/site/rooms.py`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hf_cloudtrain"
PAGE = ROOT / "CONTRIBUTING.md"
START, END = "do not edit. -->\n", "<!-- end -->"


def page(text: str) -> str:
    """The text of the page with a new map."""
    before, rest = text.split(START, 1)
    after = rest.split(END, 1)[1]
    return (
        f"{before}{START}\n| room | what it is for |\n|---|---|\n{''.join(rows(order(text)))}\n{END}{after}"
    )


def order(text: str) -> list[str]:
    """The rooms in the order of their imports, lowest first, as the page gives it."""
    (line,) = re.findall(r"^errors < .*$", text, re.MULTILINE)
    return re.findall(r"\w+", line)


def rows(rooms: list[str]) -> Iterator[str]:
    """One row for each room, and for each folder in it."""
    folders = [path.parent.relative_to(PACKAGE) for path in PACKAGE.rglob("*/__init__.py")]
    for folder in sorted(folders, key=lambda folder: (rooms.index(folder.parts[0]), folder)):
        path = PACKAGE / folder / "__init__.py"
        link = f"[`{folder.as_posix()}/`]({path.relative_to(ROOT).as_posix()})"
        yield f"| {link} | {purpose(path)} |\n"


def purpose(path: Path) -> str:
    """The first sentence of a docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(docstring.split("\n\n")[0].split())
    return first.split(". ", 1)[0].rstrip(".")


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
