"""A report callback whose service is down: training is held up by few tries to start it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from transformers import TrainerCallback, TrainerControl, TrainerState

from hf_cloudtrain.integrations.trainer import reports
from hf_cloudtrain.integrations.trainer.reports import Report
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.tracking.services.service import TrackerService, TrackerStart

if TYPE_CHECKING:
    import pytest


class Down(TrackerService):
    """A service that does not answer."""

    name = "down"

    def __init__(self) -> None:
        self.tries = 0

    def new_id(self, start: TrackerStart) -> str:
        self.tries += 1
        raise ConnectionError("503")


def test_a_service_that_stays_down_is_tried_less_and_less_often_and_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage, service, callback = Storage(str(tmp_path / "run")), Down(), TrainerCallback()
    run = SimpleNamespace(
        run_url=storage.url, tracker_pages={}, tracker_storage=storage, why_apart=lambda: None
    )
    Report(run, service, callback)
    minute = 0
    monkeypatch.setattr(reports.time, "monotonic", lambda: 60.0 * minute)
    args = SimpleNamespace(output_dir=str(tmp_path), run_name=None)
    state, control = TrainerState(is_world_process_zero=True), TrainerControl()
    callback.on_train_begin(args, state, control)
    tried = {minute: service.tries}
    for minute in range(1, 200):
        callback.on_log(args, state, control, logs={"loss": 0.5})
        if service.tries > max(tried.values()):
            tried[minute] = service.tries
    assert list(tried) == [0, 5, 15, 35, 75, 135, 195]
    assert caplog.text.count("The tracker down did not start, and is tried again later.") == 1
