"""What `Storage` does by itself: URLs, secrets, errors, retries. What it does to a store is in tests/contract."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_cloudtrain import errors
from hf_cloudtrain.runtime import threads
from hf_cloudtrain.storage import client, silence
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.retries import PAUSES, retry_after
from hf_cloudtrain.storage.urls import shown_url
from hf_cloudtrain.testing import FaultyStorage

ROOT = Path(__file__).resolve().parents[3]

SECRET = "Wq3/vEry+5ecr3tvalue"
"""With a slash, as every third AWS secret key has."""


class TestUrl:
    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("s3://bucket/runs/mrpc", "s3://bucket/runs/mrpc"),
            ("s3://bucket/runs/mrpc/", "s3://bucket/runs/mrpc"),
            ("s3://bucket", "s3://bucket"),
            ("s3://bucket/a run/läuft", "s3://bucket/a run/läuft"),
            (
                "az://container@account.dfs.core.windows.net/run",
                "az://container@account.dfs.core.windows.net/run",
            ),
            ("file:///data/run/", "file:///data/run"),
            ("local:///data/run", "file:///data/run"),
            ("file:///data/../run", "file:///run"),
            ("/data/run/", "/data/run"),
            ("/data//run/./x", "/data/run/x"),
        ],
    )
    def test_is_normalised(self, url: str, shown: str) -> None:
        assert shown_url(url) == shown
        assert Storage(url).url == shown

    def test_plain_path_becomes_absolute(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", "/home/somebody")
        assert Storage("runs/mrpc").url == str(tmp_path / "runs" / "mrpc")
        assert Storage("~/runs").url == "/home/somebody/runs"

    @pytest.mark.parametrize("url", ["", "   ", None, 3, b"s3://bucket"])
    def test_that_is_none_says_how_one_looks(self, url: Any) -> None:
        with pytest.raises(errors.ConfigurationError, match="s3://bucket/runs/mrpc"):
            Storage(url)

    @pytest.mark.parametrize(
        "url",
        [
            f"s3://key:{SECRET}@bucket/run",
            f"gs://user:{SECRET}@bucket/run",
            f"https://account.blob.core.windows.net/container/run?sv=1&sig={SECRET}",
            f"sftp://somebody:{SECRET}@host/run",
            f"az://container/run?sas_token={SECRET}",
        ],
    )
    def test_is_never_shown_with_its_credentials(self, url: str) -> None:
        assert SECRET not in shown_url(url)
        assert "***" in shown_url(url)

    @pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
    def test_with_credentials_is_refused_without_repeating_them(self, scheme: str) -> None:
        with pytest.raises(errors.ConfigurationError, match="storage_options") as raised:
            Storage(f"{scheme}://key:{SECRET}@bucket/run")
        assert SECRET not in "".join(traceback.format_exception(raised.value))

    def test_is_connected_to_at_the_first_call_only(self) -> None:
        Storage("s3://bucket/run", {"endpoint_url": "http://127.0.0.1:9"})


class TestProtocol:
    def test_unknown_one_is_named(self) -> None:
        with pytest.raises(errors.ConfigurationError, match="'s4://'") as raised:
            Storage("s4://bucket/run").check()
        assert not isinstance(raised.value, errors.MissingExtraError)

    @pytest.mark.parametrize(
        ("scheme", "module", "extra"),
        [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs"), ("az", "adlfs", "azure")],
    )
    def test_missing_package_names_the_extra(
        self, monkeypatch: pytest.MonkeyPatch, scheme: str, module: str, extra: str
    ) -> None:
        from fsspec.registry import _registry

        monkeypatch.setitem(sys.modules, module, None)
        for name in ("s3", "s3a", "gs", "gcs", "az", "abfs"):
            monkeypatch.delitem(_registry, name, raising=False)
        with pytest.raises(errors.MissingExtraError, match=rf"pip install 'hf_cloudtrain\[{extra}\]'"):
            Storage(f"{scheme}://bucket/run").check()

    def test_missing_native_client_leaves_the_bytes_to_fsspec(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from hf_cloudtrain.storage.native import native_transfer

        monkeypatch.setitem(sys.modules, "obstore", None)
        monkeypatch.setitem(sys.modules, "obstore.store", None)
        options = {"key": "k", "secret": "s", "endpoint_url": "http://127.0.0.1:9"}
        assert native_transfer("s3", "bucket/run", options) is None


class FakeBackend:
    """Fails as told, then keeps records in memory."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.objects: dict[str, bytes] = {}
        self.calls = 0

    def _fail(self) -> None:
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)

    def read(self, path: str, limit: int) -> bytes:
        self._fail()
        return self.objects[path][:limit]

    def write(self, path: str, data: bytes) -> None:
        self._fail()
        self.objects[path] = data

    def create(self, path: str, data: bytes) -> None:
        if path in self.objects:
            self._fail()
            raise FileExistsError(path)
        self.write(path, data)

    def upload(self, source: Any, path: str, on_bytes: Callable[[int], None]) -> str:
        while block := source.read(10):
            self.objects[path] = self.objects.get(path, b"") + block
            on_bytes(len(block))
            if self.failures:
                self._fail()
        return "0" * 32

    def download(self, path: str, target: Any, size: int, on_bytes: Callable[[int], None]) -> str:
        for start in range(0, size, 10):
            target.write(self.objects[path][start : start + 10])
            on_bytes(len(self.objects[path][start : start + 10]))
            if self.failures:
                self._fail()
        return "0" * 32


def connected_to(monkeypatch: pytest.MonkeyPatch, backend: FakeBackend, **options: Any) -> Storage:
    monkeypatch.setattr(client, "connect", lambda url, protocol, options: (backend, "bucket/run"))
    monkeypatch.setattr(client, "native_transfer", lambda protocol, root, options: None)
    return Storage("s3://bucket/run", options)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited, without the waiting."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


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
    def test_what_a_retry_cannot_help_is_raised_at_once(
        self, monkeypatch: pytest.MonkeyPatch, pauses: list[float], error: Exception
    ) -> None:
        backend = FakeBackend(error)
        with pytest.raises(errors.StorageError, match=r"write 's3://bucket/run/record'") as raised:
            connected_to(monkeypatch, backend).write("record", b"x")
        assert not isinstance(raised.value, errors.StorageUnavailableError)
        assert (backend.calls, pauses) == (1, [])

    def test_interrupt_is_not_tried_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = FakeBackend(KeyboardInterrupt())  # type: ignore[arg-type]
        with pytest.raises(KeyboardInterrupt):
            connected_to(monkeypatch, backend).write("record", b"x")
        assert backend.calls == 1

    def test_failed_try_of_an_upload_is_taken_back_from_the_count(
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

    def test_create_that_finds_its_own_bytes_has_won(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = FakeBackend()
        storage = connected_to(monkeypatch, backend)
        backend.objects["claim"] = b"mine"
        assert storage.create("claim", b"mine") is True
        assert storage.create("claim", b"yours") is False


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "kind", "standard", "advice"),
        [
            (
                FileNotFoundError("The specified bucket"),
                errors.ObjectNotFoundError,
                FileNotFoundError,
                "Create the",
            ),
            (FileNotFoundError("no key"), errors.ObjectNotFoundError, FileNotFoundError, "does not exist"),
            (
                PermissionError("Forbidden"),
                errors.StoragePermissionError,
                PermissionError,
                "Check the credentials",
            ),
            (
                OSError("403 Forbidden"),
                errors.StoragePermissionError,
                PermissionError,
                "Check the credentials",
            ),
            (
                OSError("Code: ExpiredToken"),
                errors.StoragePermissionError,
                PermissionError,
                "Check the credentials",
            ),
            (
                OSError("AuthorizationFailure"),
                errors.StoragePermissionError,
                PermissionError,
                "Check the credentials",
            ),
            (OSError("PermanentRedirect"), errors.StorageError, OSError, "AWS_REGION"),
            (OSError("An error occurred (301) when calling"), errors.StorageError, OSError, "AWS_REGION"),
            (OSError("AuthorizationHeaderMalformed"), errors.StorageError, OSError, "AWS_REGION"),
            (OSError(errno.ENOSPC, "full"), errors.StorageError, OSError, "no space is left"),
            (OSError("416 InvalidRange"), errors.ObjectTruncatedError, OSError, "shorter"),
            (ConnectionResetError("reset"), errors.StorageUnavailableError, OSError, "Check the network"),
            (
                ImportError("No module named 'aiobotocore'"),
                errors.MissingExtraError,
                ImportError,
                "pip install",
            ),
        ],
        ids=lambda value: str(value) if isinstance(value, Exception) else "",
    )
    def test_kind_and_advice(
        self,
        monkeypatch: pytest.MonkeyPatch,
        pauses: list[float],
        error: Exception,
        kind: type[Exception],
        standard: type[Exception],
        advice: str,
    ) -> None:
        backend = FakeBackend(*[error] * 20)
        with pytest.raises(kind, match=advice) as raised:
            connected_to(monkeypatch, backend).read("record")
        assert isinstance(raised.value, (errors.CloudTrainError, standard))
        assert type(raised.value) is kind
        assert issubclass(kind, standard)

    @pytest.mark.parametrize("code", [301, 401, 403, 416])
    @pytest.mark.parametrize("name", ["checkpoint-{}/model", "x/{}-of-1000.json", "global_step{}", "{}.pt"])
    def test_number_in_a_name_is_no_status(
        self, monkeypatch: pytest.MonkeyPatch, pauses: list[float], name: str, code: int
    ) -> None:
        path = name.format(code)
        backend = FakeBackend(FileNotFoundError(f"bucket/run/{path}"))
        with pytest.raises(errors.ObjectNotFoundError):
            connected_to(monkeypatch, backend).read(path)
        backend = FakeBackend(*[ConnectionResetError(f"PUT https://host/bucket/run/{path}: reset")] * 20)
        with pytest.raises(errors.StorageUnavailableError):
            connected_to(monkeypatch, backend).read(path)

    def test_names_what_was_done_to_what(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = FakeBackend(PermissionError("no"))
        with pytest.raises(
            errors.StoragePermissionError, match=r"^Could not read 's3://bucket/run/a b\.json': "
        ):
            connected_to(monkeypatch, backend).read("a b.json")

    def test_ours_pass_unchanged(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ours = errors.StoragePermissionError("said already")
        backend = FakeBackend(ours)
        with pytest.raises(errors.StoragePermissionError, match=r"^said already$"):
            connected_to(monkeypatch, backend).read("record")

    def test_missing_local_file_is_no_missing_object(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        with pytest.raises(FileNotFoundError) as raised:
            connected_to(monkeypatch, FakeBackend()).upload(str(tmp_path / "gone"), "model.bin")
        assert not isinstance(raised.value, errors.CloudTrainError)

    def test_object_of_another_length_is_truncated(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        backend = FakeBackend()
        backend.objects["model.bin"] = bytes(7)
        with pytest.raises(
            errors.ObjectTruncatedError, match=r"'s3://bucket/run/model\.bin' has 7 bytes, not 10"
        ):
            connected_to(monkeypatch, backend).download("model.bin", str(tmp_path / "target"), 10)


class TestSecrets:
    OPTIONS = (
        {"secret": SECRET},
        {"token": SECRET},
        {"account_key": SECRET},
        {"connection_string": f"AccountName=a;AccountKey={SECRET};EndpointSuffix=x"},
        {"client_kwargs": {"aws_secret_access_key": SECRET}},
        {"client_kwargs": {"aws_session_token": SECRET}},
        {"sas_token": SECRET},
    )

    @pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
    def test_of_the_options_are_in_no_error_and_no_log(
        self,
        monkeypatch: pytest.MonkeyPatch,
        pauses: list[float],
        caplog: pytest.LogCaptureFixture,
        options: dict[str, Any],
    ) -> None:
        caplog.set_level(logging.DEBUG)
        value = next(iter(options.values()))
        said = next(iter(value.values())) if isinstance(value, dict) else value
        backend = FakeBackend(*[OSError(f"request with {said} failed")] * 20)
        with pytest.raises(errors.StorageError) as raised:
            connected_to(monkeypatch, backend, **options).read("record")
        assert SECRET not in "".join(traceback.format_exception(raised.value))
        assert "***" in str(raised.value)
        assert SECRET not in caplog.text

    @pytest.mark.parametrize("name", ["sig", "X-Amz-Signature", "token", "AccountKey", "password"])
    def test_in_a_url_inside_an_error_are_not_repeated(
        self, monkeypatch: pytest.MonkeyPatch, pauses: list[float], name: str
    ) -> None:
        backend = FakeBackend(
            PermissionError(f"GET https://host/key?a=1&{name}=abcdef123456&b=2 was refused")
        )
        with pytest.raises(errors.StorageError) as raised:
            connected_to(monkeypatch, backend).read("record")
        assert "abcdef123456" not in "".join(traceback.format_exception(raised.value))
        assert f"{name}=***&b=2" in str(raised.value)

    def test_are_not_in_the_repr(self) -> None:
        assert SECRET not in repr(Storage("s3://bucket/run", {"secret": SECRET}))


class TestProcess:
    def test_forked_child_makes_its_own_connection(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[int] = []

        def connect(url: str, protocol: str, options: dict[str, Any]) -> tuple[FakeBackend, str]:
            made.append(os.getpid())
            return FakeBackend(), "bucket/run"

        monkeypatch.setattr(client, "connect", connect)
        monkeypatch.setattr(client, "native_transfer", lambda protocol, root, options: None)
        used = Storage("s3://bucket/run")
        used.write("a", b"x")
        used.write("b", b"x")
        assert len(made) == 1
        monkeypatch.setattr(os, "getpid", lambda: -1)
        used.write("c", b"x")
        assert made[1:] == [-1]

    def test_closed_storage_connects_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = FakeBackend()
        used = connected_to(monkeypatch, backend)
        used.write("a", b"x")
        used.close()
        assert used.read("a") == b"x"


class TestSilence:
    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(silence, "SILENCE", 0.1)
        monkeypatch.setattr(threads, "TURN", 0.01)

    def test_a_request_that_hangs_is_given_up_and_made_again_by_a_new_connection(
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

    def test_one_that_hangs_twice_is_an_error_that_says_how_long(self, tmp_path: Path) -> None:
        faulty = FaultyStorage(f"file://{tmp_path}")
        faulty.hang("write", times=100)
        with pytest.raises(errors.StorageUnavailableError, match="no answer and no byte for 0 s"):
            faulty.write("record", b"x")
        assert faulty.count("write") == 2, "it is not tried for an hour"
        faulty.heal()

    def test_bytes_that_come_slowly_are_no_silence(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
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

    def test_what_a_request_that_was_given_up_still_does_harms_no_later_one(
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

    def test_a_wait_of_a_minute_is_said(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(silence, "SAY_AFTER", 0.02)
        faulty = FaultyStorage(f"file://{tmp_path}")
        faulty.hang("write")
        faulty.write("record", b"x")
        faulty.heal()
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert said == [f"Waiting to write 'file://{tmp_path}/record': no answer for 0 s."]

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


class TestThrottling:
    def asks_for_time(self, header: dict[str, str]) -> Exception:
        """As s3fs raises it: its own error, caused by botocore's."""
        error = OSError(errno.EBUSY, "SlowDown")
        error.__cause__ = Exception("503")
        error.__cause__.response = {"ResponseMetadata": {"HTTPHeaders": header}}  # type: ignore[attr-defined]
        return error

    @pytest.mark.parametrize(
        ("header", "least", "most"),
        [({}, 0.0, 0.2), ({"retry-after": "7"}, 6.9, 7.0), ({"retry-after": "86400"}, 59.9, 60.0)],
        ids=["no-header", "seconds", "a-day"],
    )
    def test_the_storage_says_how_long_within_reason(
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
    def test_what_is_no_number_of_seconds_is_left_out_of_account(self, header: str, seconds: float) -> None:
        error = OSError("503")
        error.response = SimpleNamespace(headers={"Retry-After": header})  # type: ignore[attr-defined]
        assert retry_after(error) == seconds

    def test_all_threads_wait_when_one_is_told_to_slow_down(
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
        """A storage whose connections are refused from their second call on."""
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

    def test_what_is_refused_in_mid_run_is_tried_by_a_new_connection(
        self, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
    ) -> None:
        store, made = self.expires(monkeypatch)
        for number in range(4):
            store.write(str(number), b"x")
        assert [sorted(backend.objects) for backend in made] == [["0"], ["1"], ["2"], ["3"]]
        assert pauses == []

    def test_what_a_new_connection_is_refused_too_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = FakeBackend()
        store = connected_to(monkeypatch, backend)
        store.write("record", b"x")
        backend.failures = [PermissionError("AccessDenied")] * 10
        with pytest.raises(errors.StoragePermissionError):
            store.write("record", b"x")
        assert backend.calls == 3

    def test_what_was_never_allowed_is_refused_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = FakeBackend(*[PermissionError("AccessDenied")] * 10)
        with pytest.raises(errors.StoragePermissionError):
            connected_to(monkeypatch, backend).write("record", b"x")
        assert backend.calls == 1

    def test_a_create_that_hears_both_that_it_exists_and_that_it_does_not_is_made_again(
        self, tmp_path: Path, pauses: list[float]
    ) -> None:
        faulty = FaultyStorage(f"file://{tmp_path}")
        faulty.lie("exists", "create")
        assert faulty.create("claim", b"mine") is True
        assert faulty.count("create") == 2
