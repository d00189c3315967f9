"""The page that lives with a run: renewed after commits, complete at the end, and never in the way of the training."""

from __future__ import annotations

import base64
import gzip
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.leftovers import find
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.run_deletion import RunContents, delete_run
from hf_cloudtrain.checkpoints.upload_status import Commit, UploadStatus
from hf_cloudtrain.errors import ConfigurationError, MissingExtraError
from hf_cloudtrain.integrations.functions.api import init
from hf_cloudtrain.integrations.lifecycle import AttemptLifecycle
from hf_cloudtrain.report import live, page
from hf_cloudtrain.report.live import LivePage, write_page
from hf_cloudtrain.testing import FaultyStorage
from tests.recorded import BEGAN, record_attempt, record_run
from tests.recorded import write as record


@pytest.fixture
def small_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "packed_plotly", lambda: b"plotly")


def text_at(catalog: Catalog) -> str:
    return catalog.storage.read("index.html").decode()


def content_at(catalog: Catalog) -> str:
    """Key figures and tables."""
    found = re.search(r'<dl class="figures">.*</table>', text_at(catalog), re.DOTALL)
    assert found
    return found[0]


def commit(uploads: UploadStatus, step: int) -> None:
    uploads.committed(Commit(CheckpointKey(1, step), 0.0, 1.0))


class TestPage:
    """What the page beside a run says."""

    pytestmark = pytest.mark.usefixtures("small_library")

    def test_while_the_run_is_alive_it_asks_for_a_newer_one(self, catalog: Catalog) -> None:
        record_attempt(catalog, began=time.time() - 100, steps=range(1, 101), lag=1.0)
        write_page(catalog)
        html = text_at(catalog)
        assert 'id="live"' in html
        assert "Last written on" in html
        assert "connect-src 'self'" in html
        assert "was not over when" not in html

    def test_of_a_finished_run_it_is_complete_and_asks_for_nothing(self, catalog: Catalog) -> None:
        record_run(catalog)
        write_page(catalog)
        html = text_at(catalog)
        assert "The run is complete." in html
        assert "fetch(" not in html
        assert "connect-src" not in html

    @pytest.mark.parametrize(("state", "asks"), [("preempted", True), ("failed", False), ("stopped", False)])
    def test_after_a_preemption_it_waits_for_the_next_attempt(
        self, catalog: Catalog, state: str, asks: bool
    ) -> None:
        record_attempt(catalog, began=BEGAN, steps=range(1, 61), state=state)
        write_page(catalog)
        assert ('id="live"' in text_at(catalog)) is asks

    def test_secrets_of_the_environment_are_not_on_it(
        self, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MY_SECRET", "pa55word-of-me")
        facts = {"command": "train.py pa55word-of-me"}
        record_attempt(catalog, began=BEGAN, steps=range(1, 61), facts=facts)
        write_page(catalog)
        assert "pa55word-of-me" not in text_at(catalog)
        assert "train.py ***" in text_at(catalog)

    def test_it_reads_again_only_what_is_new(self, tmp_path: Path) -> None:
        store, records = FaultyStorage(f"file://{tmp_path}/mnli"), tmp_path / "records.zip"
        catalog = Catalog(store)
        record_run(catalog)
        write_page(catalog, records=records)
        before = len(store.calls)
        write_page(catalog, check=False, records=records)
        asked = [call.kind for call in store.calls[before:]]
        assert asked.count("list") == 2, "everything, and whether the run was deleted meanwhile"
        assert asked.count("read") == 3, "the heartbeat, which checkpoint is the best, and the newest attempt"
        number = record_attempt(
            catalog, began=BEGAN + 900, steps=range(401, 441), resumed_from=CheckpointKey(3, 400)
        )
        catalog.point("best", CheckpointKey(3, 400), 0.3)
        before = len(store.calls)
        write_page(catalog, check=False, records=records)
        read = {call.path.rpartition("/")[2] for call in store.calls[before:] if call.kind == "read"}
        assert read == {f"{number:06d}.json", f"{number:06d}-0001.jsonl", "best.json"}
        found = content_at(catalog)
        assert "checkpoint-400" in found
        write_page(catalog)
        assert content_at(catalog) == found
        records.write_bytes(b"PK damaged")
        write_page(catalog, records=records)
        assert content_at(catalog) == found

    def test_a_file_of_the_user_with_its_name_stays(self, catalog: Catalog) -> None:
        record_run(catalog)
        catalog.storage.write("index.html", b"<h1>my own</h1>")
        with pytest.raises(ConfigurationError, match="was not written by this package"):
            write_page(catalog)
        assert catalog.storage.read("index.html") == b"<h1>my own</h1>"

    def test_100_000_steps_and_a_metric_of_10_mb_are_at_most_3_mb(
        self, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.undo()
        number = record_attempt(catalog, began=BEGAN, steps=range(1, 2), save_steps=999)
        record(catalog, number, [{"kind": "steps", "first": 1, "seconds": [0.1] * 100_000, "time": BEGAN}])
        values = [
            {"kind": "log", "step": step, "time": BEGAN, "metrics": {"loss": 1.0 + step % 97 / 1e3}}
            for step in range(0, 100_000, 10)
        ]
        values.append({"kind": "log", "step": 7, "time": BEGAN, "metrics": {"eval_text": "x" * 10_000_000}})
        values.append({"kind": "log", "step": 8, "time": BEGAN, "metrics": {"eval_" + "y" * 10_000_000: 1.0}})
        record(catalog, number, values, 2)
        assert write_page(catalog) <= 3_000_000


class TestRenewal:
    """When the page is renewed, and what happens if it cannot be."""

    @pytest.fixture
    def started(self, monkeypatch: pytest.MonkeyPatch, catalog: Catalog) -> Iterator[dict[str, Any]]:
        """A page whose renewals are counted, and whose clock is ours."""
        found: dict[str, Any] = {"uploads": UploadStatus(), "renewed": 0, "now": 1000.0}
        changed = threading.Condition()

        def renew(limit: float, *, kill: bool = True) -> None:
            with changed:
                found["renewed"] += 1
                changed.notify_all()

        def wait_for(count: int) -> bool:
            with changed:
                return changed.wait_for(lambda: found["renewed"] >= count, 30)

        monkeypatch.setattr(live, "LOOK_SECONDS", 0.01)
        monkeypatch.setattr(live.time, "monotonic", lambda: found["now"])
        page = LivePage(catalog.storage, found["uploads"])
        monkeypatch.setattr(page, "_renew", renew)
        page.start()
        found |= {"page": page, "wait_for": wait_for}
        yield found
        page.close(last=False)

    def test_at_the_start_after_a_commit_and_at_most_once_a_minute(self, started: dict[str, Any]) -> None:
        assert started["wait_for"](1)
        commit(started["uploads"], 50)
        started["now"] += live.SHORTEST_SECONDS - 1
        seen = threading.Event()
        assert not seen.wait(0.2)
        assert started["renewed"] == 1
        started["now"] += 1
        assert started["wait_for"](2)
        started["now"] += live.SHORTEST_SECONDS
        assert not seen.wait(0.2)
        assert started["renewed"] == 2, "nothing was committed"
        started["now"] += live.RENEWED_SECONDS
        assert started["wait_for"](3), "a page must not look like that of a killed run"

    def test_at_the_end_once_more_and_then_never(self, started: dict[str, Any]) -> None:
        assert started["wait_for"](1)
        started["page"].close(last=True)
        started["page"].close(last=True)
        assert started["renewed"] == 2
        assert not started["page"]._thread.is_alive()

    def test_a_process_that_fails_is_named_once_and_the_next_one_tries_again(
        self, catalog: Catalog, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        record_run(catalog)
        catalog.storage.write("index.html", b"<h1>my own</h1>")
        page = LivePage(catalog.storage, UploadStatus())
        page._renew(60)
        page._renew(60)
        (warning,) = caplog.records
        assert "was not renewed; training continues. " in warning.getMessage()
        assert "Move it, or train without page=True." in warning.getMessage()
        catalog.storage.delete(["index.html"])
        page._renew(60)
        assert "The run is complete." in text_at(catalog)
        packed = re.search(r'id="records"[^>]*>(.*?)</script>', text_at(catalog), re.DOTALL)
        assert packed
        assert json.loads(gzip.decompress(base64.b64decode(packed[1])))[0]["name"] == "loss"

    def test_a_process_that_hangs_is_ended(
        self, catalog: Catalog, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            live.own_process, "command", lambda code: [sys.executable, "-c", "import time; time.sleep(600)"]
        )
        page = LivePage(catalog.storage, UploadStatus())
        page._renew(0.2)
        assert page._child is not None
        assert page._child.poll() is not None
        assert "takes longer than" in caplog.text

    def test_credentials_are_in_no_command_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from hf_cloudtrain.storage.client import Storage

        seen: list[Any] = []

        def popen(command: list[str], **options: Any) -> Any:
            seen.append((command, options["env"]))
            raise OSError("no process")

        monkeypatch.setattr(subprocess, "Popen", popen)
        page = LivePage(Storage("s3://bucket/run", {"secret": "s3cret-of-the-bucket"}), UploadStatus())
        with pytest.raises(OSError, match="no process"):
            page._renew(1)
        assert "s3cret-of-the-bucket" not in repr(seen)

    def test_options_that_no_process_can_receive_are_named(
        self, catalog: Catalog, caplog: pytest.LogCaptureFixture
    ) -> None:
        page = LivePage(catalog.storage, UploadStatus())
        page._job["options"] = {"session": object()}
        page._renew(1)
        assert "storage options cannot be passed to a different process" in caplog.text


class TestDeletion:
    """The page belongs to its run."""

    pytestmark = pytest.mark.usefixtures("small_library")

    def test_it_is_deleted_with_its_run_and_not_written_again(self, catalog: Catalog) -> None:
        record_run(catalog)
        write_page(catalog)
        assert "index.html" in [info.path for info in RunContents.of(catalog).objects]
        assert delete_run(catalog, RunContents.of(catalog), {"deleted": "by a test"}) == []
        assert [info.path for info in catalog.storage.list("")] == [".cloudtrain/attempts/000004.json"]
        assert write_page(catalog) == 0
        assert [info.path for info in catalog.storage.list("")] == [".cloudtrain/attempts/000004.json"]

    def test_a_file_of_the_user_is_not(self, catalog: Catalog) -> None:
        record_run(catalog)
        catalog.storage.write("index.html", b"<h1>my own</h1>")
        assert [info.path for info in RunContents.of(catalog).foreign] == ["index.html"]

    def test_it_is_not_a_left_over(self, catalog: Catalog) -> None:
        record_run(catalog)
        before = find(catalog)
        write_page(catalog)
        assert find(catalog) == before


class TestWanted:
    """Who asks for a page."""

    def test_by_argument_or_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert not live.is_wanted(None)
        assert live.is_wanted(True)
        monkeypatch.setenv(env.PAGE, "1")
        assert live.is_wanted(None)
        assert not live.is_wanted(False)
        monkeypatch.setenv(env.PAGE, "yes")
        with pytest.raises(ConfigurationError, match=r"HF_CLOUDTRAIN_PAGE is 'yes'\. Set it to 1 or 0\."):
            live.is_wanted(None)

    def test_callback_and_loop_ask_for_it(self, tmp_path: Path) -> None:
        from accelerate import Accelerator

        from hf_cloudtrain.integrations.loop.loop import TrainLoop
        from hf_cloudtrain.integrations.trainer.cloud_callback import CloudTrainCallback
        from hf_cloudtrain.integrations.trainer.session import Session

        url = str(tmp_path / "run")
        callback = CloudTrainCallback(url, page=True)
        assert Session.of(url, None, fresh=False).has_page
        assert callback is not None, "the session lives as long as the callback"
        loop = TrainLoop(
            Accelerator(cpu=True),
            str(tmp_path / "loop"),
            num_epochs=1,
            output_dir=tmp_path / "out",
            page=True,
        )
        assert loop._lifecycle.has_page
        loop._lifecycle.close()

    def test_without_its_packages_training_does_not_begin(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "plotly", None)
        with pytest.raises(MissingExtraError, match=r"The page of a run needs .* 'hf_cloudtrain\[report\]'"):
            init(10, str(tmp_path / "run"), page=True)

    @pytest.mark.parametrize(
        ("outcome", "last"), [("finished", True), ("failed", True), ("overtaken", False)]
    )
    def test_an_attempt_that_was_overtaken_leaves_the_page_to_the_newer_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: Any, last: bool
    ) -> None:
        closed: list[bool] = []
        monkeypatch.setattr(LivePage, "start", lambda self: None)
        monkeypatch.setattr(LivePage, "close", lambda self, *, last: closed.append(last))
        lifecycle = AttemptLifecycle.of(str(tmp_path / "run"), tmp_path / "out")
        lifecycle.has_page = True
        lifecycle.begin(0, total=10)
        tracker = lifecycle.tracker
        assert tracker is not None
        lifecycle.end(outcome)
        lifecycle.close()
        assert closed == [last]
