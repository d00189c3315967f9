"""Which tracker run an attempt goes on with, what is sent again, and that the environment stays as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.paths import TRACKERS
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.tracking.services import choice
from hf_cloudtrain.tracking.services import service as service_module
from hf_cloudtrain.tracking.services.choice import choose_run, content_of
from hf_cloudtrain.tracking.services.mlflow import MLflow
from hf_cloudtrain.tracking.services.runs import TrackerRun, TrackerRuns
from hf_cloudtrain.tracking.services.service import (
    TrackerContent,
    TrackerService,
    TrackerStart,
    register_tracker,
    tracker_services,
)
from hf_cloudtrain.tracking.services.tensorboard import TensorBoard
from hf_cloudtrain.tracking.services.trackio import Trackio

START = TrackerStart(0, Path("out"))


class Counting(TrackerService):
    """A service whose ids are numbers."""

    name = "counting"
    chosen: str | None = None
    gone: str | None = None

    def __init__(self, first: int = 1) -> None:
        self._next = first

    def users_id(self, start: TrackerStart) -> str | None:
        return self.chosen

    def new_id(self, start: TrackerStart) -> str:
        self._next += 1
        return str(self._next - 1)

    def lacks(self, tracker_id: str) -> str | None:
        return self.gone


class TestChoice:
    def test_the_first_start_makes_an_id_and_the_next_ones_take_it(self, catalog: Catalog) -> None:
        assert choose_run(catalog.storage, Counting(1), START) == TrackerRun("counting", "1", 1)
        assert choose_run(catalog.storage, Counting(7), START) == TrackerRun("counting", "1", 1)

    def test_two_starts_that_race_agree_on_the_id_of_the_one_that_was_first(self, catalog: Catalog) -> None:
        class Slow(Counting):
            def new_id(self, start: TrackerStart) -> str:
                choose_run(catalog.storage, Counting(1), START)  # while this one asks its service
                return super().new_id(start)

        assert choose_run(catalog.storage, Slow(7), START).id == "1"

    def test_another_service_has_an_id_of_its_own(self, catalog: Catalog) -> None:
        class Other(Counting):
            name = "counting-more"

        assert choose_run(catalog.storage, Counting(1), START).id == "1"
        assert choose_run(catalog.storage, Other(7), START).id == "7"
        assert choose_run(catalog.storage, Counting(3), START).id == "1"

    def test_a_run_that_is_gone_is_followed_by_one_that_names_it(self, catalog: Catalog) -> None:
        choose_run(catalog.storage, Counting(1), START)
        service = Counting(2)
        service.gone = "it was deleted"
        assert choose_run(catalog.storage, service, START) == TrackerRun(
            "counting", "2", 2, "1", "it was deleted"
        )
        assert choose_run(catalog.storage, Counting(9), START).id == "2"

    def test_the_users_id_wins_and_stays(self, catalog: Catalog, caplog: pytest.LogCaptureFixture) -> None:
        choose_run(catalog.storage, Counting(1), START)
        service = Counting(2)
        service.chosen = "mine"
        assert choose_run(catalog.storage, service, START, apart="the run starts over").id == "mine"
        assert "which the script or its environment names; the one before reported to 1" in caplog.text
        assert choose_run(catalog.storage, Counting(9), START).id == "mine"

    @pytest.mark.parametrize(
        "record",
        [b"{", b"[]", b'{"id": 3}', b'{"id": ""}', b'{"id": "a\\u001b[2J"}', b'{"id": "%s"}' % (b"x" * 501)],
    )
    def test_a_damaged_or_hostile_record_does_not_count(self, catalog: Catalog, record: bytes) -> None:
        catalog.storage.write(f"{TRACKERS}/counting-0001.json", record)
        runs = TrackerRuns(catalog.storage)
        assert runs.newest("counting") is None

    def test_a_record_costs_a_list_and_a_read(
        self, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        choose_run(catalog.storage, Counting(1), START)
        requests: list[str] = []
        for name in ("list", "read", "write", "create"):
            call = getattr(Storage, name)
            monkeypatch.setattr(
                Storage,
                name,
                lambda self, *args, call=call, name=name: (requests.append(name), call(self, *args))[1],
            )
        choose_run(catalog.storage, Counting(2), START)
        assert requests == ["list", "read"]


class Holding(Counting):
    """A service with one tracker run that is active, whatever trains, and has logs up to `last`."""

    chosen = "active"
    last = -1

    def sent(self, tracker_id: str) -> TrackerContent:
        return TrackerContent(last=self.last)


class TestShared:
    """Two trainings of one script report to the tracker run that is active: what it holds may be of either."""

    @pytest.fixture(autouse=True)
    def process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.starts(monkeypatch)

    def starts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(choice, "_reported", {})

    def content(
        self, url: str, last: int, *, step: int = 0, apart: str | None = None
    ) -> TrackerContent | None:
        storage, service = Storage(url), Holding()
        service.last = last
        run = choose_run(storage, service, TrackerStart(step, Path("out")), apart=apart)
        return content_of(storage, service, run, step)

    def test_a_second_training_leaves_nothing_out_and_neither_does_a_later_start(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = str(tmp_path / "run"), str(tmp_path / "run" / "trainer-2")
        assert self.content(first, -1) == TrackerContent(last=-1)
        assert self.content(second, 1000) is None
        self.starts(monkeypatch)
        assert self.content(second, 1000, step=500) is None, "the script has skipped the first one"
        assert self.content(first, 1000, step=1000) is None, "or resumes both"

    def test_a_tracker_run_of_the_user_with_logs_of_a_different_training(self, tmp_path: Path) -> None:
        assert self.content(str(tmp_path), 300) is None

    def test_one_training_goes_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.content(str(tmp_path), 0)
        self.starts(monkeypatch)
        assert self.content(str(tmp_path), 120, step=100) == TrackerContent(last=120)
        assert self.content(str(tmp_path), 120) == TrackerContent(last=120), (
            "killed before its first checkpoint"
        )

    def test_a_run_that_starts_over_in_the_users_tracker_run(self, tmp_path: Path) -> None:
        self.content(str(tmp_path), -1)
        assert self.content(str(tmp_path), 120, apart="the run starts over") is None


class TestSent:
    def test_a_step_up_to_the_last_one_of_its_metric_is_there(self) -> None:
        sent = TrackerContent({"loss": 4})
        assert [sent.has("loss", step, 0.0) for step in (3, 4, 5)] == [True, True, False]
        assert not sent.has("eval_loss", 1, 0.0)

    def test_where_only_the_last_step_is_known_the_values_tell_what_of_it_is_there(self) -> None:
        sent = TrackerContent(last=4, values={"loss": 0.5, "eval_loss": 0.7, "norm": "NaN"})
        assert sent.has("eval_loss", 3, 0.9)
        assert sent.has("loss", 4, 0.5)
        assert sent.has("norm", 4, float("nan"))
        assert not sent.has("eval_loss", 4, 0.6)
        assert not sent.has("accuracy", 4, 0.6)
        assert not sent.has("loss", 5, 0.5)


def test_variables_are_set_only_while_a_service_starts_and_those_of_the_user_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    before = dict(os.environ)
    with MLflow().patiently({"MLFLOW_RUN_ID": "4bc"}):
        assert os.environ["MLFLOW_RUN_ID"] == "4bc"
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"
        del os.environ["MLFLOW_RUN_ID"]  # as MLflow does
    assert dict(os.environ) == before


def test_names_of_metrics_are_those_of_the_trainer_callbacks() -> None:
    assert [TensorBoard().metric(name) for name in ("loss", "eval_loss", "test_f1")] == [
        *("train/loss", "eval/loss", "test/f1")
    ]
    assert MLflow().metric("eval_f1(macro)") == "eval_f1_macro_"


@pytest.mark.parametrize("folder", ["/etc", "../../elsewhere", "runs/../../x"])
def test_a_record_cannot_make_event_files_outside_of_the_output_folder(folder: str) -> None:
    assert TensorBoard().lacks(folder) is not None


def test_event_files_have_nothing_beyond_the_step_from_which_training_resumes(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "runs" / "one")) as writer:
        for step in range(1, 7):
            writer.add_scalar("train/loss", 0.5, step)
    callback = SimpleNamespace(tb_writer=None, logging_dir=None)
    service = TensorBoard()
    service.before_start(callback, None, "runs/one", TrackerStart(4, tmp_path))
    assert dict(service.sent("runs/one").steps) == {"train/loss": 4}
    callback.tb_writer.close()
    again = EventAccumulator(str(tmp_path / "runs" / "one"))
    again.Reload()
    assert [event.step for event in again.Scalars("train/loss")] == [1, 2, 3, 4]


def test_a_name_in_trackio_is_unique(tmp_path: Path) -> None:
    start = TrackerStart(0, tmp_path, run_name="my run/1")
    first, second = Trackio().new_id(start), Trackio().new_id(start)
    assert first != second
    assert first.startswith("my-run-1-")


def test_no_package_of_a_service_is_imported_to_know_it() -> None:
    code = (
        "import sys; from hf_cloudtrain.tracking.services.service import tracker_services; tracker_services();"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'wandb', 'mlflow', 'trackio', 'tensorboard', 'torch'}))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_one_more_service_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "_services", {})
    assert sorted(tracker_services()) == ["mlflow", "tensorboard", "trackio", "wandb"]
    register_tracker(Counting())
    assert "counting" in tracker_services()


@pytest.mark.parametrize(
    ("is_users", "auto_end", "ended"), [(False, True, 1), (True, True, 0), (False, False, 0)]
)
def test_mlflow_ends_again_only_a_run_that_its_callback_has_begun(
    monkeypatch: pytest.MonkeyPatch, is_users: bool, auto_end: bool, ended: int
) -> None:
    ends: list[str] = []
    active = object() if is_users else None
    mlflow = SimpleNamespace(active_run=lambda: active, end_run=lambda: ends.append("end"))
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setattr(MLflow, "_steps", lambda service, tracker_id: {})
    monkeypatch.setenv("MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE", "1")
    service, callback = MLflow(), SimpleNamespace(_auto_end_run=auto_end)
    service.before_start(callback, SimpleNamespace(), "4bc", TrackerStart(0, Path("out")))
    assert service.end_again(callback) is bool(ended)
    assert len(ends) == ended
