"""Plain PyTorch scripts on the function API, in real processes: killed, restored elsewhere, and continued."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.download import download
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.errors import PreemptedExit
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.tracking.history import read_history
from tests.integration._lab import Lab, max_difference, problems
from tests.integration._torchrun import kill_family, torchrun
from tests.integration._zygote import PATIENCE, REPOSITORY, Child
from tests.servers import MotoServer, free_port

SCRIPT = "tests.integration._periflow_script"
TOTAL, HELD = 14, 10
"""Twelve steps are an epoch of two ranks; it saves every fourth, so HELD is two steps after a save."""


class Runs:
    """Attempts of one run by the script."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.folder = lab.folder
        self.catalog = lab.catalog

    def start(
        self,
        machine: str,
        *,
        size: int = 2,
        function: str = "main",
        env: dict[str, str] | None = None,
        **arguments: Any,
    ) -> list[Child]:
        """One process for each rank; `machine` is its checkpoint folder."""
        shared = {
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "HF_CLOUDTRAIN_RUN_URL": self.lab.run_url,
            "HF_CLOUDTRAIN_CHECKPOINT_DIR": str(self.folder / machine),
            **(env or {}),
        }
        (self.folder / machine).mkdir(exist_ok=True)
        given = {"save": str(self.folder / machine), "total_steps": TOTAL, **arguments}
        return [
            self.lab._zygote.start(
                SCRIPT, function, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **given
            )
            for rank in range(size)
        ]

    def train(self, machine: str, **arguments: Any) -> list[Child]:
        given = {"result": self.result(machine), "seen": f"{self.folder}/{machine}-{{rank}}.seen"}
        ranks = self.start(machine, **given, **arguments)
        finish(ranks)
        return ranks

    def plain(self, **arguments: Any) -> None:
        """The same training, uninterrupted, without a run."""
        self.train(
            "plain", env={"HF_CLOUDTRAIN_RUN_URL": ""}, log=str(self.folder / "plain.jsonl"), **arguments
        )

    def killed(self, machine: str, committed: int, **arguments: Any) -> None:
        """SIGKILL to all ranks, once the checkpoint of a step is on storage."""
        seen = f"{self.folder}/{machine}-{{rank}}.seen"
        ranks = self.start(machine, seen=seen, **arguments)
        self.lab.wait_until(
            lambda: committed in self.lab.steps() or any(rank.poll() is not None for rank in ranks)
        )
        assert [rank.poll() for rank in ranks] == [None] * len(ranks), "\n".join(rank.log for rank in ranks)
        for rank in ranks:
            rank.kill()

    def result(self, machine: str) -> Path:
        return self.folder / f"{machine}.safetensors"

    def samples(self, machine: str, rank: int = 0, *, after: int = 0, until: int = 10**9) -> list[int]:
        lines = (self.folder / f"{machine}-{rank}.seen").read_text().splitlines()
        return [n for step, numbers in map(json.loads, lines) if after < step <= until for n in numbers]


@pytest.fixture
def runs(lab: Lab) -> Runs:
    return Runs(lab)


@pytest.mark.slow
def test_torchrun_on_s3_killed_and_restored_in_an_empty_folder_equals_uninterrupted(
    moto: MotoServer, tmp_path: Path, runs: Runs
) -> None:
    """The second start restores before it has a process group: its ranks agree over torchrun's own store."""
    runs.plain()
    run_url = f"s3://{moto.make_bucket()}/runs/cifar"
    catalog = Catalog(Storage(run_url, moto.storage_options))

    def arguments_of(machine: str, **arguments: Any) -> list[str]:
        (tmp_path / machine).mkdir()
        return [
            "-m",
            SCRIPT,
            json.dumps({"save": str(tmp_path / machine), "total_steps": TOTAL, **arguments}),
        ]

    def env(machine: str) -> dict[str, str]:
        return {
            **moto.env,
            "HF_CLOUDTRAIN_RUN_URL": run_url,
            "HF_CLOUDTRAIN_CHECKPOINT_DIR": str(tmp_path / machine),
        }

    log = tmp_path / "log"
    with torchrun(*arguments_of("first", hold_at=HELD), log=log, env=env("first")) as launcher:
        deadline = time.monotonic() + PATIENCE
        while not any(key.step == 8 for key in catalog.checkpoints()) and time.monotonic() < deadline:
            assert launcher.poll() is None, log.read_text()
            time.sleep(0.05)
        kill_family(launcher)
    second = arguments_of("second", restore=True, group="after", result=str(tmp_path / "second.safetensors"))
    with torchrun(*second, log=log, env=env("second")) as launcher:
        assert launcher.wait(PATIENCE) == 0, log.read_text()
    assert "resumes from checkpoint-8 (attempt 1" in log.read_text()
    assert max_difference(tmp_path / "second.safetensors", runs.result("plain")) == 0.0
    assert catalog.newest() == CheckpointKey(2, TOTAL)
    assert [attempt.resumed_from for attempt in catalog.attempts.read_all()] == [None, CheckpointKey(1, 8)]
    assert problems(catalog) == []


def test_a_script_that_loads_before_init_continues_at_the_step_that_its_platform_names(runs: Runs) -> None:
    """As on PeriFlow: the platform restores the files, names the checkpoint in the environment, and the script is unchanged."""
    runs.plain()
    runs.killed("first", committed=8, hold_at=HELD)
    key = runs.catalog.newest()
    download(runs.catalog, runs.catalog.read(key), runs.folder / "second")
    runs.train("second", env={"HF_CLOUDTRAIN_RESTORED_CHECKPOINT": str(key)})
    assert max_difference(runs.result("second"), runs.result("plain")) == 0.0
    for rank in range(2):
        seen = runs.samples("first", rank, until=8) + runs.samples("second", rank)
        assert seen == runs.samples("plain", rank)
    assert [attempt.global_step for attempt in runs.catalog.attempts.read_all()] == [0, 8]
    alone = [json.loads(line) for line in (runs.folder / "plain.jsonl").read_text().splitlines()]
    of_rank_0 = [line["loss"] for line in alone if line["rank"] == 0]
    assert len(alone) == 2 * TOTAL, "both ranks share the file"
    assert of_rank_0[8:] == [line["loss"] for line in metrics(runs, attempt=2)]
    of_rank_1 = [line["loss"] for line in alone if line["rank"] == 1]
    assert of_rank_1 != of_rank_0
    logs = read_history(runs.lab.run_url).logs
    for name, expected in (("loss", of_rank_0), ("rank1/loss", of_rank_1)):
        found = {log["step"]: log[name] for log in logs if name in log}
        assert found == {step: value for step, value in enumerate(expected, 1) if step in found}
        assert set(range(9, TOTAL + 1)) <= set(found), "the attempt that ended by itself has recorded all"
    assert runs.lab.steps()[-1] == TOTAL
    assert runs.lab.problems() == []


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["first", "second"])
def test_two_ranks_with_staged_saves_killed_and_restored_equal_uninterrupted(
    machine: str, runs: Runs
) -> None:
    """On the same disk, where the writer may still be at work, and on a different one."""
    runs.plain()
    given = {"staged": True, "env": {"HF_CLOUDTRAIN_ASYNC_SAVE": "1"}}
    runs.killed("first", committed=8, hold_at=HELD, **given)
    ranks = runs.train(machine, restore=True, **given)
    assert max_difference(runs.result(machine), runs.result("plain")) == 0.0
    assert runs.lab.steps() == [4, 8, 12, TOTAL]
    # Its first save is an ordinary one.
    assert ["1 saves were staged" in rank.log for rank in ranks] == [True, False]
    assert {path.name for path in (runs.folder / machine).iterdir()} == {"_cloudtrain", "checkpoint.pt"}
    assert runs.lab.problems() == []


def test_after_a_kill_files_newer_than_the_last_commit_are_replaced(runs: Runs) -> None:
    """On the same disk: the run does not resume from files that the killed process wrote and did not upload."""
    runs.plain()
    runs.killed("first", committed=8, hold_at=HELD)
    (runs.folder / "first/checkpoint.pt").write_bytes(b"half written")
    runs.train("first", restore=True, group="after")
    assert max_difference(runs.result("first"), runs.result("plain")) == 0.0


@pytest.mark.parametrize("group", ["before", "after"])
def test_law_7_one_rank_receives_the_signal_and_all_save_the_same_step_and_leave(
    runs: Runs, group: str
) -> None:
    runs.plain()
    seen = f"{runs.folder}/first-{{rank}}.seen"
    exit_file = runs.folder / "exit.json"
    env = {"HF_CLOUDTRAIN_EXIT_FILE": str(exit_file)}
    ranks = runs.start("first", signal_at=5, seen=seen, restore=True, group=group, env=env)
    assert [rank.wait() for rank in ranks] == [PreemptedExit.CODE] * 2, "\n".join(rank.log for rank in ranks)
    assert runs.lab.steps() == [4, 6]
    ended = json.loads(exit_file.read_text())
    assert (ended["outcome"], ended["reason"]) == ("preempted", "SIGTERM")
    progress = runs.catalog.attempts.read_progress(1)
    assert progress is not None
    assert progress["state"] == "preempted"
    runs.train("second", restore=True, env=env)
    assert max_difference(runs.result("second"), runs.result("plain")) == 0.0
    for rank in range(2):
        assert runs.samples("first", rank) + runs.samples("second", rank) == runs.samples("plain", rank)
    assert json.loads(exit_file.read_text())["outcome"] == "finished"


def test_on_a_different_number_of_processes_each_sample_is_seen_once(runs: Runs) -> None:
    runs.killed("first", committed=4, hold_at=6)
    runs.train("second", size=1, restore=True, total_steps=4 + 16)
    seen = [n for rank in range(2) for n in runs.samples("first", rank, until=4)]
    assert sorted(seen + runs.samples("second")) == list(range(96))


def test_ranks_without_a_process_group_are_one_attempt(runs: Runs) -> None:
    first = runs.start("first", function="shards", total_steps=3)
    finish(first)
    assert [rank.value for rank in first] == [[0, None]] * 2
    assert runs.catalog.attempts.numbers() == [1]
    manifest = runs.catalog.read(CheckpointKey(1, 3))
    assert {file.path for file in manifest.files} == {"shard-0", "shard-1"}
    second = runs.start("second", function="shards", total_steps=4)
    finish(second)
    assert [rank.value for rank in second] == [[3, f"shard-{rank} at step 3"] for rank in range(2)]
    assert runs.catalog.attempts.numbers() == [1, 2]
    assert runs.lab.problems() == []


def test_law_9_a_forgotten_restore_is_an_error_on_all_ranks(runs: Runs) -> None:
    finish(runs.start("first", function="shards", total_steps=1))
    ranks = runs.start("second")
    assert [rank.wait() for rank in ranks] == [1, 1]
    for rank in ranks:
        assert "RunHasCheckpointsError" in rank.log
        assert "Call hf_cloudtrain.restore() after init()" in rank.log


@pytest.mark.parametrize(
    ("ending", "code", "state"),
    [("", 0, "finished"), ("raise ValueError('of the script')", 1, "failed"), ("sys.exit(3)", 3, "finished")],
)
def test_law_5_a_script_that_simply_ends_has_its_last_upload_on_storage(
    tmp_path: Path, ending: str, code: int, state: str
) -> None:
    script = f"""
import sys, hf_cloudtrain as ct
ct.init(None, "run", "ckpt")
for step in range(3):
    with ct.train_step():
        open("ckpt/model", "w").write("x" * 3_000_000) if step else None
    ct.metric({{"loss": step}})
ct.upload_checkpoint()
{ending}
"""
    (tmp_path / "ckpt").mkdir()
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ended.returncode == code, ended.stderr
    catalog = Catalog(Storage(str(tmp_path / "run")))
    assert catalog.checkpoints() == [CheckpointKey(1, 3)]
    (progress,) = (tmp_path / "run/.cloudtrain/progress").iterdir()
    found = json.loads(progress.read_text())
    assert (found["state"], found["step"], found["last_committed"]) == (state, 3, "000001-0000000003")


def metrics(runs: Runs, attempt: int) -> list[dict[str, Any]]:
    text = (runs.folder / f"run/.cloudtrain/steps/{attempt:06d}-0001.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if line["kind"] == "log"]
    return [{**line, **line["metrics"]} for line in lines]


def finish(ranks: list[Child]) -> None:
    assert [rank.wait() for rank in ranks] == [0] * len(ranks), "\n".join(rank.log for rank in ranks)
