"""Requests without a byte or an answer are given up."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain import errors
from hf_cloudtrain.runtime import patience, threads
from hf_cloudtrain.storage import client, silence
from hf_cloudtrain.testing import FaultyStorage
from tests.unit.storage.fake_backend import FakeBackend, connected_to

ROOT = Path(__file__).resolve().parents[3]


class TestSilence:
    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(silence, "SILENCE", 0.1)
        monkeypatch.setattr(threads, "TURN", 0.01)

    def test_a_request_that_hangs_is_given_up_and_made_again_over_a_new_connection(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        connections: list[str] = []
        connect = client.connect

        def counted(url: str, *arguments: Any) -> Any:
            connections.append(url)
            return connect(url, *arguments)

        monkeypatch.setattr(client, "connect", counted)
        faulty = FaultyStorage(f"file://{tmp_path}")
        faulty.hang("write")
        faulty.write("record", b"x")
        assert faulty.read("record") == b"x"
        assert (len(connections), faulty.count("write")) == (2, 2)
        faulty.heal()

    def test_a_request_that_hangs_twice_is_an_error_with_the_time_that_it_took(self, tmp_path: Path) -> None:
        faulty = FaultyStorage(f"file://{tmp_path}")
        faulty.hang("write", times=100)
        with pytest.raises(errors.StorageUnavailableError, match="no answer and no byte for 0 s"):
            faulty.write("record", b"x")
        assert faulty.count("write") == 2, "it must not be tried for an hour"
        faulty.heal()

    def test_slow_bytes_are_not_silence(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Slow(FakeBackend):
            def upload(self, source: Any, path: str, on_bytes: Callable[[int], None]) -> str:
                self.calls += 1
                for _ in range(30):
                    time.sleep(0.04)
                    on_bytes(1)
                return "0" * 32

        monkeypatch.setattr(silence, "SILENCE", 0.6)
        (tmp_path / "source").write_bytes(bytes(30))
        backend = Slow()
        connected_to(monkeypatch, backend).upload(str(tmp_path / "source"), "model.bin")
        assert backend.calls == 1

    def test_a_request_that_was_given_up_and_still_runs_does_not_disturb_a_later_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        late, over = threading.Event(), threading.Event()

        class Waking(FakeBackend):
            def download(self, path: str, target: Any, size: int, on_bytes: Callable[[int], None]) -> str:
                self.calls += 1
                if self.calls == 1:
                    late.wait()
                    target.write(b"x" * size)
                    on_bytes(size)
                    over.set()
                else:
                    target.write(b"good")
                    late.set()
                    over.wait()
                    target.write(b" data")
                    on_bytes(size)
                return "0" * 32

        heard: list[int] = []
        target = tmp_path / "target"
        connected_to(monkeypatch, Waking()).download("model.bin", str(target), 9, on_bytes=heard.append)
        assert target.read_bytes() == b"good data"
        assert sum(heard) == 9

    def test_a_wait_of_a_minute_logs_a_warning(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(silence, "SAY_AFTER", 0.02)
        faulty = FaultyStorage(f"file://{tmp_path}")
        faulty.hang("write")
        faulty.write("record", b"x")
        faulty.heal()
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert said == [f"Waiting to write 'file://{tmp_path}/record': no answer for 0 s."]

    def test_a_command_says_which_request_has_no_answer(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(patience, "PATIENCE", 0.02)
        faulty, said = FaultyStorage(f"file://{tmp_path}"), list[str]()
        with silence.slow_requests_told(said.append):
            faulty.write("fast", b"x")
            assert not said
            faulty.hang("write")
            faulty.write("record", b"x")
        faulty.heal()
        assert said[0] == f"Waiting to write 'file://{tmp_path}/record': no answer for 0 s."
        assert len(said) < 4, "less and less often"
        count = len(said)
        faulty.hang("write")
        faulty.write("later", b"x")
        faulty.heal()
        assert len(said) == count

    def test_a_process_ends_although_a_request_hangs(self, tmp_path: Path) -> None:
        code = (
            "import sys, threading\n"
            "from hf_cloudtrain.testing import FaultyStorage\n"
            "faulty = FaultyStorage(sys.argv[1])\n"
            "faulty.hang('write')\n"
            "threading.Thread(target=faulty.write, args=('x', b'1'), daemon=True).start()\n"
            "while not faulty.count('write'): pass\n"
        )
        command = [sys.executable, "-c", code, str(tmp_path)]
        assert subprocess.run(command, cwd=ROOT, check=False, timeout=30).returncode == 0
