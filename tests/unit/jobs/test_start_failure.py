"""Why a command failed: what no restart can mend, and when two failures are the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_cloudtrain.jobs.spec.job_file import parse_job
from hf_cloudtrain.jobs.start_failure import alike, cannot_start, error_line, lines_of_start
from hf_cloudtrain.jobs.submission import Submission

TORCHRUN = """\
ModuleNotFoundError: No module named 'peft'
E0101 10:00:00.000000 4711 torch/distributed/elastic/multiprocessing/api.py:984] failed (exitcode: 1) local_rank: 0
raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
train.py FAILED
  error_file: <N/A>
"""


@pytest.fixture
def submission(tmp_path: Path) -> Submission:
    job = parse_job(b"name: toy\njob_setting: {docker: {command: echo}}")
    return Submission(job, job.plan(), "toy-1", "run", "store", tmp_path, has_workspace=True, code="code")


@pytest.mark.parametrize(
    ("command", "code", "part"),
    [
        ("cd / && no-such-program --x", 127, "'no-such-program' was not found. Correct"),
        ("env no-such-program", 127, "was not found. Correct 'job_setting.docker.command'"),
        ("./program", 126, "'./program' cannot be executed. Make it executable (chmod +x)"),
        (f"{sys.executable} gone.py", 2, "gone.py' does not exist. The command starts in '/workspace/code'"),
        ("cd /workspace/gone && echo", 1, "'/workspace/gone' does not exist. The command starts in"),
    ],
)
def test_a_command_that_cannot_start_names_what_to_mend(
    submission: Submission, tmp_path: Path, command: str, code: int, part: str
) -> None:
    """The lines are those of the real programs."""
    (tmp_path / "program").write_text("")
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={"LC_ALL": "C"},
    )
    assert done.returncode == code
    found = cannot_start(submission, done.stderr.splitlines(), done.returncode)
    assert found is not None
    assert part in found


@pytest.mark.parametrize("code", [1, 2, 75, -9, None])
def test_other_failures_may_be_gone_at_the_next_start(submission: Submission, code: int | None) -> None:
    assert cannot_start(submission, TORCHRUN.splitlines(), code) is None


def test_an_exit_code_of_bash_counts_without_a_line_in_the_log(submission: Submission) -> None:
    for code in (126, 127):
        assert "a program of it" in (cannot_start(submission, [], code) or "")


def test_only_the_lines_of_the_start_count(submission: Submission) -> None:
    submission.log.mkdir()
    submission.node_log(0).write_text("--- start 1 ---\nold\n--- start 2 ---\nnew\n")
    assert lines_of_start(submission, 0, 2) == ["new"]
    assert lines_of_start(submission, 1, 2) == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (TORCHRUN, "ModuleNotFoundError: No module named 'peft'"),
        (TORCHRUN.split("\n", 1)[1], None),  # a worker was killed
        ("bash: line 3: [: too many arguments", "bash: line 3: [: too many arguments"),
        ("requests.exceptions.ConnectionError: Connection refused", None),
        ("TimeoutError: The read timed out", None),
        ("OSError: [Errno 98] Address already in use", None),
        ("", None),
    ],
)
def test_a_failure_is_recognised_by_its_error(text: str, line: str | None) -> None:
    assert error_line(text.splitlines()) == line


def test_a_secret_in_the_error_is_removed() -> None:
    token = "hf_" + "a1B2" * 9
    assert token not in (error_line([f"ValueError: bad token {token}"]) or token)


def test_numbers_do_not_tell_failures_apart() -> None:
    one, other = "ValueError: in process 4711", "ValueError: in process 812"
    assert alike(one, other)
    assert not alike(one, re.sub("process", "thread", other))
    assert not alike(None, None)
