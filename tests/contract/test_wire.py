"""Requests on the wire, and what happens if they fail: a recording proxy in front of real servers."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain.errors import StorageUnavailableError
from hf_cloudtrain.storage import retries
from hf_cloudtrain.storage.backend import PART_SIZE
from hf_cloudtrain.storage.client import Storage
from tests.contract.conftest import NO_NATIVE_CLIENT
from tests.proxy import Answer, Call, Forward, Proxy, cut_short, lost_answer, once, s3_error
from tests.servers import Server

HANG_UP = Answer(0)
SLOW_DOWN = s3_error(503, "SlowDown")
EACH_CALL = (
    *(("PUT", "record"), ("GET", "record"), ("GET", "list-type=2"), ("DELETE", "record")),
    *(("PUT", "model.bin"), ("GET", "model.bin")),
)


@dataclass
class Wire:
    storage: Storage
    proxy: Proxy


@pytest.fixture(params=["native", "fsspec"])
def wire(request: pytest.FixtureRequest, moto: Server) -> Iterator[Wire]:
    with Proxy(moto.endpoint) as proxy:
        options: dict[str, Any] = {**moto.storage_options, "endpoint_url": proxy.endpoint}
        if request.param == "fsspec":
            options.update(NO_NATIVE_CLIENT["s3"])
        storage = Storage(f"s3://{moto.bucket}/wire-{secrets.token_hex(4)}", options)
        yield Wire(storage, proxy)
        storage.close()


@pytest.fixture(autouse=True)
def pauses_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours between two tries, and those inside s3fs and botocore."""
    sleep, asleep = time.sleep, asyncio.sleep
    monkeypatch.setattr("time.sleep", lambda seconds: sleep(min(seconds, 0.01)))
    monkeypatch.setattr("asyncio.sleep", lambda seconds, *result: asleep(min(seconds, 0.01), *result))


def test_create_whose_answer_is_lost_is_success(wire: Wire) -> None:
    wire.storage.check()
    wire.proxy.rules.append(lost_answer("PUT", "claim"))
    assert wire.storage.create("claim", b"nonce 1") is True
    assert wire.storage.create("claim", b"nonce 2") is False
    assert len([call for call in wire.proxy.calls if call.method == "PUT" and "claim" in call.path]) >= 3


@pytest.mark.parametrize("answer", [HANG_UP, SLOW_DOWN, Answer(500)], ids=["reset", "slow-down", "500"])
def test_failure_of_the_first_request_of_each_call_is_retried(
    wire: Wire, tmp_path: Path, answer: Answer
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"content")
    wire.storage.check()
    wire.proxy.rules += [once(answer, method, path) for method, path in EACH_CALL]

    wire.storage.write("record", b"x")
    assert wire.storage.read("record") == b"x"
    assert [info.path for info in wire.storage.list("")] == ["record"]
    wire.storage.delete(["record"])
    assert wire.storage.list("") == []
    digest = wire.storage.upload(str(source), "model.bin")
    assert wire.storage.download("model.bin", str(target), 7) == digest
    assert target.read_bytes() == b"content"
    assert [call.status for call in wire.proxy.calls].count(answer.status) >= len(EACH_CALL)


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "uploads"), ("PUT", "partNumber=2"), ("POST", "uploadId")],
    ids=["create", "part", "complete"],
)
@pytest.mark.parametrize("served", [True, False], ids=["answer-lost", "refused"])
def test_multipart_upload_survives_a_failure_at_each_step(
    wire: Wire, tmp_path: Path, method: str, path: str, served: bool
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    size = 2 * PART_SIZE + 5
    with source.open("wb") as file:
        file.truncate(size)
    seen = [0]

    def count(length: int) -> None:
        seen[0] += length

    wire.proxy.rules.append(lost_answer(method, path) if served else once(HANG_UP, method, path))
    digest = wire.storage.upload(str(source), "model.bin", on_bytes=count)
    assert seen == [size]
    assert wire.storage.download("model.bin", str(target), size, on_bytes=count) == digest
    assert seen == [2 * size]


def test_truncated_response_is_fetched_again(wire: Wire, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(range(256)) * 64)
    digest = wire.storage.upload(str(source), "model.bin")
    wire.proxy.rules.append(cut_short("GET", "model.bin"))
    assert wire.storage.download("model.bin", str(target), 2**14) == digest
    assert target.read_bytes() == source.read_bytes()


def test_a_storage_that_throttles_gets_few_requests(
    wire: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Including tries inside the clients: five of obstore, with back-off, and two of s3fs between our pauses."""
    (tmp_path / "source").write_bytes(b"content")
    wire.storage.write("record", b"x")
    pauses: list[float] = []
    sleep = time.sleep

    def note(seconds: float) -> None:
        if seconds >= 0.1 and threading.current_thread() is threading.main_thread():
            pauses.append(seconds)
        sleep(min(seconds, 0.01))

    refused: list[Call] = []

    def throttle(call: Call, forward: Forward) -> Answer | None:
        if "model.bin" not in call.path or len(refused) >= 7:
            return None
        refused.append(call)
        return s3_error(503, "SlowDown", **{"Retry-After": "3"})

    wire.proxy.rules.append(throttle)
    monkeypatch.setattr(time, "sleep", note)
    monkeypatch.setattr(retries, "PAUSES", (0.2,) * 10)
    wire.storage.upload(str(tmp_path / "source"), "model.bin")
    native = any(call.native for call in wire.proxy.calls if "model.bin" in call.path)
    assert len(refused) == 7
    assert len(pauses) == (1 if native else 3)
    # The native client does not expose the header; the clients of fsspec do.
    assert all((0.1 <= seconds <= 0.2) if native else (2.5 < seconds <= 3.0) for seconds in pauses)


@pytest.mark.parametrize("wire", ["native"], indirect=True)
def test_outage_ends_in_an_error_that_says_what_to_check(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    never_wait(monkeypatch)
    wire.storage.write("record", b"x")
    wire.proxy.rules.append(lambda call, forward: SLOW_DOWN)
    with pytest.raises(StorageUnavailableError, match=r"read '\S*/record' .*Unavailable.*Check the network"):
        wire.storage.read("record")


def never_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between tries: ours, and those inside s3fs and botocore."""
    sleep = asyncio.sleep
    monkeypatch.setattr("asyncio.sleep", lambda seconds, result=None: sleep(0, result))
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def test_bytes_of_files_move_through_the_intended_client(
    wire: Wire, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "source").write_bytes(b"content")
    wire.storage.upload(str(tmp_path / "source"), "model.bin")
    wire.storage.download("model.bin", str(tmp_path / "target"), 7)
    native = {call.native for call in wire.proxy.calls if "model.bin" in call.path}
    assert native == {"native" in request.node.callspec.id}


def test_read_over_the_limit_fetches_no_more_than_the_limit(wire: Wire) -> None:
    wire.storage.write("record", bytes(100_000))
    before = len(wire.proxy.calls)
    with pytest.raises(OSError, match="larger than 1000 bytes"):
        wire.storage.read("record", max_bytes=1000)
    assert sum(call.sent for call in wire.proxy.calls[before:]) <= 2000


def test_large_download_uses_ranges(wire: Wire, tmp_path: Path) -> None:
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.truncate(2 * PART_SIZE + 5)
    wire.storage.upload(str(source), "model.bin")
    before = len(wire.proxy.calls)
    wire.storage.download("model.bin", str(tmp_path / "target"), 2 * PART_SIZE + 5)
    gets = [call for call in wire.proxy.calls[before:] if call.method == "GET" and "model.bin" in call.path]
    assert sorted(call.sent for call in gets) == [5, PART_SIZE, PART_SIZE]


def test_listing_is_one_request(wire: Wire) -> None:
    for number in range(3):
        wire.storage.write(f"checkpoints/{number}", b"x")
    before = len(wire.proxy.calls)
    assert len(wire.storage.list("checkpoints")) == 3
    assert len(wire.proxy.calls) - before == 1


def test_small_records_take_one_request(wire: Wire) -> None:
    """Heartbeats and manifests: a client that checks before it writes would double the requests."""
    wire.storage.check()
    before = len(wire.proxy.calls)
    wire.storage.write("record", b"x")
    wire.storage.create("claim", b"x")
    wire.storage.read("record")
    wire.storage.delete(["record"])
    assert [call.method for call in wire.proxy.calls[before:]] == ["PUT", "PUT", "GET", "DELETE"]
