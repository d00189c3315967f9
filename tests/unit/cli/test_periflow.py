"""PeriFlow's words: what is accepted runs our command, and the rest names what to type."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from hf_cloudtrain.cli import app
from hf_cloudtrain.cli.periflow import ACCEPTED, ANSWERS, OPTIONS, translated


def command_of(*words: str) -> Any:
    """The command with these words, which options and arguments may follow; None if there is none."""
    found: Any = typer.main.get_command(app)
    for word in words:
        if not hasattr(found, "commands"):
            return found
        found = found.commands.get(word)
    return found


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        ("datastore list", "data list"),
        ("dataset view mnli", "data view mnli"),
        ("experiment view bert", "job list --experiment bert"),
        ("job log 3 -f", "job logs 3 -f"),
        ("job stop toy", "job cancel toy"),
        ("job run --config-file a.yml -w code", "job run --file a.yml --directory code"),
        ("job run -f a.yml -d code", "job run -f a.yml -d code"),
        ("data create mnli folder", "data create mnli folder"),
    ],
)
def test_words_that_mean_the_same_are_accepted(words: str, ours: str) -> None:
    assert translated(words.split()) == ours.split()


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("datastore upload -n my-cifar -p ./cifar100/", "Type `cloudtrain data create my-cifar ./cifar100/`"),
        ("dataset create --name my-cifar -c s3", "Type `cloudtrain data create my-cifar PATH`"),
        ("experiment create bert", "Write `experiment: NAME` into the job file"),
        ("credential create s3 -n mine", "no account to sign in to"),
        ("job template create -s job.yml", "`cloudtrain job template > job.yml`"),
        ("deployment list", "`cloudtrain endpoint create NAME RUN` serves"),
    ],
)
def test_other_words_name_what_to_type(words: str, advice: str) -> None:
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    typed = " ".join(words.split()[:2])
    assert result.stderr.count("\n") == 1
    assert "is a command of PeriFlow" in result.stderr
    assert typed.split()[0] in result.stderr
    assert advice in result.stderr


def test_an_accepted_word_runs_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path))
    result = CliRunner().invoke(app, ["datastore", "list"])
    assert (result.exit_code, "No datasets" in result.stderr) == (0, True)


def test_none_of_periflows_words_hides_a_command_and_all_advice_names_commands_that_exist() -> None:
    for theirs in [*ACCEPTED, *ANSWERS]:
        assert command_of(*theirs) is None or theirs == ("job", "template", "create"), theirs
    for ours in [*ACCEPTED.values(), *OPTIONS]:
        assert command_of(*ours) is not None, ours
    for advice in ANSWERS.values():
        for words in re.findall(r"`cloudtrain ([a-z -]+)", advice):
            assert command_of(*(word for word in words.split() if not word.startswith("-"))) is not None, (
                words
            )
