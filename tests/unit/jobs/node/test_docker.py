"""docker: the command line, and the first process of a container as the first of a namespace. No engine is needed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_cloudtrain.jobs.node import docker
from hf_cloudtrain.jobs.node.docker import HOOK, INIT, docker_argv, has_docker, in_namespace_or_docker
from hf_cloudtrain.jobs.node.folders import folder_mounts
from hf_cloudtrain.jobs.node.mounts import Mount
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.launch.environment import FOLDER

PATIENCE = 20.0


def test_the_command_line(
    submission_of: Callable[..., Submission], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(docker, "CONTRACT", ("RANK",))
    monkeypatch.setattr(docker, "PERIFLOW", ("CKPT_DIR",))
    monkeypatch.setattr(docker, "FORWARDED", ("NO_SUCH_PREFIX",))
    data, other = tmp_path / "data", tmp_path / "a,b"
    found = docker_argv(
        submission_of("env: {KEY: value, RANKED: 1}"),
        "me/train:1",
        [Mount(data, "/workspace/data", read_only=True), Mount(other, "/workspace")],
        ["bash", "-c", "torchrun main.py"],
    )
    run, home = tmp_path / "run", tmp_path / "home"
    mounts = [word for word in found if word.startswith("type=bind")]
    assert sorted(mounts) == sorted(
        [
            f"type=bind,source={home},target={home}",
            f"type=bind,source={run},target={run}",
            f'type=bind,"source={other}",target=/workspace',
            f"type=bind,source={data},target=/workspace/data,readonly",
        ]
    )
    assert mounts.index(f'type=bind,"source={other}",target=/workspace') < mounts.index(
        f"type=bind,source={data},target=/workspace/data,readonly"
    ), "outer folders first"
    assert [word for word in found if word not in mounts and word != "--mount"] == [
        *("docker", "run", "--rm", "--init=false", "--network", "host", "--ipc", "host", "--gpus", "all"),
        *(
            "--env",
            "CKPT_DIR",
            "--env",
            "HF_CLOUDTRAIN_PRICE",
            "--env",
            "KEY",
            "--env",
            "RANK",
            "--env",
            "RANKED",
        ),
        *("--name", f"cloudtrain-toy-1-{os.getpid()}"),
        *("--entrypoint", "sh", "me/train:1", "-c", INIT, "sh", "bash", "-c", "torchrun main.py"),
    ]


def test_the_hook_of_launch_is_mounted_at_its_own_path(
    submission_of: Callable[..., Submission], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = docker_argv(submission_of("launch: auto"), "image", [], ["true"])
    assert f"type=bind,source={FOLDER},target={FOLDER},readonly" in found
    assert HOOK + INIT in found
    assert "PYTHONPATH" not in found, "that of the machine means nothing in the image"
    assert "HF_CLOUDTRAIN_LAUNCH_NOTES" in found
    assert INIT in docker_argv(submission_of(), "image", [], ["true"])


@pytest.mark.parametrize(("of_image", "expected"), [(None, FOLDER), ("/app/src", f"{FOLDER}:/app/src")])
def test_the_hook_comes_before_the_pythonpath_of_the_image(of_image: str | None, expected: str) -> None:
    image = {} if of_image is None else {"PYTHONPATH": of_image}
    command = ["sh", "-c", HOOK + 'echo "$PYTHONPATH"']
    done = subprocess.run(
        command, env={"PATH": os.defpath, **image}, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{expected}\n"


def test_without_a_gpu_none_is_requested(
    submission_of: Callable[..., Submission], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "--gpus" not in docker_argv(submission_of(), "image", [], ["true"])


@pytest.mark.parametrize(
    ("script", "answer"),
    [("echo 24.0", True), ("echo; echo no engine >&2; exit 1", False), ("echo", False), (None, False)],
)
def test_a_client_without_an_engine_does_not_count_as_docker(
    script: str | None, answer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is not None:
        (tmp_path / "docker").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if script is not None else str(tmp_path))
    assert has_docker() is answer


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_the_first_process_forwards_sigterm_and_exits_with_the_commands_exit_code(tmp_path: Path) -> None:
    first = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*first, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine allows no namespaces")
    text = (
        f"trap 'touch {tmp_path}/saved; exit 75' TERM; touch {tmp_path}/ready; while :; do sleep 0.02; done"
    )
    command = [*first, "sh", "-c", INIT, "sh", "bash", "-c", text]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + PATIENCE
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)
        assert process.wait(PATIENCE) == 75
    finally:
        process.kill()
    assert (tmp_path / "saved").exists()


def test_a_container_gets_the_jobs_variables_and_not_the_path_of_the_machine(
    submission_of: Callable[..., Submission], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker, "has_docker", lambda: True)
    monkeypatch.setenv("AWS_PROFILE", "training")
    submission = submission_of("env: {OWN: value}", workspace=True)
    argv = in_namespace_or_docker(submission, folder_mounts(submission), ["bash", "-c", "train"])
    names = [argv[index + 1] for index, word in enumerate(argv) if word == "--env"]
    assert {"OWN", "AWS_PROFILE", "MASTER_ADDR", "HF_CLOUDTRAIN_RUN_URL"} <= set(names)
    assert not {"PATH", "HOME"} & set(names)
    assert argv[-3:] == ["bash", "-c", "train"]
    assert "value" not in " ".join(argv)


def test_what_a_command_writes_to_the_machines_own_paths_does_not_stay_in_the_container(
    submission_of: Callable[..., Submission], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker, "has_docker", lambda: True)
    (tmp_path / "disk").mkdir()
    submission = submission_of(f"checkpoint: {{output_checkpoint_dir: {tmp_path}/disk/ckpt}}")
    argv = in_namespace_or_docker(submission, folder_mounts(submission), ["train"])
    for folder in (tmp_path / "run", tmp_path / "disk" / "ckpt", tmp_path / "home"):
        assert f"type=bind,source={folder},target={folder}" in argv
    assert (tmp_path / "run").is_dir()
