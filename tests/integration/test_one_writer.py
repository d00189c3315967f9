"""Law 6 in real trainings: of two that train one run, the newer one continues, and the older one stops with an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.errors import OvertakenError
from hf_cloudtrain.integrations.loop.loop import TrainLoop
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.tracking.history import read_history
from tests.faults.runs import wait_until
from tests.integration import _loops
from tests.integration._lab import Lab

OFTEN = {"HF_CLOUDTRAIN_HEARTBEAT": "0.1"}


def test_law_6_of_two_live_trainers_exactly_one_trains_to_the_end(lab: Lab) -> None:
    """The first one sleeps at step 6 until it is overtaken, and wakes while the second one trains."""
    first = lab.start("first", "zombie", module="tests.integration._mishaps", at=6, env=OFTEN)
    lab.wait_until(lambda: lab.steps() == [4] or first.poll() is not None)
    second = lab.train("second", env=OFTEN)
    assert first.wait() == 1, first.log

    assert "OvertakenError: Attempt 1 of" in first.log
    assert "overtaken by attempt 2, which began on host" in first.log
    assert second.value["restored"] == str(lab.machine("second") / "checkpoint-4")
    assert second.value["step"] == 12
    assert lab.keys() == ["000001-0000000004", "000002-0000000008", "000002-0000000012"]
    assert lab.problems() == []
    assert [info.state for info in read_history(lab.run_url).attempts] == ["overtaken", "finished"]


def test_law_6_an_overtaken_loop_stops_and_writes_no_more_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_CLOUDTRAIN_HEARTBEAT", "0.05")
    catalog = Catalog(Storage(str(tmp_path / "run")))

    def overtake(loop: TrainLoop) -> None:
        if loop.global_step == 3 and loop._checkpointer.overtaken_by is None:
            loop._checkpointer.wait()
            catalog.attempts.begin(0.0, 2, None, {"host": "elsewhere"})
            wait_until(lambda: loop._checkpointer.overtaken_by, "the look")

    with pytest.raises(OvertakenError, match=r"attempt 2, which began on host 'elsewhere'"):
        _loops.train(tmp_path / "run", tmp_path / "out", _loops.Rows(20), inside=overtake)
    _loops.forget_accelerate()
    assert [key.step for key in catalog.checkpoints()] == [2]
    assert catalog.attempts.read_progress(1)["state"] == "overtaken"
