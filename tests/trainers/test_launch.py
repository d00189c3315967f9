"""Commands of other projects under `cloudtrain launch`, killed and started again, and the table of docs/integrations.md."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from tests.conftest import missing
from tests.trainers import _integrations
from tests.trainers._commands import COMMANDS, Command
from tests.trainers._integrations import Row
from tests.trainers._launch import measure

UPDATE = "python -m tests.trainers writes measured.json and the table in docs/integrations.md"
each_command = pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.name)


def here(command: Command) -> None:
    """Skip what is done by hand; anything else that is missing is a fault of CI."""
    if command.missing:
        (pytest.skip if command.by_hand else missing)(command.missing)


@pytest.mark.trainers
@pytest.mark.timeout(0)
@each_command
def test_a_command_that_is_killed_and_started_again_ends_with_the_same_weights(
    command: Command, tmp_path: Path
) -> None:
    here(command)
    seed = random.randrange(10**6)
    outcome = measure(command, tmp_path, random.Random(seed))
    assert outcome.difference == 0.0 or not command.exact, f"seed {seed}: {outcome.said}"
    found, listed = Row.of(command, outcome), _integrations.read()[command.name]
    if not command.exact:
        found = dataclasses.replace(found, difference=listed.difference)  # depends on the step of the kill
    assert found == listed, UPDATE


def test_the_table_on_the_page_is_what_was_measured() -> None:
    rows = _integrations.read()
    assert list(rows) == list(COMMANDS), UPDATE
    assert _integrations.PAGE.read_text() == _integrations.page(rows), UPDATE


@each_command
def test_the_table_says_that_a_command_resumes_exactly(command: Command) -> None:
    row = _integrations.read()[command.name]
    assert row.difference == 0.0 or not command.exact
    assert row.exact is not True or row.difference == 0.0
