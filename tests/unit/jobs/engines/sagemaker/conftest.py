"""A container that SageMaker has prepared, and clients whose answers a test gives."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain.datasets.store import DatasetStore
from hf_cloudtrain.jobs import supervisor
from hf_cloudtrain.jobs.engines.sagemaker import api, container
from hf_cloudtrain.jobs.engines.sagemaker import engine as sagemaker_engine
from hf_cloudtrain.jobs.records import JobStore
from tests.servers import free_port
from tests.unit.jobs.engines.sagemaker._aws import Stubbed
from tests.unit.jobs.engines.sagemaker._container import FakeNode, Image, hosts, job
from tests.unit.jobs.engines.sagemaker._requests import STORE


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Image]:
    """A container of one node, as SageMaker prepares it."""
    environment = dict(os.environ)
    found = Image(tmp_path / "ml", tmp_path / "mounts", JobStore(str(tmp_path / "store")))
    facts = {"engine": "sagemaker", "nodes": 1, "nproc_per_node": 1, "max_restarts": 2}
    found.store.create("small", **facts)
    found.mounts.mkdir()
    (tmp_path / "numbers").mkdir()
    (tmp_path / "numbers/a.txt").write_text("1 2 3\n")
    (tmp_path / "code").mkdir()
    (tmp_path / "code/run.sh").write_text("true\n")
    (tmp_path / "code/run.sh").chmod(0o755)
    (tmp_path / "code/out").symlink_to("/etc/hosts")
    dataset, _ = DatasetStore(str(tmp_path / "store")).create("numbers", tmp_path / "numbers")
    hosts(found, ["algo-1"], "algo-1")
    job(found, 1)
    found.write("data/cloudtrain/dataset.json", dataset.manifest.encode().decode())
    found.write("data/dataset/a.txt", "1 2 3\n")
    found.write("data/train/b.txt", "4\n")
    with tarfile.open(found.root / "input/data/cloudtrain/workspace.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "code", arcname=".")
    monkeypatch.setattr(container, "wait_for_name", lambda host: None)
    monkeypatch.setattr(container, "NodeProcess", FakeNode)
    monkeypatch.setattr(container, "PORT", free_port())
    # It would last for all tests of this process.
    monkeypatch.setattr(container, "adopt_orphans", lambda: None)
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(supervisor, "POLL", 0.01)
    FakeNode.starts.clear()
    FakeNode.endings = {0: ["finished"]}
    yield found
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Stubbed]]:
    found = {"sagemaker": Stubbed("sagemaker"), "logs": Stubbed("logs")}

    def client(service: str, region: str, tries: int = 5) -> Any:
        return found[api._CLIENTS[service]].client

    monkeypatch.setattr(api, "_client", client)
    monkeypatch.setattr(sagemaker_engine, "POLL", 0.0)
    monkeypatch.setattr(sagemaker_engine, "LATE", 0.0)
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", STORE)
    for item in found.values():
        item.stub.activate()
    yield found
    for item in found.values():
        item.stub.assert_no_pending_responses()
        item.client.close()
