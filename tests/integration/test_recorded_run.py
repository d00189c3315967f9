"""Formats stay: a run, an outbox, a store and a job that an earlier commit wrote are read, finished and continued.

`tests/data/recorded/README.md` says what was recorded, and how.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import hf_cloudtrain as ct
from hf_cloudtrain.cli import app
from tests.integration import _recorded_training as training

RECORDED = Path(__file__).resolve().parents[1] / "data" / "recorded"
WAITING = "000003-0000000010"
"""The checkpoint in the outbox."""
TOLERANCE = 1e-5
"""A different processor may round differently; a resume that is not exact differs by more than 0.01."""


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A copy in which paths, inodes and times are those of this machine."""
    folder = tmp_path / "recorded"
    shutil.copytree(RECORDED, folder)
    local = folder / "trainer" / "out" / ".cloudtrain"
    entries = list(local.glob("outbox/*/entry.json"))
    for path in (*entries, local / "stale.json", *folder.glob("store/jobs/**/*.json")):
        path.write_text(path.read_text().replace("/tmp/recorded", str(folder)))
    for path in entries:
        entry = json.loads(path.read_text())
        for file in entry["files"]:
            found = os.stat(path.parent / "files" / file["path"])
            file.update(inode=found.st_ino, mtime_ns=found.st_mtime_ns)
        path.write_text(json.dumps(entry))
    return folder


def answer(*argv: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*argv, "--json"])
    assert result.exit_code == 0, result.output
    record: dict[str, Any] = json.loads(result.stdout)
    return record


def url(recorded: Path, name: str) -> str:
    return f"file://{recorded}/{name}/run"


def keys(run_url: str) -> list[str]:
    return [item["key"] for item in answer("checkpoint", "list", run_url)["checkpoints"]]


def all_are_whole(run_url: str) -> bool:
    return all(item["whole"] for item in answer("checkpoint", "verify", run_url, "--all")["checkpoints"])


def check_continued(name: str, seen: training.Seen, weights: dict[str, torch.Tensor], *, after: int) -> None:
    """Each batch after that step was seen once, in the recorded order, and the weights equal those of the uninterrupted training."""
    expected = json.loads((RECORDED / "uninterrupted" / f"{name}.json").read_text())
    assert [[step, ids] for step, ids in seen] == expected[after:]
    whole = load_file(RECORDED / "uninterrupted" / f"{name}.safetensors")
    assert weights.keys() == whole.keys()
    assert max(float((weights[key] - whole[key]).abs().max()) for key in whole) < TOLERANCE


class TestCommandLine:
    def test_run_status_shows_three_attempts_and_the_step_that_was_redone(self, recorded: Path) -> None:
        found = answer("run", "status", url(recorded, "trainer"))
        assert (found["state"], found["attempt"], found["step"], found["total_steps"]) == (
            "killed",
            3,
            11,
            12,
        )
        assert (found["kept_steps"], found["superseded_steps"]) == (11, 1)
        assert found["last_committed"] == "000002-0000000008"
        assert found["loss"] == pytest.approx(0.605654, abs=1e-6)
        shown = ("state", "first_step", "last_step", "resumed_from", "checkpoints")
        assert [[attempt[name] for name in shown] for attempt in found["attempts"]] == [
            ["killed", 0, 5, None, ["000001-0000000002", "000001-0000000004"]],
            ["preempted", 4, 8, "000001-0000000004", ["000002-0000000006", "000002-0000000008"]],
            ["killed", 8, 11, "000002-0000000008", []],
        ]
        assert {attempt["facts"]["host"] for attempt in found["attempts"]} == {"recorded-host"}

    def test_the_history_has_each_loss_once(self, recorded: Path) -> None:
        history = ct.read_history(url(recorded, "trainer"))
        losses = [
            (log["step"], log["attempt"], round(log["loss"], 3)) for log in history.logs if "loss" in log
        ]
        assert [step for step, _, _ in losses] == list(range(1, 12))
        assert [attempt for _, attempt, _ in losses] == [1] * 4 + [2] * 4 + [3] * 3
        assert [losses[0][2], losses[4][2], losses[-1][2]] == [3.444, 3.176, 0.606]
        assert [log["step"] for log in history.superseded if "loss" in log] == [5]
        assert set(history.step_seconds) == set(range(1, 12))
        assert [str(key) for key in history.commits] == keys(url(recorded, "trainer"))

    def test_checkpoint_list_shows_the_pointers_the_pin_and_the_named_folder(self, recorded: Path) -> None:
        found = answer("checkpoint", "list", url(recorded, "trainer"))
        shown = ("key", "file_count", "exact", "newest", "best", "pinned")
        assert [[item[name] for name in shown] for item in found["checkpoints"]] == [
            ["000001-0000000002", 7, True, False, False, True],
            ["000001-0000000004", 7, True, False, False, False],
            ["000002-0000000006", 7, True, False, False, False],
            ["000002-0000000008", 7, True, True, True, False],
        ]
        assert found["checkpoints"][3]["metrics"]["eval_loss"] == pytest.approx(1.389766, abs=1e-6)
        assert [[item["key"], item["size"]] for item in found["folders"]] == [["tokenizer-000001", 18]]

    def test_checkpoint_view_shows_position_origin_and_files(self, recorded: Path) -> None:
        found = answer("checkpoint", "view", url(recorded, "trainer"), "-c", "8")
        assert found["position"] == {
            "global_step": 8,
            "epoch": pytest.approx(8 / 6),
            "samples_seen": 30,
            "world_size": 1,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "num_train_epochs": 2.0,
            "max_steps": 12,
            "dataset_length": 22,
            "fingerprint": None,
            "epoch_steps": 6,
            "data_seed": 7,
            "lr_scheduler": "LambdaLR",
        }
        assert found["origin"]["hf_cloudtrain"] == "0.1.0"
        model = next(file for file in found["files"] if file["path"] == "model.safetensors")
        assert model["size"] == 652
        assert model["digest"].startswith("xxh3-128:")

    @pytest.mark.parametrize(("name", "count"), [("trainer", 4), ("loop", 2), ("functions", 2)])
    def test_checkpoint_verify_finds_every_byte_unchanged(
        self, recorded: Path, name: str, count: int
    ) -> None:
        found = answer("checkpoint", "verify", url(recorded, name), "--all")
        whole = [item["whole"] for item in found["checkpoints"] if item["step"] > 0]
        assert whole == [True] * count

    def test_checkpoint_flush_commits_the_outbox_under_its_original_attempt(self, recorded: Path) -> None:
        run_url, out = url(recorded, "trainer"), recorded / "trainer" / "out"
        found = answer("checkpoint", "flush", str(out))
        shown = ("run_url", "title", "attempt", "step", "file_count", "state")
        assert [[item[name] for name in shown] for item in found["entries"]] == [
            [run_url, "checkpoint-10", 3, 10, 7, "committed"]
        ]
        assert found["unreadable"] == []
        assert keys(run_url)[-1] == WAITING
        assert answer("checkpoint", "flush", str(out))["entries"] == []
        assert all_are_whole(run_url)
        newest = answer("checkpoint", "list", run_url)["checkpoints"][-1]
        assert (newest["key"], newest["newest"], newest["best"]) == (WAITING, True, True)
        manifest = answer("checkpoint", "view", run_url, "-c", WAITING)
        assert (manifest["position"]["samples_seen"], manifest["exact"]) == (38, True)
        assert manifest["metrics"]["eval_loss"] == pytest.approx(0.929251, abs=1e-6)
        assert manifest["origin"]["host"] == "recorded-host"

    def test_data_list_and_download_give_both_versions(
        self, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(recorded / "store"))
        monkeypatch.setenv("HF_CLOUDTRAIN_CACHE", str(tmp_path / "cache"))
        (listed,) = answer("data", "list")["datasets"]
        assert (listed["dataset"], listed["versions"], listed["file_count"]) == ("glue", [1, 2], 2)
        rows = {}
        for version in (1, 2):
            answer("data", "download", "glue", str(tmp_path / f"v{version}"), "--version", str(version))
            rows[version] = (tmp_path / f"v{version}/glue/train.csv").read_text().splitlines()
            assert (tmp_path / f"v{version}/glue/dev.csv").read_text() == "id,text,label\n9,ninth,1\n"
        assert rows[1] == ["id,text,label", "1,first,0", "2,second,1"]
        assert rows[2] == [*rows[1], "3,third,0"]

    def test_a_new_version_of_a_dataset_takes_what_the_recorded_one_has(
        self, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(recorded / "store"))
        monkeypatch.setenv("HF_CLOUDTRAIN_CACHE", str(tmp_path / "cache"))
        source = tmp_path / "glue"
        shutil.copytree(recorded / "store/datasets/glue.2", source)
        assert answer("data", "create", "glue", str(source))["version"] == 2
        (source / "test.csv").write_text("id,text\n7,seventh\n")
        created = answer("data", "create", "glue", str(source))
        assert (created["version"], created["sent"]) == (3, 18)

    def test_job_list_status_and_logs_show_the_job(
        self, recorded: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(recorded / "store"))
        (listed,) = answer("job", "list")["jobs"]
        assert (listed["id"], listed["engine"], listed["state"]) == ("hello-1", "local", "failed")
        found = answer("job", "status", "hello-1")
        assert found["starts"][0]["exit_codes"] == [0]
        assert found["submitted_by"] == {"user": "recorded", "host": "recorded-host"}
        logs = CliRunner().invoke(app, ["job", "logs", "hello-1"])
        assert logs.exit_code == 0, logs.output
        assert "hello from the recorded job" in logs.stdout


class TestTraining:
    @pytest.fixture(autouse=True)
    def _one_thread(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setenv("HF_CLOUDTRAIN_HEARTBEAT", "0.1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums in one order
        yield
        torch.set_num_threads(threads)

    def test_trainer_on_the_same_disk_commits_the_outbox_and_continues_after_it(self, recorded: Path) -> None:
        seen: training.Seen = []
        run_url = url(recorded, "trainer")
        weights = training.trainer(run_url, recorded / "trainer" / "out", seen=seen)
        check_continued("trainer", seen, weights, after=10)
        assert keys(run_url)[-2:] == [WAITING, "000004-0000000012"]
        assert all_are_whole(run_url)
        status = answer("run", "status", run_url)
        assert status["attempts"][-1]["resumed_from"] == WAITING
        assert (status["state"], status["step"], status["kept_steps"]) == ("finished", 12, 12)
        assert [item["folder"] for item in answer("checkpoint", "list", run_url)["folders"]] == [
            "final",
            "tokenizer",
        ]

    def test_trainer_on_a_new_machine_continues_after_the_newest_commit(
        self, recorded: Path, tmp_path: Path
    ) -> None:
        seen: training.Seen = []
        run_url = url(recorded, "trainer")
        weights = training.trainer(run_url, tmp_path / "new", seen=seen)
        check_continued("trainer", seen, weights, after=8)
        # Attempt 3 has claimed the plain name and may still commit it.
        again = answer("checkpoint", "view", run_url, "-c", "000004-0000000010")
        assert again["folder"] == "checkpoint-10.a4"
        late = answer("checkpoint", "flush", str(recorded / "trainer" / "out"))["entries"]
        assert [(item["attempt"], item["state"]) for item in late] == [(3, "committed")]
        assert keys(run_url)[-3:] == [WAITING, "000004-0000000010", "000004-0000000012"]

    @pytest.mark.parametrize("disk", ["the same", "new"])
    def test_loop_continues_within_its_epoch(self, recorded: Path, tmp_path: Path, disk: str) -> None:
        seen: training.Seen = []
        run_url = url(recorded, "loop")
        out = recorded / "loop" / "out" if disk == "the same" else tmp_path / "new"
        weights = training.loop(run_url, out, seen=seen)
        check_continued("loop", seen, weights, after=8)
        log = json.loads((out / "log.json").read_text())
        recorded_log = json.loads((RECORDED / "loop/out/log.json").read_text())
        assert [epoch["epoch"] for epoch in log] == [0, 1]
        assert log[0] == recorded_log[0]
        state = json.loads((out / "last" / "training_state.json").read_text())
        assert (state["epoch"], state["step"], state["batches"]) == (2, 12, 0)
        assert json.loads((out / "best" / "training_state.json").read_text())["best_step"] == 12
        assert keys(run_url)[-1] == "000002-0000000012"

    def test_loop_reads_what_it_had_published(self, recorded: Path) -> None:
        for name, step in (("best", 6), ("last", 8)):
            folder = recorded / "loop" / "out" / name
            assert json.loads((folder / "training_state.json").read_text())["step"] == step
            model = training.SmallModel.from_pretrained(folder)
            saved = load_file(recorded / "loop" / "run" / f"checkpoint-{step}" / "model.safetensors")
            assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())

    def test_functions_continue_after_the_newest_commit(self, recorded: Path, tmp_path: Path) -> None:
        seen: training.Seen = []
        run_url = url(recorded, "functions")
        weights = training.functions(run_url, tmp_path / "ckpt", seen=seen)
        check_continued("functions", seen, weights, after=8)
        assert keys(run_url) == ["000001-0000000004", "000001-0000000008", "000002-0000000012"]
