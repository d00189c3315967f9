"""The documentation cannot drift: every command has its help and its place, and every command that is shown exists."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from hf_cloudtrain import env
from hf_cloudtrain.cli import app

ROOT = Path(__file__).resolve().parent.parent
CLI_PAGE = ROOT / "docs" / "cli.md"
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
SOURCES = sorted((ROOT / "hf_cloudtrain").rglob("*.py"))


def commands(group: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command of the tree that does something, with the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *path, name)
        else:
            yield (*path, name), command


COMMANDS = dict(commands(typer.main.get_command(app)))
each_command = pytest.mark.parametrize("words", COMMANDS, ids=" ".join)


def help_of(words: tuple[str, ...]) -> str:
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0
    text: str = result.stdout
    return text


def section_of(words: tuple[str, ...]) -> str:
    """What the page says of one command."""
    heading = f"\n## cloudtrain {' '.join(words)}\n"
    page = CLI_PAGE.read_text()
    assert page.count(heading) == 1
    return page.split(heading)[1].split("\n## ")[0]


@each_command
def test_help_says_what_a_command_does_and_gives_an_example(words: tuple[str, ...]) -> None:
    summary, example = help_of(words).split("Example", 1)
    assert len(summary.split("\n\n")[1].split()) >= 5
    assert f"cloudtrain {' '.join(words)} " in example


@pytest.mark.parametrize("words", sorted({(), *(words[:1] for words in COMMANDS)}), ids=" ".join)
def test_help_of_a_group_gives_an_example_too(words: tuple[str, ...]) -> None:
    assert " ".join(("cloudtrain", *words)) in help_of(words).split("Example", 1)[1]


@each_command
def test_a_command_has_json_output(words: tuple[str, ...]) -> None:
    assert "--json" in help_of(words)


@each_command
def test_the_page_has_an_entry_with_an_example_for_a_command(words: tuple[str, ...]) -> None:
    assert f"cloudtrain {' '.join(words)} " in section_of(words)
    anchor = "-".join(("cloudtrain", *words))
    assert f"[`cloudtrain {' '.join(words)}`](#{anchor})" in CLI_PAGE.read_text()


@each_command
def test_the_page_explains_every_option_of_a_command(words: tuple[str, ...]) -> None:
    general = CLI_PAGE.read_text().split("\n## For all commands\n")[1].split("\n## ")[0]
    text = general + section_of(words)
    options = [
        name
        for parameter in COMMANDS[words].params
        for name in parameter.opts
        if name.startswith("--") and name != "--help"
    ]
    assert options
    assert [name for name in options if not re.search(rf"(?<![\w-]){name}(?![\w-])", text)] == []


def test_the_page_has_no_entry_for_a_command_that_is_gone() -> None:
    documented = set(re.findall(r"^## cloudtrain (.+)$", CLI_PAGE.read_text(), re.MULTILINE))
    assert documented == {" ".join(words) for words in COMMANDS}


def test_every_variable_of_the_environment_is_in_the_documentation() -> None:
    names = {value for name, value in vars(env).items() if name.isupper() and isinstance(value, str)}
    assert "HF_CLOUDTRAIN_RUN_URL" in names
    text = "".join(page.read_text() for page in PAGES)
    assert {name for name in names if name not in text} == set()


SHOWN = [
    pytest.param(line, id=f"{page.relative_to(ROOT)}: {line}")
    for page in PAGES
    for block in re.findall(
        r"^```(?:console|bash|sh|shell)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL
    )
    for line in re.findall(r"^(?:\$ )?((?:\w+=\S+ )*cloudtrain .*)$", block, re.MULTILINE)
] + [
    pytest.param(line, id=f"--help: {line}")
    for words in COMMANDS
    for line in re.findall(r"^ +(cloudtrain .*)$", help_of(words), re.MULTILINE)
]


@pytest.mark.parametrize("line", SHOWN)
def test_a_command_that_is_shown_can_be_typed(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line, comments=True)
    if ">" in words:
        words = words[: words.index(">")]
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        monkeypatch.setenv(name, value)
    path = tuple(words[1:3] if tuple(words[1:3]) in COMMANDS else words[1:2])  # `cloudtrain new` has no group
    assert path in COMMANDS
    COMMANDS[path].make_context(" ".join(["cloudtrain", *path]), words[1 + len(path) :]).close()


def test_shown_commands_are_found_at_all() -> None:
    found = " ".join(str(parameter.id) for parameter in SHOWN)
    assert all(place in found for place in ("README.md", "docs/cli.md", "--help"))


def test_messages_name_only_commands_that_exist() -> None:
    named = {
        (match[1], match[2]): source.name
        for source in SOURCES
        for match in re.finditer(r"`cloudtrain ([a-z]+) ([a-z]+)", source.read_text())
    }
    assert ("checkpoint", "flush") in named
    assert {words: name for words, name in named.items() if words not in COMMANDS} == {}


LINKS = [
    pytest.param(page, target, id=f"{page.relative_to(ROOT)}: {target}")
    for page in PAGES
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text())
]


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_a_link_leads_somewhere(page: Path, target: str) -> None:
    name, _, anchor = target.partition("#")
    file = page.parent / name if name else page
    assert file.exists()
    if anchor:
        headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_first_page_shows_three_ways_of_at_most_14_lines_that_parse() -> None:
    section = (ROOT / "README.md").read_text().split("## Three ways")[1].split("\n## ")[0]
    blocks = re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["diff", "python", "python"]
    for kind, text in blocks:
        assert len(text.splitlines()) <= 14
        lines = [line for line in text.splitlines() if not line.startswith("-")]
        ast.parse("\n".join(line.removeprefix("+") for line in lines) if kind == "diff" else text)


def test_every_test_that_a_promise_names_is_there() -> None:
    page = (ROOT / "docs" / "guarantees.md").read_text()
    named = set(re.findall(r"`((?:tests/)?[\w/]+\.py|tests/\w+)`", page))
    assert len(named) >= 12
    for name in named:
        assert list(ROOT.glob(name if name.startswith("tests") else f"tests/*/{name}")), name
    laws = {int(number) for number in re.findall(r"^\| (\d+) ", page, flags=re.MULTILINE)}
    assert laws == set(range(1, 13))
