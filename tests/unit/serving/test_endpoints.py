"""Records of endpoints come from a store that other people may write to."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.manifest import encode_record
from hf_cloudtrain.errors import CloudTrainError, ManifestError
from hf_cloudtrain.serving.endpoints import Endpoint, Endpoints, invoke_local


@pytest.fixture
def endpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Endpoints:
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path / "store"))
    return Endpoints()


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost.evil.example:{port}",
        "http://127.0.0.1:{port}@evil.example",
        "http://127.0.0.2:{port}",
        "127.0.0.1:{port}",
        None,
    ],
)
def test_what_a_user_asks_goes_to_this_machine_only(url: str | None) -> None:
    with socket.create_server(("", 0)) as listening:
        listening.settimeout(0.2)
        handle = {"url": url and url.format(port=listening.getsockname()[1])}
        with pytest.raises(CloudTrainError, match="is not an address of this machine"):
            invoke_local(Endpoint("nsmc", "local", "x", 0.0, handle), b"{}", "application/json", "")
        with pytest.raises(TimeoutError):
            listening.accept()


def test_the_address_that_create_records_is_asked() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connected, _ = listening.accept()
            with connected:
                connected.recv(10_000)
                connected.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        handle = {"url": f"http://127.0.0.1:{listening.getsockname()[1]}"}
        assert invoke_local(Endpoint("nsmc", "local", "x", 0.0, handle), b"{}", "", "") == b"[]"
        thread.join(10)


@pytest.mark.parametrize("changes", [{"name": "other"}, {"handle": "job-1"}, {"handle": None}])
def test_a_record_about_a_different_endpoint_is_damaged(
    endpoints: Endpoints, tmp_path: Path, changes: dict[str, object]
) -> None:
    """`endpoint delete nsmc` would delete the other one."""
    record = {"name": "nsmc", "engine": "local", "model": "x", "created": 0.0, "handle": {}, **changes}
    (tmp_path / "store" / "endpoints").mkdir(parents=True)
    (tmp_path / "store" / "endpoints" / "nsmc.json").write_bytes(encode_record(record))
    with pytest.raises(ManifestError, match="The record of the endpoint 'nsmc' is damaged"):
        endpoints.read("nsmc")
