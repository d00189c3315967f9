"""node.py: the parts that need no job."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hf_cloudtrain import env
from hf_cloudtrain.jobs.node.mounts import Mount
from hf_cloudtrain.jobs.node.node import (
    SHELL,
    Ending,
    folder_mounts,
    forget_launcher,
    in_namespace_or_docker,
    real_checkpoint_dir,
)
from hf_cloudtrain.jobs.spec.job_file import parse_job
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.runtime.process_tree import terminate

LISTENS = (
    "import signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), print('saved', flush=True), sys.exit(75)))\n"
    "print('up', flush=True)\n"
    "time.sleep(60)\n"
)


def submission_of(tmp_path: Path, more: str = "", *, workspace: bool = False) -> Submission:
    job = parse_job(
        f"name: toy\njob_setting: {{docker: {{command: echo, image: some/image}}}}\n{more}".encode()
    )
    return Submission(
        job, job.plan(), "toy-1", str(tmp_path / "run"), "store", tmp_path / "home", has_workspace=workspace
    )


def started(*words: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=30)
    return process.returncode, out


def test_the_signal_reaches_who_listens_and_not_what_carries_its_words_away() -> None:
    text = f'{SHELL}{sys.executable} -c "{LISTENS}" | cat\nexit ${{PIPESTATUS[0]}}'
    process = started("bash", "-c", text)
    terminate(process.pid)
    assert ended(process) == (75, "saved\n")


def test_what_another_launcher_has_left_in_the_environment_is_not_handed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = {"PET_RDZV_BACKEND": "c10d", "TORCHELASTIC_RESTART_COUNT": "3", "RANK": "1"}
    left |= {env.RESTORED_CHECKPOINT: "000003-0000000500", env.CHECKPOINT_DIR: "/other"}
    kept = {"PET_LOG_DIR": "/logs", "PETS": "2", env.GRACE: "60"}
    for name, value in {**left, **kept}.items():
        monkeypatch.setenv(name, value)
    forget_launcher({"PET_LOG_DIR", env.GRACE})
    assert not set(left) & set(os.environ)
    assert {name: os.environ[name] for name in kept} == kept


def test_bash_begins_nothing_after_the_signal() -> None:
    text = f'{SHELL}{sys.executable} -c "{LISTENS}"\necho never'
    process = started("bash", "-c", text)
    terminate(process.pid)
    assert ended(process) == (75, "saved\n")


def test_where_nobody_listens_all_are_ended() -> None:
    process = started("bash", "-c", f"{SHELL}echo up; sleep 60; echo never")
    while not (sleeping := [one for one in psutil.Process(process.pid).children() if one.name() == "sleep"]):
        time.sleep(0.01)
    terminate(process.pid)
    assert ended(process) == (75, "")
    assert not any(child.is_running() for child in sleeping)


def test_in_a_container_it_gets_its_own_variables_and_not_the_path_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_cloudtrain.jobs.node.node.has_docker", lambda: True)
    monkeypatch.setenv("AWS_PROFILE", "training")
    submission = submission_of(tmp_path, "env: {OWN: value}", workspace=True)
    words = in_namespace_or_docker(submission, folder_mounts(submission), ["bash", "-c", "train"])
    names = [words[index + 1] for index, word in enumerate(words) if word == "--env"]
    assert {"OWN", "AWS_PROFILE", "MASTER_ADDR", "HF_CLOUDTRAIN_RUN_URL"} <= set(names)
    assert not {"PATH", "HOME"} & set(names)
    assert words[-3:] == ["bash", "-c", "train"]
    assert "value" not in " ".join(words)


def test_a_container_keeps_nothing_to_itself_of_what_is_written_to_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_cloudtrain.jobs.node.node.has_docker", lambda: True)
    (tmp_path / "disk").mkdir()
    submission = submission_of(tmp_path, f"checkpoint: {{output_checkpoint_dir: {tmp_path}/disk/ckpt}}")
    words = in_namespace_or_docker(submission, folder_mounts(submission), ["train"])
    for folder in (tmp_path / "run", tmp_path / "disk" / "ckpt", tmp_path / "home"):
        assert f"type=bind,source={folder},target={folder}" in words
    assert (tmp_path / "run").is_dir()


@pytest.mark.parametrize(
    ("more", "workspace", "targets", "real"),
    [
        ("", False, [], None),
        ("", True, ["/workspace"], None),
        ("checkpoint: {output_checkpoint_dir: ckpt}", False, ["/workspace"], "home/workspace/ckpt"),
        ("checkpoint: {output_checkpoint_dir: /no-such/ckpt}", False, ["/no-such/ckpt"], "home/checkpoint"),
        # Root may write there, and yet it is no disk that is there for it.
        ("checkpoint: {output_checkpoint_dir: /no-such}", False, ["/no-such"], "home/checkpoint"),
        ("data: {name: x, mount_path: /workspace/data}", False, ["/workspace"], None),
        ("data: {name: x, mount_path: /data}", False, [], None),
    ],
)
def test_folders_of_a_job_and_where_they_are(
    tmp_path: Path, more: str, workspace: bool, targets: list[str], real: str | None
) -> None:
    submission = submission_of(tmp_path, more, workspace=workspace)
    assert [mount.target for mount in folder_mounts(submission)] == targets
    assert real_checkpoint_dir(submission) == (tmp_path / real if real else None)


def test_a_checkpoint_folder_on_a_disk_that_is_there_is_used_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "disk" / "ckpt"
    folder.mkdir(parents=True)
    submission = submission_of(tmp_path, f"checkpoint: {{output_checkpoint_dir: {folder}}}")
    assert real_checkpoint_dir(submission) == folder
    assert folder_mounts(submission) == []
    assert Mount(folder, str(folder)) not in folder_mounts(submission)


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
