"""Commands whose stdout or stderr is closed, full or a pipe without a reader: each in a process of its own."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.cli import job_actions, main, status
from hf_cloudtrain.jobs import inventory

LOADED_BEFORE_THE_FORK = (job_actions, status, inventory)
COMMANDS = [
    ["--help"],
    ["--version"],
    ["checkpoint", "list", "--help"],
    ["run", "status", "RUN"],
    ["run", "status", "RUN", "--json"],
    ["job", "template"],
    ["job", "list", "--json"],
    ["data", "--help"],
    ["vm", "list", "--help"],
    ["verify-resume", "--help"],
]
FULL = "Error: Cannot write to stdout: No space left on device.\n"


def closed(number: int) -> None:
    os.close(number)


def full(number: int) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), number)


def pipe_without_reader(number: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, number)


@pytest.fixture
def command(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """Runs a command in a forked process; its exit code and what the other stream received."""
    monkeypatch.setenv("HOME", str(tmp_path))
    catalog.attempts.begin(time.time(), 0, None, {})

    def run(arguments: list[str], broken: int, how: Callable[[int], None]) -> tuple[int, str]:
        other = tmp_path / "other"
        child = os.fork()
        if child == 0:
            code = 99
            try:
                os.dup2(os.open(other, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 3 - broken)
                how(broken)
                for number, name in ((1, "stdout"), (2, "stderr")):
                    is_closed = how is closed and number == broken
                    setattr(sys, name, None if is_closed else os.fdopen(number, "w", closefd=False))
                sys.argv = [
                    "cloudtrain",
                    *(catalog.storage.url if word == "RUN" else word for word in arguments),
                ]
                main()
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 0
            except BaseException:  # noqa: BLE001 - this process ends here
                other.write_text(traceback.format_exc())
            finally:
                for stream in (sys.stdout, sys.stderr):
                    try:
                        stream.flush()  # as Python does when it ends
                    except OSError:
                        code = 98
                os._exit(code)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), other.read_text()

    return run


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
class TestStdout:
    def test_closed_as_in_cron_the_command_succeeds(
        self, command: Callable[..., tuple[int, str]], arguments: list[str]
    ) -> None:
        assert command(arguments, 1, closed) == (0, "")

    def test_full_the_error_names_it(
        self, command: Callable[..., tuple[int, str]], arguments: list[str]
    ) -> None:
        assert command(arguments, 1, full) == (1, FULL)

    def test_a_pipe_whose_reader_is_gone_ends_the_command_quietly(
        self, command: Callable[..., tuple[int, str]], arguments: list[str]
    ) -> None:
        assert command(arguments, 1, pipe_without_reader) == (1, "")


@pytest.mark.parametrize("how", [closed, full, pipe_without_reader])
def test_a_message_that_cannot_be_written_causes_no_traceback(
    command: Callable[..., tuple[int, str]], how: Callable[[int], None]
) -> None:
    code, output = command(["run", "status", "file:///nowhere/at/all"], 2, how)
    assert (code, output) == (1, "")
    assert command(["--version"], 2, how)[0] == 0
