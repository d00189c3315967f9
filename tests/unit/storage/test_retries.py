"""Which calls are tried again, and after which pause."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_cloudtrain import errors
from hf_cloudtrain.storage import client
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.retries import PAUSES, retry_after
from hf_cloudtrain.storage.silence import slow_requests_told
from tests.unit.storage.fake_backend import FakeBackend, connected_to


class TestRetries:
    def test_transient_failure_is_tried_again(
        self, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
    ) -> None:
        backend = FakeBackend(
            ConnectionResetError("reset"), TimeoutError("timed out"), OSError(errno.EIO, "500")
        )
        connected_to(monkeypatch, backend).write("record", b"x")
        assert backend.objects == {"record": b"x"}
        assert len(pauses) == 3

    def test_pauses_grow_and_are_jittered_below_their_length(
        self, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
    ) -> None:
        backend = FakeBackend(*[ConnectionResetError("reset")] * 100)
        with pytest.raises(errors.StorageUnavailableError):
            connected_to(monkeypatch, backend).write("record", b"x")
        assert backend.calls == len(PAUSES) + 1
        assert list(PAUSES) == sorted(PAUSES)
        assert all(0 < waited <= pause for waited, pause in zip(pauses, PAUSES, strict=True))

    @pytest.mark.parametrize(
        "error",
        [
            FileNotFoundError("gone"),
            PermissionError("no"),
            OSError(errno.ENOSPC, "full"),
            OSError(errno.EDQUOT, "quota"),
            OSError(errno.EROFS, "read-only"),
            OSError(errno.ENOTDIR, "Not a directory"),
            OSError(errno.EISDIR, "Is a directory"),
            OSError(errno.ENAMETOOLONG, "File name too long"),
            TypeError("no such option"),
        ],
        ids=lambda error: getattr(error, "strerror", None) or str(error),
    )
    def test_a_lasting_error_is_raised_at_once(
        self, monkeypatch: pytest.MonkeyPatch, pauses: list[float], error: Exception
    ) -> None:
        backend = FakeBackend(error)
        with pytest.raises(errors.StorageError, match=r"write 's3://bucket/run/record'") as raised:
            connected_to(monkeypatch, backend).write("record", b"x")
        assert not isinstance(raised.value, errors.StorageUnavailableError)
        assert (backend.calls, pauses) == (1, [])

    def test_a_command_says_what_is_tried_again_once_that_takes_seconds(
        self, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
    ) -> None:
        class ThrottledError(ConnectionResetError):
            response = SimpleNamespace(headers={"Retry-After": "9"})

        said: list[str] = []
        backend = FakeBackend(ConnectionResetError("reset"), ThrottledError("slow down"))
        with slow_requests_told(said.append):
            connected_to(monkeypatch, backend).write("record", b"x")
        assert len(said) == 1, "the first pause is short"
        assert said[0].startswith("Could not write 's3://bucket/run/record' (ThrottledError: slow down).")
        assert said[0].endswith(" Trying again.")

    def test_interrupt_is_not_tried_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = FakeBackend(KeyboardInterrupt())  # type: ignore[arg-type]
        with pytest.raises(KeyboardInterrupt):
            connected_to(monkeypatch, backend).write("record", b"x")
        assert backend.calls == 1

    def test_failed_try_of_an_upload_is_subtracted_from_the_count(
        self, monkeypatch: pytest.MonkeyPatch, pauses: list[float], tmp_path: Path
    ) -> None:
        (tmp_path / "source").write_bytes(bytes(25))
        heard: list[int] = []
        backend = FakeBackend(ConnectionResetError("reset"))
        connected_to(monkeypatch, backend).upload(
            str(tmp_path / "source"), "model.bin", on_bytes=heard.append
        )
        assert heard[:2] == [10, -10]
        assert sum(heard) == 25

    def test_failed_try_of_a_download_leaves_no_byte_in_the_file(
        self, monkeypatch: pytest.MonkeyPatch, pauses: list[float], tmp_path: Path
    ) -> None:
        backend = FakeBackend(ConnectionResetError("reset"))
        backend.objects["model.bin"] = bytes(range(25))
        heard: list[int] = []
        target = tmp_path / "target"
        connected_to(monkeypatch, backend).download("model.bin", str(target), 25, on_bytes=heard.append)
        assert target.read_bytes() == bytes(range(25))
        assert sum(heard) == 25


class TestThrottling:
    def asks_for_time(self, header: dict[str, str]) -> Exception:
        """As s3fs raises it: its own error, chained to that of botocore."""
        error = OSError(errno.EBUSY, "SlowDown")
        error.__cause__ = Exception("503")
        error.__cause__.response = {"ResponseMetadata": {"HTTPHeaders": header}}  # type: ignore[attr-defined]
        return error

    @pytest.mark.parametrize(
        ("header", "least", "most"),
        [({}, 0.0, 0.2), ({"retry-after": "7"}, 6.9, 7.0), ({"retry-after": "86400"}, 59.9, 60.0)],
        ids=["no-header", "seconds", "a-day"],
    )
    def test_retry_after_is_followed_up_to_a_limit(
        self,
        monkeypatch: pytest.MonkeyPatch,
        pauses: list[float],
        header: dict[str, str],
        least: float,
        most: float,
    ) -> None:
        backend = FakeBackend(self.asks_for_time(header))
        connected_to(monkeypatch, backend).write("record", b"x")
        assert least <= sum(pauses) <= most

    @pytest.mark.parametrize(
        ("header", "seconds"),
        [("3", 3.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0), ("-3", 0.0), ("", 0.0), ("9" * 400, 0.0)],
    )
    def test_a_header_without_a_number_of_seconds_is_ignored(self, header: str, seconds: float) -> None:
        error = OSError("503")
        error.response = SimpleNamespace(headers={"Retry-After": header})  # type: ignore[attr-defined]
        assert retry_after(error) == seconds

    def test_all_threads_wait_when_one_is_throttled(
        self, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
    ) -> None:
        backend = FakeBackend(*[self.asks_for_time({"retry-after": "30"})] * (len(PAUSES) + 1))
        store = connected_to(monkeypatch, backend)
        with pytest.raises(errors.StorageUnavailableError):
            store.write("record", b"x")
        before = len(pauses)
        store.write("another", b"x")
        assert pauses[before] > 29.0


class TestRenewal:
    def expires(self, monkeypatch: pytest.MonkeyPatch) -> tuple[Storage, list[FakeBackend]]:
        """A storage that refuses each connection from its second call on."""
        made: list[FakeBackend] = []

        class Expiring(FakeBackend):
            def _fail(self) -> None:
                super()._fail()
                if self.calls > 1:
                    raise PermissionError("ExpiredToken")

        def connect(url: str, protocol: str, options: dict[str, Any]) -> tuple[Any, str]:
            made.append(Expiring())
            return made[-1], "bucket/run"

        monkeypatch.setattr(client, "connect", connect)
        monkeypatch.setattr(client, "native_transfer", lambda protocol, root, options: None)
        return Storage("s3://bucket/run"), made

    def test_a_refusal_during_a_run_is_retried_over_a_new_connection(
        self, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
    ) -> None:
        store, made = self.expires(monkeypatch)
        for number in range(4):
            store.write(str(number), b"x")
        assert [sorted(backend.objects) for backend in made] == [["0"], ["1"], ["2"], ["3"]]
        assert pauses == []

    def test_a_refusal_over_the_new_connection_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = FakeBackend()
        store = connected_to(monkeypatch, backend)
        store.write("record", b"x")
        backend.failures = [PermissionError("AccessDenied")] * 10
        with pytest.raises(errors.StoragePermissionError):
            store.write("record", b"x")
        assert backend.calls == 3

    def test_a_refusal_of_the_first_call_is_an_error_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = FakeBackend(*[PermissionError("AccessDenied")] * 10)
        with pytest.raises(errors.StoragePermissionError):
            connected_to(monkeypatch, backend).write("record", b"x")
        assert backend.calls == 1
