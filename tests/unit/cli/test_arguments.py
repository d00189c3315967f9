"""Which checkpoint a user means."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from hf_cloudtrain.cli import app
from tests.unit.cli.terminal import Run, answer, cloudtrain, sentence


def commands(group: Any = None, *words: str) -> Iterator[tuple[str, ...]]:
    for name, one in (group or typer.main.get_command(app)).commands.items():
        yield from commands(one, *words, name) if hasattr(one, "commands") else [(*words, name)]


@pytest.mark.parametrize("words", [*commands()], ids=" ".join)
def test_the_help_of_a_command_names_arguments_without_their_types(words: tuple[str, ...]) -> None:
    text = cloudtrain(*words, "--help").stdout
    assert not re.findall(r"<\w+>|\{", text.partition("\nOptions:")[0])


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        ("checkpoint list", "[OPTIONS] RUN"),
        ("checkpoint download", "[OPTIONS] [RUN] DIR"),
        ("endpoint create", "[OPTIONS] NAME RUN"),
        ("run list", "[OPTIONS] [URL]"),
        ("job template", "[OPTIONS]"),
    ],
)
def test_the_usage_of_a_command_has_its_arguments_as_documented(words: str, usage: str) -> None:
    shown = cloudtrain(*words.split(), "--help").stdout.splitlines()[0]
    assert shown.endswith(f"{words} {usage}")


class TestWhichCheckpoint:
    @pytest.mark.parametrize(
        ("which", "key"),
        [
            (None, "000002-0000000400"),
            ("100", "000001-0000000100"),
            ("checkpoint-100", "000001-0000000100"),
            ("checkpoint-300", "000001-0000000300"),
            ("checkpoint-300.a2", "000002-0000000300"),
            ("checkpoint-300.a1", "000001-0000000300"),
            ("000001-0000000300", "000001-0000000300"),
            ("final", "final-000002"),
            ("final.2", "final-000002"),
            ("final-000001", "final-000001"),
        ],
    )
    def test_is_named_by_step_folder_key_or_name(self, run: Run, which: str | None, key: str) -> None:
        chosen = answer("checkpoint", "view", run.url, *(["--checkpoint", which] if which else []))
        assert chosen["key"] == key

    def test_a_step_saved_by_two_attempts_is_the_newest_one_with_a_message(self, run: Run) -> None:
        result = cloudtrain("checkpoint", "view", run.url, "-c", "300", "--json")
        assert json.loads(result.stdout)["key"] == "000002-0000000300"
        assert "attempts 1, 2" in result.stderr
        assert "checkpoint-300.a2" in result.stderr

    @pytest.mark.parametrize(
        "which", ["500", "checkpoint-500", "checkpoint-300.a3", "000009-0000000100", "../x"]
    )
    def test_one_that_does_not_exist_is_an_error_that_names_it(self, run: Run, which: str) -> None:
        text = sentence("checkpoint", "view", run.url, "--checkpoint", which)
        assert which.removeprefix("checkpoint-").partition(".")[0] in text
        assert f"cloudtrain checkpoint list {run.url}" in text
