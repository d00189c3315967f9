"""Trainer and TrainLoop on a disk that fails and with unavailable storage: committed checkpoints stay, and are exact."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints import upload_queue
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.storage import client, retries
from hf_cloudtrain.storage.names import LOCAL
from hf_cloudtrain.testing import FaultyDisk, FaultyStorage
from tests.faults.small_disk import why_impossible
from tests.integration._lab import Lab, problems
from tests.integration._loops import Rows, difference, train

MISHAPS = "tests.integration._mishaps"


class TestTrainer:
    @pytest.mark.parametrize(
        ("trouble", "text"), [("full", "No space left on device"), ("read-only", "Read-only file system")]
    )
    def test_a_disk_that_fails_stops_training_with_an_error_and_a_new_machine_continues(
        self, lab: Lab, trouble: str, text: str
    ) -> None:
        if reason := why_impossible():
            pytest.skip(f"no small disk can be mounted here: {reason}")
        lab.plain()
        said = lab.fails("first", "bad_disk", module=MISHAPS, trouble=trouble, at=6, committed=4)
        assert text in said
        assert lab.steps() == [4]
        assert lab.problems() == []
        assert lab.train("second").value["step"] == 12
        assert lab.difference("second") == 0.0

    def test_a_disk_without_space_for_a_snapshot_costs_one_checkpoint_and_not_the_training(
        self, lab: Lab
    ) -> None:
        lab.plain()
        child = lab.train("first", "no_room_for_a_snapshot", module=MISHAPS)
        assert "checkpoint-4 could not be kept for upload" in child.log
        assert "No space left on device" in child.log
        assert lab.steps() == [8, 12]
        assert lab.difference("first") == 0.0


class TestLoop:
    def test_a_disk_without_space_for_a_snapshot_costs_one_checkpoint_and_not_the_training(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        plain, _, _ = train(tmp_path / "plain", tmp_path / "uninterrupted", Rows(20))
        with FaultyDisk(tmp_path / "out" / LOCAL / "outbox", times=1):
            weights, _, _ = train(tmp_path / "run", tmp_path / "out", Rows(20))
        assert "checkpoint-2 could not be kept for upload" in caplog.text
        assert difference(plain, weights) == 0.0
        assert problems(Catalog(client.Storage(str(tmp_path / "run")))) == []

    def test_after_an_outage_during_training_everything_is_committed_and_exact(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(retries, "PAUSES", (0.01,))
        monkeypatch.setattr(upload_queue, "PAUSES", (0.01,))
        monkeypatch.setattr(upload_queue, "MAX_WAITING", 100)
        plain, _, _ = train(tmp_path / "plain", tmp_path / "uninterrupted", Rows(20))
        script = FaultyStorage(str(tmp_path / "run"))
        with script.everywhere():

            def weather(loop: object) -> None:
                step = loop.global_step  # type: ignore[attr-defined]
                if step == 1:
                    script.fail("any", times=10**9)
                elif step == 9:
                    script.heal()

            weights, _, _ = train(tmp_path / "run", tmp_path / "out", Rows(20), inside=weather)
        catalog = Catalog(client.Storage(str(tmp_path / "run")))
        assert [key.step for key in catalog.checkpoints()] == [2, 4, 5, 6, 8, 10]
        assert problems(catalog) == []
        assert difference(plain, weights) == 0.0
