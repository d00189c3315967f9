"""The old dialect stays out: phrases that read as translated, in code, messages, docs, examples and the names of tests."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = Path(__file__).name
SUFFIXES = {".py", ".md", ".html", ".yml", ".ipynb", ".cfg", ".toml"}

BANNED = {
    "whoever": "name the actor: rank 0, the uploader, the user",
    "nobody": "name the actor",
    "somebody": "name the actor",
    "anew": "again",
    "of then": "old",
    "of today": "new",
    "is none of": "must be one of",
    "taken for": "assumed to be",
    "goes by": "uses",
    "vouches": "say what was checked",
    "in vain": "say what did not happen",
    "is no(?! longer| more\\b| less\\b| such\\b| other\\b)": "is not a",
    "gives? no answer": "timed out after",
    "left out of account": "ignored",
    "have a look": "look",
}
"""A regular expression, and what to write instead. Underscores and hyphens count as spaces."""

ALLOWED: dict[str, set[str]] = {}
"""Where a phrase is right: file, and the phrases that it may hold."""


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\n") if Path(name).suffix in SUFFIXES and Path(name).name != OURS]


@pytest.mark.parametrize("name", tracked())
def test_no_phrase_of_the_old_dialect_comes_back(name: str) -> None:
    found = [
        f"{name}:{line}: {phrase!r}, better: {BANNED[phrase]}: {text.strip()[:120]}"
        for line, phrase, text in phrases((ROOT / name).read_text(encoding="utf-8"))
        if phrase not in ALLOWED.get(name, ())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    ["Whoever is here", "def test_nobody_waits", "steps of\ntoday", "'x' is no key", "is none of its ranks"],
)
def test_a_planted_phrase_is_found(text: str) -> None:
    assert list(phrases(text)) != []


def test_ordinary_words_are_not_found() -> None:
    assert list(phrases("It is no longer there. There is no run at 'x'. The manifest is notable.")) == []


def phrases(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, phrase, the line's text) of what is banned; a phrase may be broken by the end of a line."""
    plain = re.sub(r"[_-]", " ", text.lower())
    for phrase in BANNED:
        for match in re.finditer(rf"\b{phrase}\b".replace(" ", r"[\s#*\"]+"), plain):
            if phrase.startswith("is no") and re.search(r"\bthere\s+$", plain[: match.start()]):
                continue  # "There is no run at …" is good English
            line = plain.count("\n", 0, match.start()) + 1
            yield line, phrase, text.split("\n")[line - 1]
