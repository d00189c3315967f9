"""The program on a node: the parts that need no job."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hf_cloudtrain import env
from hf_cloudtrain.jobs.node.node import SHELL, Ending, forget_launcher
from hf_cloudtrain.jobs.node.stopping import MARGIN
from hf_cloudtrain.runtime.process_tree import terminate
from hf_cloudtrain.staging.process import PROGRAM

SAVES_ON_SIGTERM = (
    "import signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), print('saved', flush=True), sys.exit(75)))\n"
    "print('up', flush=True)\n"
    "time.sleep(60)\n"
)


def started(*argv: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=30)
    return process.returncode, out


def test_the_signal_reaches_the_process_that_saves_and_not_the_one_that_prints_its_output() -> None:
    text = f'{SHELL}{sys.executable} -c "{SAVES_ON_SIGTERM}" | cat\nexit ${{PIPESTATUS[0]}}'
    process = started("bash", "-c", text)
    terminate(process.pid)
    assert ended(process) == (75, "saved\n")


def test_variables_of_another_launcher_are_removed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    foreign = {"PET_RDZV_BACKEND": "c10d", "TORCHELASTIC_RESTART_COUNT": "3", "RANK": "1"}
    foreign |= {env.RESTORED_CHECKPOINT: "000003-0000000500", env.CHECKPOINT_DIR: "/other"}
    kept = {"PET_LOG_DIR": "/logs", "PETS": "2", env.GRACE: "60"}
    for name, value in {**foreign, **kept}.items():
        monkeypatch.setenv(name, value)
    forget_launcher({"PET_LOG_DIR", env.GRACE})
    assert not set(foreign) & set(os.environ)
    assert {name: os.environ[name] for name in kept} == kept


def test_bash_starts_nothing_after_the_signal() -> None:
    text = f'{SHELL}{sys.executable} -c "{SAVES_ON_SIGTERM}"\necho never'
    process = started("bash", "-c", text)
    terminate(process.pid)
    assert ended(process) == (75, "saved\n")


def test_without_a_signal_handler_all_processes_are_stopped() -> None:
    process = started("bash", "-c", f"{SHELL}echo up; sleep 60; echo never")
    while not (sleeping := [one for one in psutil.Process(process.pid).children() if one.name() == "sleep"]):
        time.sleep(0.01)
    terminate(process.pid)
    assert ended(process) == (75, "")
    assert not any(child.is_running() for child in sleeping)


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        (Ending(0, "finished"), 0),
        (Ending(1, "finished"), 0),
        (Ending(0, None), 0),
        (Ending(0, None, stopped=True), 75),
        (Ending(1, "preempted"), 75),
        (Ending(143, None, stopped=True), 75),
        (Ending(1, "failed", stopped=True), 1),
        (Ending(1, None), 1),
        (Ending(None, None, problem="no data"), 1),
        (Ending(1, "overtaken"), 1),
    ],
)
def test_exit_codes_of_a_node(ending: Ending, status: int) -> None:
    assert ending.status == status


CALLS = """
import os, sys, time
from pathlib import Path
from hf_cloudtrain.jobs.node.node import Node
from hf_cloudtrain.jobs.spec.job_file import parse_job
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.runtime.process_tree import adopt_orphans

job = parse_job(b"name: toy\\njob_setting: {docker: {command: echo, image: some/image}}")
submission = Submission(job, job.plan(), "toy-1", "run", "store", Path("home"), has_workspace=False)
type(submission.plan).grace = float(sys.argv[2])
node = Node(submission, 0, "here", 1, 1, lambda submission, mounts, command: command)
node._parent = os.getppid()
adopt_orphans()
print(node._call(sys.argv[1], [], ".", dict(os.environ)), os.path.exists("stored"))
"""


@pytest.mark.parametrize(
    ("mark", "grace", "stores"),
    [
        (PROGRAM, 30.0, True),
        ("a different program", 30.0, False),
        (PROGRAM, -MARGIN, False),
    ],
)
def test_the_writer_of_a_killed_training_has_the_grace_to_store_what_was_saved(
    tmp_path: Path, mark: str, grace: float, stores: bool
) -> None:
    """In a process of its own, which the orphan becomes a child of."""
    orphan = f"setsid sh -c ': {mark}; sleep 0.5; touch stored' & exit 9"
    said = subprocess.run(
        [sys.executable, "-c", CALLS, orphan, str(grace)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert said.stdout == f"9 {stores}\n", said.stderr
