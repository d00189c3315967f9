"""A stop file, `cloudtrain run stop`, and the watcher that looks at every source without letting one delay another."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.errors import StorageUnavailableError
from hf_cloudtrain.preemption.sources import (
    Notice,
    NoticeWatcher,
    StopFile,
    StopRequest,
    default_sources,
    pending,
)
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.testing import FaultyStorage
from tests.faults.runs import wait_until
from tests.servers import Server
from tests.unit.preemption._sources import Hung, Received, Silent, watching


class TestStopFile:
    def test_gives_notice_when_it_appears(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "stop"
        monkeypatch.setenv(env.STOP_FILE, str(path))
        sources = default_sources()
        received = Received()
        for source in sources:
            source.pause = 0.01
        with watching(*sources, on_notice=received):
            path.touch()
            wait_until(lambda: received.notices, "the notice")
        assert received.notices == [Notice(f"the file {str(path)!r}", None)]

    def test_without_a_name_there_is_no_such_source(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(env.STOP_FILE, "")
        assert default_sources() == []


class TestStopRequest:
    def begin(self, catalog: Catalog) -> int:
        return catalog.attempts.begin(0.0, 0, None, {}).number

    def test_stops_the_newest_attempt_of_that_moment(self, catalog: Catalog) -> None:
        attempt = self.begin(catalog)
        source = StopRequest(catalog, attempt)
        assert source.look() is None
        assert catalog.attempts.request_stop(1.8e9, {"user": "ada"}) == 1
        assert source.look() == Notice("`cloudtrain run stop` for attempt 1", None)

    def test_stops_an_overtaken_attempt_too(self, catalog: Catalog) -> None:
        old, _ = self.begin(catalog), self.begin(catalog)
        catalog.attempts.request_stop(1.8e9, {})
        assert StopRequest(catalog, old).look() is not None

    def test_does_not_stop_an_attempt_that_a_person_starts_later(self, catalog: Catalog) -> None:
        self.begin(catalog)
        catalog.attempts.request_stop(1.8e9, {})
        assert pending(default_sources(catalog)) is None
        assert StopRequest(catalog, self.begin(catalog)).look() is None

    def test_stops_the_restart_that_a_launcher_makes_by_itself(
        self, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert pending(default_sources(catalog)) is None, "the run has no attempt yet"
        self.begin(catalog)
        assert pending(default_sources(catalog)) is None
        catalog.attempts.request_stop(1.8e9, {})
        assert pending(default_sources(catalog)) == Notice("`cloudtrain run stop` for attempt 1", None)
        self.begin(catalog)  # by hand, and this one crashes: the launcher may restart it
        assert pending(default_sources(catalog)) is None

    def test_for_a_run_without_attempts_writes_nothing(self, catalog: Catalog) -> None:
        assert catalog.attempts.request_stop(1.8e9, {}) is None
        assert catalog.storage.list("") == []

    def test_records_user_and_time(self, catalog: Catalog) -> None:
        self.begin(catalog)
        catalog.attempts.request_stop(1.8e9, {"user": "ada", "attempt": "99"})
        record = json.loads(catalog.storage.read(".cloudtrain/stop.json"))
        assert record == {"user": "ada", "attempt": 1, "time": 1.8e9}

    @pytest.mark.parametrize(
        "record", ["", "{", "[]", '{"attempt": "1"}', '{"attempt": true}', '{"attempt": 1.5}', "{}"]
    )
    def test_a_damaged_request_stops_nothing(self, catalog: Catalog, record: str) -> None:
        self.begin(catalog)
        catalog.storage.write(".cloudtrain/stop.json", record.encode())
        assert not catalog.attempts.stop_requested(1)

    def test_is_looked_for_at_every_heartbeat(
        self, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert StopRequest(catalog, 1).pause == 15.0
        monkeypatch.setenv(env.HEARTBEAT, "3")
        assert StopRequest(catalog, 1).pause == 3.0

    def test_a_storage_error_gives_no_notice_and_the_next_look_finds_it(
        self, tmp_path: Path, no_pauses: None
    ) -> None:
        faulty = FaultyStorage(f"file://{tmp_path / 'run'}")
        catalog = Catalog(faulty)
        self.begin(catalog)
        catalog.attempts.request_stop(1.8e9, {})
        faulty.fail("read", times=1000)
        source = StopRequest(catalog, 1)
        with pytest.raises(StorageUnavailableError):
            source.look()
        assert pending([source]) is None
        faulty.heal()
        assert pending([source]) is not None

    def test_reaches_a_run_on_s3(self, moto: Server) -> None:
        storage = Storage(f"s3://{moto.bucket}/notices/run", moto.storage_options)
        catalog = Catalog(storage)
        attempt = self.begin(catalog)
        source = StopRequest(catalog, attempt)
        assert source.look() is None
        another = Catalog(Storage(storage.url, moto.storage_options))
        another.attempts.request_stop(1.8e9, {})
        assert source.look() is not None


class TestWatcher:
    def test_passes_on_the_first_notice_once_and_stops_looking(self, tmp_path: Path) -> None:
        (tmp_path / "one").touch()
        (tmp_path / "two").touch()
        received, silent = Received(), Silent()
        sources = [StopFile(str(tmp_path / "one")), StopFile(str(tmp_path / "two")), silent]
        watcher = NoticeWatcher(sources, received)
        watcher.start()
        for thread in watcher._threads:
            thread.join(60)
        assert len(received.notices) == 1
        assert not any(thread.is_alive() for thread in watcher._threads)

    def test_a_source_that_hangs_delays_no_other(self, tmp_path: Path) -> None:
        received, hung = Received(), Hung()
        path = tmp_path / "stop"
        source = StopFile(str(path))
        source.pause = 0.01
        with watching(hung, source, on_notice=received):
            path.touch()
            wait_until(lambda: received.notices, "the notice of the file")
            assert hung.looks == 0
            hung.go_on.set()

    def test_looks_at_each_source_at_its_own_pace(self) -> None:
        eager, patient = Silent(), Silent()
        patient.pause = 3600.0
        with watching(eager, patient, on_notice=Received()):
            wait_until(lambda: eager.looks > 20 and patient.looks, "many looks at one of them")
            assert patient.looks == 1

    def test_looks_again_after_a_source_raised(self) -> None:
        class Broken(Silent):
            def look(self) -> Notice | None:
                super().look()
                raise ZeroDivisionError

        broken = Broken()
        with watching(broken, on_notice=Received()):
            wait_until(lambda: broken.looks > 2, "more looks at it")

    def test_survives_an_error_of_on_notice(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        def broken(notice: Notice) -> None:
            raise KeyError(notice.source)

        path = tmp_path / "stop"
        path.touch()
        with watching(StopFile(str(path)), on_notice=broken):
            wait_until(lambda: "KeyError" in caplog.text, "the warning")
        assert "StopFile" in caplog.text

    def test_passes_nothing_on_once_closed(self) -> None:
        class Late(Hung):
            def look(self) -> Notice | None:
                super().look()
                return Notice("late")

        received, late = Received(), Late()
        watcher = NoticeWatcher([late], received)
        watcher.start()
        closing = threading.Thread(target=watcher.close)
        closing.start()
        wait_until(watcher._over.is_set, "the request to close")
        late.go_on.set()
        closing.join()
        assert late.looks == 1, "close waits for a look under way"
        assert received.notices == []

    def test_is_closed_at_once_though_the_next_look_is_far(self) -> None:
        silent = Silent()
        silent.pause = 3600.0
        with watching(silent, on_notice=Received()) as watcher:
            wait_until(lambda: silent.looks, "the first look")
        assert not any(thread.is_alive() for thread in watcher._threads)

    def test_may_be_closed_by_on_notice(self, tmp_path: Path) -> None:
        received: list[Notice] = []

        def receive(notice: Notice) -> None:
            watcher.close()
            received.append(notice)

        watcher = NoticeWatcher([StopFile(str(tmp_path))], receive)
        watcher.start()
        wait_until(lambda: received, "the notice")

    def test_neither_outlives_its_process_nor_enters_a_forked_child(self) -> None:
        ended = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", HUNG], capture_output=True, timeout=60, check=False
        )
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"0", b"")


HUNG = """
import os, sys, threading
from hf_cloudtrain.preemption import sources
sources.CLOSE_SECONDS = 0.1
class Hung:
    pause = 1
    def look(self): threading.Event().wait()
watcher = sources.NoticeWatcher([Hung()], print)
watcher.start()
child = os.fork()
if child == 0:
    watcher.close()
    os._exit(threading.active_count() - 1)
sys.stdout.write(str(os.waitpid(child, 0)[1]))
"""


class TestPending:
    def test_finds_the_notice_that_is_pending(self, tmp_path: Path) -> None:
        assert pending([Silent(), StopFile(str(tmp_path))]) == Notice(f"the file {str(tmp_path)!r}")

    def test_is_none_where_no_source_has_a_notice(self) -> None:
        silent = Silent()
        assert pending([silent]) is None
        assert silent.looks == 1
        assert pending([]) is None

    def test_does_not_wait_for_a_source_that_hangs(self, tmp_path: Path) -> None:
        hung = Hung()
        assert pending([hung, StopFile(str(tmp_path))]) is not None
        assert pending([hung, Silent()], seconds=0.05) is None
        hung.go_on.set()
