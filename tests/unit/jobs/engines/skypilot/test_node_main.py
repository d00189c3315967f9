"""What runs on SkyPilot's machines: SkyPilot's variables, and the exit code that restarts a job or does not."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.jobs.engines.skypilot import node_main
from hf_cloudtrain.jobs.node.mounts import Mount
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.jobs.verdict import Verdict
from hf_cloudtrain.preemption.sources import RUN_STOP
from tests.fake_sky import job_text, submission_of

GPUS = ("vm: azure-16gb-v100-4g-eastus-spot", "num_devices: 8")


def variables(rank: int = 0, **changes: str) -> dict[str, str]:
    found = {
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5\n",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "4",
        **changes,
    }
    return {name: value for name, value in found.items() if value != "-"}


def saved(tmp_path: Path, *lines: str, workspace: bool = False) -> Submission:
    submission = submission_of(job_text(*lines), f"file://{tmp_path}/run", home=tmp_path, workspace=workspace)
    submission = dataclasses.replace(submission, home=tmp_path / "home")
    submission.save()
    return submission


class TestRankAndMaster:
    """Which node this is."""

    def test_the_first_address_is_that_of_node_0(self, tmp_path: Path) -> None:
        assert node_main.rank_and_master(saved(tmp_path, *GPUS), variables(1)) == (1, "10.0.0.4")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"SKYPILOT_NODE_RANK": "-"}, "missing or wrong here: 'SKYPILOT_NODE_RANK'"),
            ({"SKYPILOT_NODE_IPS": " "}, "missing or wrong here"),
            ({"SKYPILOT_NODE_RANK": "head"}, "missing or wrong here"),
            ({"SKYPILOT_NUM_NODES": "1"}, "started 1 nodes, but the job needs 2"),
            ({"SKYPILOT_NUM_GPUS_PER_NODE": "2"}, "has 2 GPUs, but the job needs 4"),
            ({"SKYPILOT_NUM_GPUS_PER_NODE": "-"}, "has 0 GPUs"),
        ],
    )
    def test_a_cluster_that_does_not_fit_the_job_is_refused(
        self, tmp_path: Path, changes: dict[str, str], message: str
    ) -> None:
        with pytest.raises(ConfigurationError, match=message):
            node_main.rank_and_master(saved(tmp_path, *GPUS), variables(**changes))

    def test_a_job_without_gpus_needs_none(self, tmp_path: Path) -> None:
        alone = variables(SKYPILOT_NUM_NODES="1", SKYPILOT_NUM_GPUS_PER_NODE="0")
        assert node_main.rank_and_master(saved(tmp_path), alone) == (0, "10.0.0.4")


@pytest.mark.parametrize(
    ("verdict", "code", "managed", "expected"),
    [
        (Verdict("finished", "finished", None), 0, True, 0),
        (Verdict("finished", "finished", "and then it failed"), 1, False, 0),
        (Verdict(None, "preempted", None), 75, True, 75),
        (
            Verdict(None, "failed", None, is_crash=True),
            75,
            True,
            75,
        ),  # stopped, by a script that writes no exit file
        (Verdict(None, "failed", None, is_crash=True), 1, True, 1),
        (Verdict("failed", "overtaken", None), 1, True, 0),
        (Verdict("cancelled", "stopped", None), 75, True, 0),
        (Verdict("failed", "failed", "trained nothing"), 0, True, 0),
        (Verdict("failed", "overtaken", None), 1, False, 1),
    ],
)
def test_only_a_crash_and_a_preemption_make_skypilot_restart_a_job(
    verdict: Verdict, code: int, managed: bool, expected: int
) -> None:
    assert node_main.exit_code(verdict, code, managed=managed) == expected


class TestRun:
    """With a fake in place of the node."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []

        def run_node(submission: Submission, *, node_rank: int, start: int, **given: Any) -> int:
            found.append({"node_rank": node_rank, "start": start, **given})
            code, outcome = self.ends
            outcome, _, reason = outcome.partition(": ")
            path = submission.exit_file(node_rank, start)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"outcome": outcome, "reason": reason or "because"}))
            submission.node_file(node_rank, start).write_text(json.dumps({"exit_code": code}))
            return code

        monkeypatch.setattr(node_main, "run_node", run_node)
        monkeypatch.setattr(node_main, "_linger", lambda seconds: found.append({"lingered": seconds}))
        return found

    ends: tuple[int, str] = (0, "finished")

    def test_a_node_receives_its_rank_and_the_address_of_node_0(
        self, tmp_path: Path, calls: list[dict[str, Any]]
    ) -> None:
        submission = saved(tmp_path, *GPUS)
        assert node_main.run(submission.home, variables(1)) == 0
        assert calls == [
            {
                "node_rank": 1,
                "start": 1,
                "master_addr": "10.0.0.4",
                "master_port": 29500,
                "wrap": node_main.in_links,
            }
        ]
        assert submission.workspace.is_dir()

    def test_a_second_start_on_the_same_machine_has_the_next_number(
        self, tmp_path: Path, calls: list[dict[str, Any]]
    ) -> None:
        submission = saved(tmp_path, *GPUS)
        node_main.run(submission.home, variables())
        node_main.run(submission.home, variables(1))
        assert [call["start"] for call in calls] == [1, 2]

    @pytest.mark.parametrize(
        ("ends", "expected", "state"),
        [
            ((1, "overtaken"), 0, "failed"),
            ((75, f"preempted: {RUN_STOP} for attempt 1"), 0, "cancelled"),
            ((0, "finished"), 0, "finished"),
        ],
    )
    def test_node_0_prints_how_a_job_ended_that_must_not_be_restarted(
        self,
        tmp_path: Path,
        calls: list[dict[str, Any]],
        capfd: pytest.CaptureFixture[str],
        ends: tuple[int, str],
        expected: int,
        state: str,
    ) -> None:
        type(self).ends = ends
        submission = saved(tmp_path, *GPUS)
        assert node_main.run(submission.home, variables()) == expected
        line = capfd.readouterr().out.strip()
        assert line.startswith("cloudtrain-verdict: ")
        assert json.loads(line.split(" ", 1)[1])["state"] == state
        assert node_main.run(submission.home, variables(1)) == expected
        assert capfd.readouterr().out == ""

    def test_a_node_that_saved_waits_for_the_others_which_skypilot_would_kill(
        self, tmp_path: Path, calls: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
    ) -> None:
        type(self).ends = (75, "preempted")
        submission = saved(tmp_path, *GPUS, "env: {HF_CLOUDTRAIN_GRACE: 12}")
        assert node_main.run(submission.home, variables()) == 75
        assert calls[-1] == {"lingered": 12.0}
        assert capfd.readouterr().out == ""

    def test_a_single_node_does_not_wait(self, tmp_path: Path, calls: list[dict[str, Any]]) -> None:
        type(self).ends = (75, "preempted")
        submission = saved(tmp_path)
        assert node_main.run(submission.home, variables(SKYPILOT_NUM_NODES="1")) == 75
        assert {"lingered": 30.0} not in calls


def test_sigterm_ends_the_wait_for_the_others() -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), 15)).start()
    before = time.monotonic()
    node_main._linger(60.0)
    assert time.monotonic() - before < 50


def test_each_mount_path_is_a_link_to_its_folder(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    target = tmp_path / "a" / "workspace"
    for _ in range(2):  # a restart repeats it
        assert node_main.in_links(saved(tmp_path), [Mount(tmp_path / "work", str(target))], ["x"]) == ["x"]
        assert target.resolve() == tmp_path / "work"


SCRIPTS = {
    "hello": 'import os\nprint(os.environ["NODE_RANK"], os.environ["PET_MASTER_ADDR"], os.environ["LR"], os.environ["PWD"])\n',
    "saves": """\
import json, os, signal, sys, time

def save(number, frame):
    with open(os.environ["HF_CLOUDTRAIN_EXIT_FILE"], "w") as file:
        json.dump({"outcome": "preempted", "reason": "SIGTERM"}, file)
    sys.exit(75)

signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
""",
}


class Started:
    """A machine of SkyPilot's: a home folder with the synced files, and SkyPilot's command in a process."""

    given: ClassVar[dict[str, str]] = {"LR": "2e-5", "HF_CLOUDTRAIN_GRACE": "1"}

    def __init__(self, folder: Path, script: str, **changes: str) -> None:
        synced = folder / "machine" / "sky_workdir"
        synced.mkdir(parents=True)
        (synced / "train.py").write_text(SCRIPTS[script])
        content = (
            f"name: x\njob_setting:\n  docker: {{command: {sys.executable} train.py}}\n"
            f"  workspace: {{mount_path: {folder}/workspace}}\nenv: {{LR: 2e-5, HF_CLOUDTRAIN_GRACE: 1}}\n"
        )
        submission = submission_of(content.encode(), f"file://{folder}/run", workspace=True)
        plan = dataclasses.replace(submission.plan, nodes=int(changes.get("SKYPILOT_NUM_NODES", 2)))
        home = folder / "machine" / "hf_cloudtrain"
        dataclasses.replace(submission, home=home, plan=plan).save()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hf_cloudtrain.jobs.engines.skypilot.node_main", "~/hf_cloudtrain"],
            env={**os.environ, **variables(**changes), **self.given, "HOME": str(folder / "machine")},
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> subprocess.Popen[str]:
        return self.process

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate(timeout=30)


def test_a_node_runs_as_skypilot_starts_it(tmp_path: Path) -> None:
    with Started(tmp_path, "hello", SKYPILOT_NUM_NODES="1") as process:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
    hello, verdict = output.splitlines()
    assert hello == f"0 10.0.0.4 2e-5 {tmp_path}/workspace"
    assert "trained nothing" in verdict


def test_a_node_saves_on_sigterm_and_ends_with_the_exit_code_that_restarts_it(tmp_path: Path) -> None:
    with Started(tmp_path, "saves") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        output, _ = process.communicate(timeout=60)
        assert (process.returncode, output) == (75, "")
    exit_file = tmp_path / "machine" / "hf_cloudtrain" / "nodes" / "0" / "exit-1.json"
    assert json.loads(exit_file.read_text())["outcome"] == "preempted"
