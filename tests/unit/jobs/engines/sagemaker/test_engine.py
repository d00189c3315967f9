"""The engine `sagemaker`: jobs against moto, and the status of a job by the answers of AWS."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_cloudtrain.datasets.store import DatasetStore
from hf_cloudtrain.errors import ConfigurationError, JobFileError
from hf_cloudtrain.jobs.engines import EngineStatus, engine
from hf_cloudtrain.jobs.engines.sagemaker import api
from hf_cloudtrain.jobs.engines.sagemaker import engine as sagemaker_engine
from hf_cloudtrain.jobs.engines.sagemaker.engine import ENGINE, status_of
from hf_cloudtrain.jobs.engines.sagemaker.request import own_prefix, request, training_job_name
from hf_cloudtrain.jobs.records import JobStore
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.storage.client import Storage
from tests.servers import MotoServer
from tests.unit.jobs.engines.sagemaker._aws import DESCRIBED, HANDLE, Stubbed
from tests.unit.jobs.engines.sagemaker._requests import SMALL, WHOLE, model, periflow, record_of, submission


@pytest.mark.parametrize("name", ["glue", "cifar"])
def test_a_dry_run_of_periflows_files_shows_nodes_processes_and_what_is_missing(
    name: str,
) -> None:
    shown = engine("sagemaker").show(periflow(name))
    assert "# CreateTrainingJob: 2 nodes of 4 processes, each on ml.p3.8xlarge, managed spot" in shown
    found = yaml.safe_load(shown)
    assert found["ResourceConfig"]["InstanceCount"] == 2
    assert found["Environment"]["NUM_NODES"] == "2"
    assert found["Environment"]["NPROC_PER_NODE"] == "4"
    assert found["EnableManagedSpotTraining"] is True
    assert "not its cloud 'azure' and region 'eastus'" in shown
    missing = re.findall(r"# Missing: (.*)", shown)
    assert [
        part for part in ("role", "ECR", "HF_CLOUDTRAIN_STORE") if not any(part in line for line in missing)
    ] == []
    assert found["RoleArn"] == "<missing: role>"


def test_everything_missing_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError) as error:
        ENGINE.check(periflow("glue"))
    text = str(error.value)
    assert isinstance(error.value, JobFileError)  # the command line prints each on a line of its own
    for part in ("no role", "not in ECR", "not on S3", "AWS_DEFAULT_REGION", "No AWS credentials"):
        assert part in text
    monkeypatch.setenv("WANDB_API_KEY", "secret-value")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    ENGINE.check(submission(WHOLE))


def test_a_dry_run_shows_variables_without_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret-value")
    shown = ENGINE.show(submission(WHOLE))
    assert "WANDB_API_KEY: '***'" in shown
    assert "MODE: '***'" in shown
    assert "secret-value" not in shown
    assert "fast" not in shown
    sent = request(submission(WHOLE), variables={"WANDB_API_KEY": "secret-value", "MODE": "fast"})
    assert sent["Environment"]["WANDB_API_KEY"] == "secret-value"


def test_a_long_value_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 513)
    with pytest.raises(ConfigurationError, match="'WANDB_API_KEY' are longer than the 512") as error:
        ENGINE.check(submission(WHOLE))
    assert "kkkk" not in str(error.value)


@pytest.fixture
def aws(moto: MotoServer, monkeypatch: pytest.MonkeyPatch) -> MotoServer:
    for name, value in moto.env.items():
        monkeypatch.setenv(name, value)
    return moto


@pytest.fixture
def prepared(aws: MotoServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, ...]]:
    """A store on S3 with a dataset, and a job with a workspace."""
    monkeypatch.setenv("WANDB_API_KEY", "secret-value")
    store_url = f"s3://{aws.make_bucket()}/store"
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", store_url)
    (tmp_path / "mnli").mkdir()
    (tmp_path / "mnli" / "train.txt").write_text("one\n")
    DatasetStore(store_url).create("mnli", tmp_path / "mnli")
    text = WHOLE.replace("mnli@2", "mnli").replace("us-west-2-spot", "us-east-1-spot")
    item = submission(text, tmp_path, store=store_url, has_workspace=True, dataset_version=1)
    item.workspace.mkdir(parents=True)
    (item.workspace / "main.py").write_text("print('hello')\n")
    store = JobStore(store_url)
    record = store.create(item.job.name, engine="sagemaker", **facts_of(item))
    return dataclasses.replace(item, id=record.id), store, record


def facts_of(item: Submission) -> dict[str, Any]:
    plan, job = item.plan, item.job
    return {
        "nodes": plan.nodes,
        "nproc_per_node": plan.nproc_per_node,
        "max_restarts": job.max_restarts,
        "run_url": item.run_url,
    }


def test_a_job_is_created_described_and_listed(prepared: tuple[Any, ...]) -> None:
    item, store, record = prepared
    record = ENGINE.submit(item, store, record)
    assert store.read(record.id) == record
    name = record.handle["training_job"]
    described = api.describe("us-east-1", name)
    sent = request(
        item,
        variables={"WANDB_API_KEY": "secret-value", "MODE": "fast"},
        dataset=sagemaker_engine._dataset(item),
    )
    kept = (
        "RoleArn",
        "InputDataConfig",
        "OutputDataConfig",
        "ResourceConfig",
        "StoppingCondition",
        "CheckpointConfig",
    )
    assert {key: described[key] for key in kept} == {key: sent[key] for key in kept}
    assert described["EnableManagedSpotTraining"] is True
    client = api._client(api.SAGEMAKER, "us-east-1")
    listed = client.list_training_jobs(NameContains=name)["TrainingJobSummaries"]
    assert [job["TrainingJobName"] for job in listed] == [name]
    assert ENGINE.look(record) == EngineStatus("finished")  # moto runs nothing


def test_the_store_has_what_the_containers_need_and_no_value_of_a_variable(
    prepared: tuple[Any, ...],
) -> None:
    item, store, record = prepared
    ENGINE.submit(item, store, record)
    there = Storage(own_prefix(item).rstrip("/"))
    assert [info.path for info in there.list("")] == ["dataset.json", "job.json", "workspace.tar.gz"]
    job = there.read("job.json")
    assert b"fast" not in job
    assert b"secret-value" not in job
    assert json.loads(job)["grace"] == 105.0
    folder = request(item, dataset=sagemaker_engine._dataset(item))["InputDataConfig"][2]["DataSource"][
        "S3DataSource"
    ]
    assert folder["S3Uri"] == f"{store.url}/datasets/mnli/"
    assert [info.path for info in Storage(folder["S3Uri"].rstrip("/")).list("")] == ["train.txt"]


def test_each_submission_of_a_job_has_a_name_of_its_own(prepared: tuple[Any, ...]) -> None:
    item, store, record = prepared
    first = ENGINE.submit(item, store, record)
    second = ENGINE.submit(item, store, first)
    assert second.handle["training_job"] == f"{first.handle['training_job']}-2"


def test_a_job_that_aws_does_not_know_is_lost(aws: MotoServer) -> None:
    name = training_job_name(JobStore().url, "small-1")
    record = record_of(submission(SMALL), handle={"training_job": name, "region": "us-east-1"})
    found = ENGINE.look(record)
    assert found is not None
    assert found.state == "lost"
    assert ENGINE.look(record_of(submission(SMALL))) is None


@pytest.mark.parametrize(
    ("status", "secondary", "more", "state", "reason"),
    [
        ("InProgress", "Starting", {}, "starting", "Starting"),
        ("InProgress", "Pending", {}, "queued", "Pending"),
        ("InProgress", "Training", {}, "running", "Training"),
        (
            "InProgress",
            "Interrupted",
            {},
            "queued",
            "Interrupted: the machines were preempted, and SageMaker waits",
        ),
        ("Stopping", "Stopping", {}, "stopping", "Stopping"),
        ("Stopped", "Stopped", {}, "cancelled", "Stopped"),
        ("Stopped", "MaxRuntimeExceeded", {}, "preempted", "MaxRuntimeExceeded: the training took longer"),
        ("Completed", "Completed", {}, "finished", None),
        (
            "Failed",
            "Failed",
            {"FailureReason": "CapacityError: none left"},
            "failed",
            "CapacityError: none left",
        ),
        (
            "Failed",
            "Failed",
            {"FailureReason": "AlgorithmError: preempted: Saved and stopped by SIGTERM., exit code: 75"},
            "preempted",
            "Saved and stopped by SIGTERM.",
        ),
        ("InProgress", "SomethingNew", {}, "running", "SomethingNew"),
        ("Failed", "SomethingNew", {}, "failed", "SomethingNew"),
    ],
)
def test_each_answer_of_sagemaker_has_a_state_and_a_reason(
    status: str, secondary: str, more: dict[str, Any], state: str, reason: str | None
) -> None:
    found = status_of({"TrainingJobStatus": status, "SecondaryStatus": secondary, **more})
    assert found.state == state
    assert (found.reason or "").startswith(reason or "")
    assert (found.reason is None) == (reason is None)
    assert "exit code" not in (found.reason or "")


def test_every_status_of_sagemakers_model_is_known() -> None:
    names = set(model().shape_for("SecondaryStatus").enum)
    assert names <= set(sagemaker_engine._STATES)


def test_the_last_message_of_a_transition_is_the_reason() -> None:
    transitions = [{"Status": "Starting", "StatusMessage": "old"}, {"StatusMessage": "Insufficient capacity"}]
    description = {"SecondaryStatus": "Starting", "SecondaryStatusTransitions": transitions}
    assert status_of(description).reason == "Starting: Insufficient capacity"


@pytest.mark.parametrize(
    ("state", "reason", "secondary", "expected"),
    [
        ("running", None, "Training", None),
        ("stopping", "Stopped by SIGTERM.", "Uploading", None),
        ("queued", None, "Training", ("running", "Training")),
        ("running", None, "Starting", ("starting", "Starting")),
        ("stopping", "The newest checkpoint is 6.", "Stopped", ("cancelled", "The newest checkpoint is 6.")),
        (
            "stopping",
            "The newest checkpoint is 6.",
            "Interrupted",
            ("queued", "Interrupted: the machines were preempted"),
        ),
        (
            "stopping",
            "The newest checkpoint is 6.",
            "MaxRuntimeExceeded",
            (
                "preempted",
                "MaxRuntimeExceeded: the training took longer than 'max_run'. The newest checkpoint is 6.",
            ),
        ),
        ("running", None, "Stopped", ("cancelled", "Stopped")),
    ],
)
def test_while_the_containers_run_their_supervisor_writes_the_record(
    stubbed: dict[str, Stubbed],
    state: Any,
    reason: str | None,
    secondary: str,
    expected: tuple[str, str] | None,
) -> None:
    status = "Stopped" if secondary in ("Stopped", "MaxRuntimeExceeded") else "InProgress"
    answer = {**DESCRIBED, "TrainingJobStatus": status, "SecondaryStatus": secondary}
    stubbed["sagemaker"].stub.add_response("describe_training_job", answer)
    found = ENGINE.look(record_of(submission(WHOLE), handle=HANDLE, state=state, reason=reason))
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert found.state == expected[0]
        assert (found.reason or "").startswith(expected[1])
