"""Write docs/environment.md from the docstrings of `hf_cloudtrain/env.py`: `python docs/site/environment.py`."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "environment.md"

HEAD = """\
# Environment variables

<!-- Written by docs/site/environment.py from hf_cloudtrain/env.py; do not edit. -->

An argument of the API takes precedence over its variable. An empty value counts as unset.

| Variable | Meaning | Default |
|---|---|---|
"""

FOOT = """
Rank and number of processes come from the process group, or else from the variables that torchrun and `accelerate
launch` set: `RANK`, `WORLD_SIZE`, `LOCAL_WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT` and `TORCHELASTIC_*`. Credentials of
the clouds come from their own variables and files: [Storage](storage.md).
"""


def page() -> str:
    """The text of the page."""
    return (
        HEAD + "".join(f"| `{name}` | {text} | {default} |\n" for name, text, default in variables()) + FOOT
    )


def variables() -> Iterator[tuple[str, str, str]]:
    """(name, meaning, default) of each constant whose docstring names a default."""
    body = ast.parse((ROOT / "hf_cloudtrain" / "env.py").read_text(encoding="utf-8")).body
    for node, after in itertools.pairwise(body):
        if (
            isinstance(node, ast.Assign)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            text, found, default = " ".join(str(after.value.value).split()).partition(" Default: ")
            if found:
                yield ast.literal_eval(node.value), text, default.removesuffix(".").replace("none", "")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
