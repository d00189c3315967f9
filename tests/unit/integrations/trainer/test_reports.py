"""A report callback: its service is down, or its run has ended with the training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState

from hf_cloudtrain.integrations.trainer import reports
from hf_cloudtrain.integrations.trainer.reports import Report
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.tracking.services.service import TrackerService, TrackerStart


class Ending(TrackerService):
    """Ends its run with the training, as MLflow does; `ends` is whether it can end it again."""

    name = "ending"
    ends_with_training = True

    def __init__(self, *, ends: bool) -> None:
        self.ends, self.ended = ends, 0

    def new_id(self, start: TrackerStart) -> str:
        return "1"

    def end_again(self, callback: object) -> bool:
        self.ended += 1
        return self.ends


class Noting(TrainerCallback):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.heard.append("begin")

    def on_log(self, *_: object, **__: object) -> None:
        self.heard.append("log")

    def on_train_end(self, *_: object, **__: object) -> None:
        self.heard.append("end")


@pytest.mark.parametrize("ends", [True, False])
def test_a_run_that_an_evaluation_after_the_training_starts_again_is_ended_again(
    tmp_path: Path, ends: bool
) -> None:
    storage, service, callback = Storage(str(tmp_path / "run")), Ending(ends=ends), Noting()
    run = SimpleNamespace(
        run_url=storage.url,
        tracker_pages={},
        tracker_storage=storage,
        why_apart=lambda: None,
        is_leaving=False,
    )
    Report(run, service, callback)
    args = SimpleNamespace(output_dir=str(tmp_path), run_name=None)
    state, control = TrainerState(is_world_process_zero=True), TrainerControl()

    def evaluate() -> None:
        callback.on_log(args, state, control, logs={"eval_loss": 0.5})

    evaluate()
    callback.on_train_begin(args, state, control)
    evaluate()
    assert service.ended == 0, "before the end of the training the run stays active"
    callback.on_train_end(args, state, control)
    evaluate()
    evaluate()
    assert service.ended == 2
    again = ["begin", "log", "begin", "log"] if ends else ["begin", "log", "log"]
    assert callback.heard == ["begin", "log", "begin", "log", "end", *again]
    callback.on_train_begin(args, state, control)
    evaluate()
    assert service.ended == 2, "nor is it in the next training"


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
