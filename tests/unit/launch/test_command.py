"""`cloudtrain launch` as a user types it, with commands that do not train."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_cloudtrain.launch.command import ignoring_option
from tests.servers import MotoServer
from tests.unit.cli.terminal import ENTRY_POINT

PATIENCE = 60.0
NOTHING = "`cloudtrain launch` has hooked no training, so it uploaded nothing: "


def launch(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ENTRY_POINT), "launch", *words],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def test_output_and_exit_code_of_a_command_are_kept_and_nothing_hooked_is_said(url: str) -> None:
    done = launch("--run-url", url, "--", sys.executable, "-c", "print('out'); raise SystemExit(7)")
    assert (done.returncode, done.stdout) == (7, "out\n")
    assert done.stderr == (
        f"{NOTHING}it ran a Python process, which imported neither Trainer nor Accelerate.\n"
    )
    assert not Path(url).exists()


def test_the_run_may_come_from_the_environment_and_two_dashes_may_be_left_out(url: str) -> None:
    done = launch(
        sys.executable,
        "-c",
        "import os; print(os.environ['HF_CLOUDTRAIN_RUN_URL'])",
        HF_CLOUDTRAIN_RUN_URL=url,
    )
    assert (done.returncode, done.stdout) == (0, f"{url}\n")


def test_a_bucket_that_does_not_exist_is_an_error_before_the_command_starts(
    moto: MotoServer, tmp_path: Path
) -> None:
    begun = tmp_path / "begun"
    done = launch(
        "--run-url",
        "s3://no-such-bucket-of-ours/run",
        "--",
        "touch",
        str(begun),
        HF_CLOUDTRAIN_STORAGE_OPTIONS=json.dumps(moto.storage_options),
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "no-such-bucket-of-ours" in done.stderr
    assert "does not exist" in done.stderr
    assert not begun.exists()


def test_a_signal_gives_the_exit_code_of_a_shell(url: str) -> None:
    assert launch("--run-url", url, "--", "sh", "-c", "kill -9 $$").returncode == 128 + 9


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["--", "true"], 1, "No run URL was given. Write `cloudtrain launch --run-url s3://bucket/runs/mrpc -- true`"),
        (["--run-url", "s4://b/r", "--", "true"], 1, "'s4://' is an unknown protocol. Write 's3://b/r'"),
        (["--runurl", "x", "--", "true"], 2, "No such option: --runurl"),
        (["--run-url", "x"], 2, "Missing argument '-- COMMAND...'"),
        (["--run-url", "x", "--", "no-such-program"], 127, "Error: the command 'no-such-program' was not found."),
        (["--run-url", "x", "--", "trl sft"], 127, "'trl sft' was not found. Write its words after `--` without quotes"),
        (["--run-url", "x", "--", "/"], 126, "Error: '/' cannot be executed (Permission denied)."),
        (["--run-url", "x", "--", __file__], 126, f"Write `python {__file__}`."),
    ],
)  # fmt: skip
def test_what_cannot_start_is_named(words: list[str], code: int, expected: str) -> None:
    done = launch(*words)
    assert done.returncode == code
    assert expected in done.stderr
    assert NOTHING not in done.stderr


def test_off_runs_the_command_as_it_is(url: str) -> None:
    code = "import os; print(os.environ.get('PYTHONPATH', ''), os.environ.get('HF_CLOUDTRAIN_RUN_URL'))"
    done = launch(
        "--run-url", url, "--", sys.executable, "-c", code, HF_CLOUDTRAIN_LAUNCH="off", PYTHONPATH="mine"
    )
    assert done.stdout == "mine None\n"
    assert done.stderr.startswith("HF_CLOUDTRAIN_LAUNCH is 'off', so nothing is hooked")


def test_python_that_reads_no_hook_is_named_before_it_runs(url: str) -> None:
    done = launch("--run-url", url, "--", sys.executable, "-I", "-c", "pass")
    first, last = done.stderr.splitlines()
    assert (
        first == f"`{sys.executable} -I` does not read the hook. Leave -I out, or nothing of it is uploaded."
    )
    assert last.startswith(f"{NOTHING}no Python read the hook")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["python", "-I", "train.py"], "-I"),
        (["/usr/bin/python3.12", "-u", "-sE", "train.py"], "-sE"),
        (["python", "-m", "torch.distributed.run", "-S"], None),
        (["python", "train.py", "-I"], None),
        (["python", "-WIgnore", "train.py"], None),
        (["python", "-W", "ignore", "-I", "train.py"], "-I"),
        (["python", "-W", "-I", "train.py"], None),
        (["python", "-uX", "importtime", "-bE", "train.py"], "-bE"),
        (["python", "-Ximporttime", "-S"], "-S"),
        (["python", "--check-hash-based-pycs", "always", "-I", "train.py"], "-I"),
        (["python", "-uc", "pass", "-I"], None),
        (["python", "-", "-I"], None),
        (["trl", "sft", "-I"], None),
    ],
)
def test_options_of_python_that_leave_the_hook_out(command: list[str], option: str | None) -> None:
    assert ignoring_option(command) == option


SAVES = """
import signal, sys, time
def save(number, frame):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("launcher", [False, True], ids=["alone", "below a launcher without handler"])
def test_sigterm_reaches_the_training_and_its_exit_code_comes_back(url: str, launcher: bool) -> None:
    command = [sys.executable, "-c", SAVES]
    if launcher:
        command = ["sh", "-c", '"$@"; exit $?', "sh", *command]
    with subprocess.Popen(
        [str(ENTRY_POINT), "launch", "--run-url", url, "--", *command], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "saved\n"
        assert process.wait(PATIENCE) == 75


def test_a_training_whose_launch_is_killed_is_told_to_save(url: str) -> None:
    with subprocess.Popen(
        [str(ENTRY_POINT), "launch", "--run-url", url, "--", sys.executable, "-c", SAVES],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        assert process.stdout.readline() == "saved\n"


def test_the_folder_of_notes_goes_with_the_launch(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    launch("--run-url", url, "--", "true", TMPDIR=str(folder))
    deadline = time.monotonic() + PATIENCE
    while list(folder.iterdir()):
        assert time.monotonic() < deadline
