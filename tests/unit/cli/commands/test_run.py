"""`cloudtrain run status` and `list`."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain.tracking.records import StepRecords
from tests.unit.cli.terminal import Run, answer, cloudtrain, sentence


class TestRunStatus:
    def test_tells_a_killed_attempt_from_a_training_one(self, run: Run) -> None:
        run.beat(2, step=420, total_steps=1000, step_seconds=2.0, eta_seconds=1160.0)
        status = answer("run", "status", run.url)
        assert (status["state"], status["step"], status["eta_seconds"]) == ("training", 420, 1160.0)
        assert [attempt["state"] for attempt in status["attempts"]] == ["killed", "training"]

    @pytest.mark.parametrize(
        ("recorded", "ago", "shown"),
        [
            ("training", 10, "training"),
            ("training", 4000, "killed"),
            ("finished", 4000, "finished"),
            ("failed", 4000, "failed"),
            ("stopped", 4000, "stopped"),
        ],
    )
    def test_state_is_the_recorded_one_unless_heartbeats_stopped(
        self, empty: Run, recorded: str, ago: float, shown: str
    ) -> None:
        empty.begin(ago=5000)
        empty.beat(1, ago=ago, state=recorded, step=5, eta_seconds=60.0)
        status = answer("run", "status", empty.url)
        assert status["state"] == shown
        assert (status["eta_seconds"] is None) == (shown != "training")
        assert answer("run", "list", str(empty.folder.parent))["runs"][0]["state"] == shown

    def test_heartbeats_without_a_step_are_shown_as_stalled(self, run: Run) -> None:
        run.beat(2, step=420, last_step_time=time.time() - 10)
        assert answer("run", "status", run.url)["stalled"] is None
        assert "stalled" not in cloudtrain("run", "status", run.url).stdout
        run.beat(2, step=420, last_step_time=time.time() - 4000)
        assert "no step for 4000 s" in cloudtrain("run", "status", run.url).stdout

    def test_without_any_heartbeat_an_attempt_has_started_or_was_killed(self, empty: Run) -> None:
        empty.begin(ago=4000)
        assert answer("run", "status", empty.url)["state"] == "killed"
        assert answer("run", "list", str(empty.folder.parent))["runs"][0]["state"] == "killed"
        empty.begin()
        assert answer("run", "status", empty.url)["state"] == "started"
        assert answer("run", "list", str(empty.folder.parent))["runs"][0]["state"] == "started"

    def test_only_the_attempt_itself_records_that_it_was_overtaken_and_clocks_do_not_matter(
        self, empty: Run
    ) -> None:
        empty.begin(ago=500)
        empty.begin(ago=400)
        empty.beat(1, ago=-3600, step=5)  # its clock is an hour ahead, and it was killed
        assert answer("run", "status", empty.url)["attempts"][0]["state"] == "killed"
        empty.beat(1, ago=450, step=5, state="overtaken")
        assert answer("run", "status", empty.url)["attempts"][0]["state"] == "overtaken"

    def test_counts_redone_steps(self, run: Run) -> None:
        StepRecords(run.catalog.storage).write(
            1, 1, json.dumps({"kind": "steps", "first": 1, "seconds": [2.0] * 320}).encode()
        )
        status = answer("run", "status", run.url)
        # A checkpoint of attempt 2 shows its steps.
        assert (status["kept_steps"], status["superseded_steps"]) == (400, 120)
        assert (status["superseded_is_bound"], status["goodput_is_bound"]) == (True, True)
        assert status["superseded_seconds"] == 240.0
        assert status["goodput"] > 0
        shown = cloudtrain("run", "status", run.url).stdout
        assert "at least 120 steps, 4 min" in shown
        assert "at least: attempt 1 was killed, and may have done more" in shown
        assert "0 to 320+" in shown

    def test_says_what_a_save_costs_and_which_interval_costs_least(self, empty: Run) -> None:
        empty.begin(ago=1100)
        empty.beat(1, ago=100, step=50, save_seconds=0.5)
        status = answer("run", "status", empty.url)
        assert (status["save_seconds"], status["best_save_interval_seconds"]) == (
            0.5,
            pytest.approx(31.6, abs=1),
        )
        assert "saves" in (shown := cloudtrain("run", "status", empty.url).stdout)
        assert "500 ms each; best every 31." in shown
        assert "if interrupted every 16 min" in shown
        empty.begin(ago=1)
        empty.beat(2, ago=1, step=60, save_seconds="long")
        assert answer("run", "status", empty.url)["save_seconds"] is None

    def test_of_a_run_without_interruptions_only_the_length_of_a_save_is_known(self, empty: Run) -> None:
        empty.begin(ago=100)
        empty.beat(1, ago=1, step=50, save_seconds=0.5)
        status = answer("run", "status", empty.url)
        assert (status["save_seconds"], status["best_save_interval_seconds"]) == (0.5, None)
        assert "saves           500 ms each\n" in cloudtrain("run", "status", empty.url).stdout

    def test_names_the_last_committed_checkpoint_and_what_was_resumed(self, run: Run) -> None:
        status = answer("run", "status", run.url)
        assert (status["last_committed"], status["checkpoints"]) == ("000002-0000000400", 5)
        assert status["attempts"][1]["resumed_from"] == "000001-0000000200"

    def test_says_whether_a_resume_is_exact(self, empty: Run) -> None:
        empty.begin()
        assert answer("run", "status", empty.url)["exactness"] is None
        empty.save(1, 4)
        assert answer("run", "status", empty.url)["exactness"] == "yes"
        empty.save(1, 5, exact=None, inexact_reason="EMA may keep state")
        assert answer("run", "status", empty.url)["exactness"] == "not verified: EMA may keep state"
        assert "not verified: EMA may keep state" in cloudtrain("run", "status", empty.url).stdout

    def test_names_the_page_of_a_tracker(self, empty: Run) -> None:
        page = "https://wandb.ai/team/mrpc/runs/4bc1"
        empty.begin()
        empty.catalog.attempts.write_progress(1, {"trackers": {"wandb": page, "mlflow": 3, "x": "\x1b[2J"}})
        assert answer("run", "status", empty.url)["trackers"]["wandb"] == page
        shown = cloudtrain("run", "status", empty.url).stdout
        assert f"wandb {page}" in re.sub(r"\s+", " ", shown)
        assert "\x1b[2J" not in shown

    def test_without_a_run_is_an_error(self, empty: Run) -> None:
        assert f"run at {empty.url!r}" in sentence("run", "status", empty.url)

    @pytest.mark.parametrize(
        "progress",
        [
            {"step": "many", "total_steps": [], "eta_seconds": None, "time": "now"},
            {"step": 1e300, "total_steps": -1, "eta_seconds": 1e300, "time": 1e300},
            {"step": True, "step_seconds": "1", "loss": {}, "state": None},
        ],
    )
    def test_invalid_values_in_a_heartbeat_are_not_shown(self, empty: Run, progress: dict[str, Any]) -> None:
        empty.begin()
        empty.catalog.attempts.write_progress(1, progress)
        cloudtrain("run", "status", empty.url)
        assert answer("run", "status", empty.url)["eta_seconds"] is None
        cloudtrain("run", "list", str(empty.folder.parent))


class TestRunList:
    def test_finds_runs_at_any_depth(self, run: Run, tmp_path: Path) -> None:
        other = Run(tmp_path / "runs/deep/er/cola", tmp_path / "out-cola")
        other.begin()
        runs = {item["name"]: item for item in answer("run", "list", f"file://{tmp_path}/runs")["runs"]}
        assert sorted(runs) == ["deep/er/cola", "mrpc"]
        assert runs["mrpc"]["run_url"] == run.url
        assert (runs["mrpc"]["attempts"], runs["mrpc"]["checkpoints"]) == (2, 5)
        assert runs["mrpc"]["newest"] == "000002-0000000400"
        assert runs["deep/er/cola"]["newest"] is None

    def test_an_empty_folder_is_an_empty_list_with_a_message(self, tmp_path: Path) -> None:
        result = cloudtrain("run", "list", str(tmp_path), "--json")
        assert json.loads(result.stdout)["runs"] == []
        assert "No runs below" in result.stderr

    def test_the_url_of_a_run_names_the_command_for_it(self, run: Run) -> None:
        assert f"cloudtrain run status {run.url}" in cloudtrain("run", "list", run.url).stderr

    def test_shows_a_damaged_run_beside_the_others(self, run: Run, tmp_path: Path) -> None:
        other = Run(tmp_path / "runs/cola", tmp_path / "out-cola")
        other.begin()
        other.beat(1)
        (other.folder / ".cloudtrain/progress/000001.json").write_text("{")
        result = cloudtrain("run", "list", str(tmp_path / "runs"))
        assert result.stderr.startswith("Warning: ")
        assert [line.split()[:2] for line in result.stdout.splitlines()[1:]] == [
            ["cola", "started"],
            ["mrpc", "killed"],
        ]


class TestPageFile:
    @pytest.mark.parametrize("words", [("run", "report", "no-such"), ("run", "compare", "no-such", "glue-2")])
    def test_a_folder_that_does_not_exist_is_named_before_the_run_is_read(
        self, words: tuple[str, ...], tmp_path: Path
    ) -> None:
        text = sentence(*words, "-o", str(tmp_path / "my pages" / "x.html"))
        assert text.startswith(f"Error: The folder '{tmp_path}/my pages' does not exist")
        assert f"(`mkdir -p '{tmp_path}/my pages'`), or choose a different path." in text
        assert not (tmp_path / "my pages").exists()

    def test_a_folder_is_not_a_file(self, tmp_path: Path) -> None:
        text = sentence("run", "report", "no-such", "-o", str(tmp_path))
        assert f"'{tmp_path}' is a folder. Name a file in it: -o {tmp_path}/report.html" in text
