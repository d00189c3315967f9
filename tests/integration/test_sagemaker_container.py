"""The contract of SageMaker's containers, with real processes on two machines made of Linux namespaces."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.datasets.store import DatasetStore
from hf_cloudtrain.jobs.engines.sagemaker import api, engine
from hf_cloudtrain.jobs.records import JobStore
from hf_cloudtrain.jobs.spec.job_file import parse_job
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.storage.client import Storage
from tests.conftest import missing
from tests.integration._instances import Instance, Instances, not_possible
from tests.integration._zygote import PATIENCE, REPOSITORY
from tests.servers import MotoServer

SCRIPT = Path(__file__).with_name("_sagemaker_script.py")
PATH = os.pathsep.join(
    [str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"]
)
HOSTS = ["algo-1", "algo-2"]
TOTAL, HELD, SAVED = 12, 6, 4
"""As in the script, which saves every four steps."""
NUMBERS = [float(number * number) for number in range(2 * TOTAL)]
JOB = """
name: contract
vm: aws-16gb-v100-1g-us-east-1-spot
num_devices: 2
engine: sagemaker
job_setting:
  docker:
    image: 111122223333.dkr.ecr.us-east-1.amazonaws.com/training:1
    command: torchrun train.py
checkpoint: {output_checkpoint_dir: /workspace/ckpt}
data: {name: numbers, mount_path: /workspace/data}
env:
  AWS_ENDPOINT_URL: HUB
  OMP_NUM_THREADS: 1
sagemaker: {role: "arn:aws:iam::111122223333:role/training"}
"""


class SageMaker:
    """What the service does around a training job, according to its documentation."""

    def __init__(
        self, folder: Path, instances: Instances, request: dict[str, Any], server: MotoServer
    ) -> None:
        self._folder = folder
        self._instances = instances
        self._request = request
        self._server = server
        self._machines = 0
        self.ml: dict[str, Path] = {}
        """The folder that is `/opt/ml` on each host."""

    def launch(self) -> dict[str, Instance]:
        """Start new machines, each with the channels and the synced checkpoints."""
        self._machines += 1
        before, self.ml = self.ml, {host: self._folder / f"ml-{self._machines}-{host}" for host in HOSTS}
        return {host: self._launch(host, before) for host in HOSTS}

    def _launch(self, host: str, before: dict[str, Path]) -> Instance:
        ml = self.ml[host]
        for name in ("input/config", "input/data", "model", "output/data"):
            (ml / name).mkdir(parents=True)
        self._configure(host)
        for channel in self._request["InputDataConfig"]:
            self._fetch(channel, ml / "input/data" / channel["ChannelName"])
        for other in before.values():  # the folder on S3 has the files of all hosts
            if (other / "checkpoints").is_dir():
                shutil.copytree(other / "checkpoints", ml / "checkpoints", dirs_exist_ok=True)
        # The role's credentials come from an endpoint of the container, the region from SageMaker.
        role = {
            name: value
            for name, value in self._server.env.items()
            if name.startswith("AWS_") and "KEY" in name
        }
        own = {
            "AWS_REGION": "us-east-1",
            "PYTHONPATH": str(REPOSITORY),
            "PATH": PATH,
            "HOME": "/root",
            "TMPDIR": "/tmp",
            **role,
        }
        entry = self._request["AlgorithmSpecification"]["ContainerEntrypoint"]
        return self._instances.start(host, entry, env={**own, **self._request["Environment"]}, ml=ml)

    def _configure(self, host: str) -> None:
        resources = {"current_host": host, "hosts": HOSTS, "network_interface_name": "eth0"}
        resources["current_instance_type"] = self._request["ResourceConfig"]["InstanceType"]
        channels = {
            channel["ChannelName"]: {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated"}
            for channel in self._request["InputDataConfig"]
        }
        files = {"resourceconfig": resources, "hyperparameters": {}, "inputdataconfig": channels}
        for name, content in files.items():
            (self.ml[host] / "input/config" / f"{name}.json").write_text(json.dumps(content))

    def _fetch(self, channel: dict[str, Any], folder: Path) -> None:
        url = channel["DataSource"]["S3DataSource"]["S3Uri"]
        storage = Storage(url.rstrip("/"), self._server.storage_options)
        for info in storage.list(""):
            (folder / info.path).parent.mkdir(parents=True, exist_ok=True)
            storage.download(info.path, str(folder / info.path), info.size)


@pytest.fixture(scope="module")
def possible() -> None:
    reason = not_possible()
    if reason is not None:
        missing(reason)


@pytest.fixture
def instances(possible: None, moto: MotoServer, tmp_path: Path) -> Iterator[Instances]:
    with Instances(tmp_path, HOSTS, moto.port) as running:
        yield running


def submitted(
    instances: Instances, moto: MotoServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Submission, dict[str, Any], JobStore]:
    """A submitted job, and the request that SageMaker received."""
    for name, value in moto.env.items():
        monkeypatch.setenv(name, value)
    sent: list[dict[str, Any]] = []
    create = api.create

    def record_request(region: str, request: dict[str, Any], secrets: tuple[str, ...]) -> str:
        sent.append(request)
        return create(region, request, secrets)

    monkeypatch.setattr(api, "create", record_request)
    # Tests of jobs find their processes by this name, whichever server the store is on.
    store = JobStore(f"s3://{moto.make_bucket()}/sagemaker-{os.getpid()}")
    (tmp_path / "numbers.txt").write_text("\n".join(map(str, NUMBERS)))
    DatasetStore(store.url).create("numbers", tmp_path / "numbers.txt")
    job = parse_job(JOB.replace("HUB", instances.endpoint).encode())
    facts = {"nodes": 2, "nproc_per_node": 1, "max_restarts": 3}
    record = store.create(job.name, engine="sagemaker", **facts)
    submission = Submission(
        job,
        job.plan(),
        record.id,
        record.run_url,
        store.url,
        tmp_path / "home",
        has_workspace=True,
        dataset_version=1,
    )
    submission.workspace.mkdir(parents=True)
    shutil.copy(SCRIPT, submission.workspace / "train.py")
    engine.ENGINE.submit(submission, store, record)
    return submission, sent[0], store


@pytest.mark.slow
def test_a_rank_crashes_then_both_machines_are_preempted_and_two_new_ones_finish(
    instances: Instances, moto: MotoServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submission, request, store = submitted(instances, moto, tmp_path, monkeypatch)
    service = SageMaker(tmp_path, instances, request, moto)
    catalog = Catalog(Storage(submission.run_url, moto.storage_options))

    first = service.launch()
    wait_for_line(first, f"waits at {HELD} in start 1")
    first["algo-2"].kill_one("-u", "train.py")
    wait_for_line(first, f"waits at {HELD} in start 2")
    for container in first.values():
        container.terminate()
    codes = {host: container.wait(PATIENCE) for host, container in first.items()}
    assert codes == {"algo-1": 75, "algo-2": 75}, logs(first)
    assert catalog.newest() == CheckpointKey(2, HELD)
    for host in HOSTS:
        failure = (service.ml[host] / "output/failure").read_text()
        assert failure == f"preempted: Stopped by SIGTERM. The newest checkpoint is {CheckpointKey(2, HELD)}."
    assert store.read(submission.id).state == "stopping"  # only SageMaker knows whether new machines follow

    second = service.launch()
    codes = {host: container.wait(PATIENCE) for host, container in second.items()}
    assert codes == {"algo-1": 0, "algo-2": 0}, logs(second)
    assert catalog.newest() == CheckpointKey(3, TOTAL)
    resumed_from = [attempt.resumed_from for attempt in catalog.attempts.read_all()]
    assert resumed_from == [None, CheckpointKey(1, SAVED), CheckpointKey(2, HELD)]
    record = store.read(submission.id)
    assert (record.state, record.restarts) == ("finished", 1)
    assert [start.outcome for start in record.starts] == ["failed", "preempted", "finished"]
    assert record.starts[-1].exit_codes == (0, 0)
    for rank, host in enumerate(HOSTS):
        assert f"rank {rank} of 2 begins at {HELD} on {host}" in second[host].log
        # It contains each number once: the sum of the means of both ranks.
        assert float((service.ml[host] / f"model/weight-{rank}").read_text()) == sum(NUMBERS) / 2
        assert not (service.ml[host] / "output/failure").exists()
    kept = service.ml["algo-1"] / "output/data/cloudtrain/algo-1/1/exit-3.json"
    assert json.loads(kept.read_text())["outcome"] == "finished"
    assert (service.ml["algo-1"] / "checkpoints/checkpoint.pt").is_file()
    assert not Path("/workspace/ckpt").exists()


def wait_for_line(containers: dict[str, Instance], text: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not all(text in container.log for container in containers.values()):
        assert all(container.poll() is None for container in containers.values()), logs(containers)
        assert time.monotonic() < deadline, logs(containers)
        time.sleep(0.05)


def logs(containers: dict[str, Instance]) -> str:
    return "\n".join(
        f"--- {host} ({container.poll()})\n{container.log}" for host, container in containers.items()
    )
