"""Records of endpoints come from a store that other people may write to."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.manifest import encode_record
from hf_cloudtrain.errors import ConfigurationError, ManifestError
from hf_cloudtrain.serving.endpoints import local
from hf_cloudtrain.serving.endpoints.records import Endpoint, Endpoints, State


@pytest.fixture
def endpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Endpoints:
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path / "store"))
    return Endpoints()


def written(endpoints: Endpoints, tmp_path: Path, **changes: object) -> None:
    """The record of the endpoint nsmc, as someone else has written it."""
    record = {"name": "nsmc", "engine": "local", "model": "x", "created": 0.0, "handle": {}, **changes}
    (tmp_path / "store" / "endpoints").mkdir(parents=True)
    (tmp_path / "store" / "endpoints" / "nsmc.json").write_bytes(encode_record(record))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"engine": "slurm"},
        {"created": "today"},
        {"handle": "job-1"},
        {"handle": None},
        {"handle": {"pid": "1"}},
        {"handle": {"job": "training-7"}},
        {"handle": {"job": "endpoint-other-1"}},
        {"handle": {"job": ["endpoint-nsmc-1"]}},
        {"handle": {"url": "http://localhost.evil.example:80"}},
        {"handle": {"url": "http://127.0.0.1:80@evil.example"}},
        {"handle": {"url": "http://127.0.0.2:80"}},
        {"handle": {"url": "127.0.0.1:80"}},
        {"engine": "sagemaker", "handle": {"name": "other-0123abcd", "region": "eu-west-1"}},
        {"engine": "sagemaker", "handle": {"name": "nsmc", "region": "eu-west-1"}},
        {"engine": "sagemaker", "handle": {"name": "nsmc-0123abcd", "region": "evil.example/"}},
    ],
)
def test_a_record_that_names_what_create_does_not_make_is_damaged(
    endpoints: Endpoints, tmp_path: Path, changes: dict[str, object]
) -> None:
    """`endpoint delete nsmc` would delete it, and `endpoint invoke nsmc` send a request there."""
    written(endpoints, tmp_path, **changes)
    with pytest.raises(ManifestError, match="The record of the endpoint 'nsmc' is damaged"):
        endpoints.read("nsmc")


def test_law_11_a_job_record_of_a_different_engine_is_not_cancelled(
    endpoints: Endpoints, tmp_path: Path
) -> None:
    """`endpoint delete nsmc` would stop what the handle names there."""
    written(endpoints, tmp_path)
    facts = {"engine": "slurm", "nodes": 1, "nproc_per_node": 1, "max_restarts": 0}
    job = endpoints.jobs.create("endpoint-nsmc", **facts, handle={"job": "7"})
    with pytest.raises(
        ConfigurationError, match=r"'slurm', not 'local': .* `cloudtrain job status endpoint-nsmc-1`"
    ):
        local.delete_local(endpoints, endpoints.read("nsmc"))
    assert not endpoints.jobs.is_cancelled(job.id)
    assert (endpoints.names(), endpoints.jobs.ids()) == (["nsmc"], [job.id])


@pytest.mark.parametrize(
    ("engine", "handle"),
    [
        ("local", {}),
        ("local", {"job": "endpoint-nsmc-12", "url": "http://127.0.0.1:8080"}),
        ("sagemaker", {"name": "nsmc-0123abcd", "region": "eu-west-1"}),
    ],
)
def test_what_create_writes_is_read(
    endpoints: Endpoints, tmp_path: Path, engine: str, handle: dict[str, str]
) -> None:
    written(endpoints, tmp_path, engine=engine, handle=handle)
    assert endpoints.read("nsmc").handle == handle


def test_the_address_that_create_records_is_asked(
    endpoints: Endpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "look_local", lambda *given: State("in service"))
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connected, _ = listening.accept()
            with connected:
                connected.recv(10_000)
                connected.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        handle = {"url": f"http://127.0.0.1:{listening.getsockname()[1]}"}
        asked = Endpoint("nsmc", "local", "x", 0.0, handle)
        assert local.invoke_local(endpoints, asked, b"{}", "", "") == b"[]"
        thread.join(10)
