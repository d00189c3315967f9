"""Local checkpoints ahead of the step where an attempt begins move away, and do not fill the disk."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from hf_cloudtrain.checkpoints.local_folders import move_stale
from hf_cloudtrain.errors import OvertakenError

if TYPE_CHECKING:
    from pathlib import Path

RUN = "s3://bucket/runs/mrpc"


def begin(disk: Path, *there: int, after: int = 0, run: str = RUN) -> list[str]:
    """Begin an attempt after a step while there are checkpoints of the steps `there`; what is in `stale/` then."""
    for step in there:
        (disk / f"checkpoint-{step}").mkdir(parents=True)
        (disk / f"checkpoint-{step}" / "model").write_bytes(b"x")
    (disk / "_cloudtrain").mkdir(exist_ok=True)
    move_stale(disk, run, after)
    return sorted(path.name for path in disk.glob("_cloudtrain/stale/*"))


def test_only_checkpoints_ahead_move_and_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert begin(tmp_path, 5, 10, 15, after=10) == ["checkpoint-15"]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-5"]
    assert "this attempt starts at step 10" in caplog.text


def test_of_the_folders_that_the_run_itself_left_only_the_last_stay(tmp_path: Path) -> None:
    assert begin(tmp_path) == []
    assert begin(tmp_path, 15, after=10) == ["checkpoint-15"]
    assert begin(tmp_path, after=10) == ["checkpoint-15"], "it stays until others move there"
    assert begin(tmp_path, 25, 30, after=20) == ["checkpoint-25", "checkpoint-30"]
    assert begin(tmp_path, 30, after=20) == ["checkpoint-30"]


def test_folders_from_before_the_run_belong_to_the_user_and_stay(tmp_path: Path) -> None:
    assert begin(tmp_path, 500, 600) == ["checkpoint-500", "checkpoint-600"]
    assert begin(tmp_path, 15, after=10) == ["checkpoint-15", "checkpoint-500", "checkpoint-600"]
    assert begin(tmp_path, 25, after=20) == ["checkpoint-25", "checkpoint-500", "checkpoint-600"]


def test_folders_of_another_run_stay_too(tmp_path: Path) -> None:
    begin(tmp_path)
    begin(tmp_path, 15, after=10)
    assert begin(tmp_path, 16, run="s3://bucket/runs/other") == ["checkpoint-15", "checkpoint-16"]
    assert begin(tmp_path, 17, after=9, run="s3://bucket/runs/other") == [
        *("checkpoint-15", "checkpoint-16", "checkpoint-17"),
    ]


def test_an_overtaken_attempt_moves_and_deletes_nothing(tmp_path: Path) -> None:
    begin(tmp_path)
    begin(tmp_path, 15, after=10)
    (tmp_path / "checkpoint-25").mkdir()

    def refuse() -> None:
        raise OvertakenError("attempt 5 has begun")

    with pytest.raises(OvertakenError):
        move_stale(tmp_path, RUN, 20, refuse)
    assert (tmp_path / "checkpoint-25").is_dir()
    assert [path.name for path in tmp_path.glob("_cloudtrain/stale/*")] == ["checkpoint-15"]


def test_a_damaged_or_forged_record_deletes_nothing(tmp_path: Path) -> None:
    begin(tmp_path)
    begin(tmp_path, 15, after=10)
    (tmp_path / "_cloudtrain/stale.json").write_bytes(b"{")
    assert begin(tmp_path, 25, after=20) == ["checkpoint-15", "checkpoint-25"]
    (tmp_path / "mine").mkdir()
    forged = json.dumps({"run_url": RUN, "moved": ["../../mine", 5]})
    (tmp_path / "_cloudtrain/stale.json").write_text(forged)
    begin(tmp_path, 35, after=30)
    assert (tmp_path / "mine").exists()
