"""SageMaker: the request as data, what is refused, and what AWS answers (moto, and answers that botocore checks)."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_cloudtrain.checkpoints.manifest import FileEntry, Manifest, Position
from hf_cloudtrain.datasets.store import DatasetStore
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError, JobFileError
from hf_cloudtrain.jobs.engines import engine
from hf_cloudtrain.jobs.engines.sagemaker import api
from hf_cloudtrain.jobs.engines.sagemaker import engine as sagemaker_engine
from hf_cloudtrain.jobs.engines.sagemaker.engine import ENGINE, seen
from hf_cloudtrain.jobs.engines.sagemaker.request import (
    INSTANCES,
    own_prefix,
    problems,
    request,
    training_job_name,
)
from hf_cloudtrain.jobs.records import JobRecord, JobStore
from hf_cloudtrain.jobs.spec.job_file import parse_job, read_job
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.storage.client import Storage
from tests.servers import MotoServer

DATA = Path(__file__).resolve().parents[4] / "data"
STORE = "s3://bucket/store"
DIGEST = f"xxh3-128:{'0' * 32}"
MANIFEST = Manifest(
    "mnli-000002", "mnli.2", 0, 0, "n" * 16, (FileEntry("a", 2_500_000_000, DIGEST),), Position(0)
)
WHOLE = (DATA / "sagemaker_whole.yml").read_text()
SMALL = """
name: small
run_url: s3://bucket/runs/small
job_setting: {docker: {image: 111122223333.dkr.ecr.us-east-1.amazonaws.com/t, command: "true"}}
sagemaker: {role: "arn:aws:iam::111122223333:role/training", instance_type: ml.m5.large}
"""


def submission(text: str, tmp_path: Path = Path("/nowhere"), **changes: Any) -> Submission:
    job = parse_job(text.encode())
    given: dict[str, Any] = {
        "job": job,
        "plan": job.plan("sagemaker"),
        "id": f"{job.name}-1",
        "run_url": job.run_url,
        "store": STORE,
        "home": tmp_path / "home",
    }
    return Submission(**{**given, **changes})


def periflow(name: str) -> Submission:
    """Nothing but what PeriFlow's file says, with a store that nobody has set."""
    job = read_job(DATA / f"periflow_{name}.yml")
    store = "/home/me/.hf_cloudtrain"
    run_url = f"{store}/runs/{job.name}-1"
    return Submission(
        job, job.plan("sagemaker"), f"{job.name}-1", run_url, store, Path(store, "jobs", f"{job.name}-1")
    )


def record_of(item: Submission, **changes: Any) -> JobRecord:
    return JobRecord(
        id=item.id,
        name=item.job.name,
        engine="sagemaker",
        run_url=item.run_url,
        home=str(item.home),
        nodes=item.plan.nodes,
        nproc_per_node=item.plan.nproc_per_node,
        max_restarts=item.job.max_restarts,
        created=0.0,
        **changes,
    )


# --- The request -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["whole", "glue", "cifar"])
def test_the_request_is_the_one_that_was_agreed_on(name: str) -> None:
    if name == "whole":
        found = request(submission(WHOLE, has_workspace=True), dataset=MANIFEST)
    else:
        found = request(periflow(name))
    text = yaml.safe_dump(found, sort_keys=False, width=110)
    golden = (DATA / f"sagemaker_{name}_request.yml").read_text()
    assert text == golden, "".join(difflib.unified_diff(golden.splitlines(True), text.splitlines(True)))


def test_a_whole_request_is_one_that_sagemaker_s_own_model_allows() -> None:
    """Its sizes, patterns and enumerations too, at which botocore does not look by itself."""
    found = request(submission(WHOLE), variables={"WANDB_API_KEY": "x", "MODE": "fast"}, dataset=MANIFEST)
    assert list(breaches(found)) == []
    assert list(breaches(request(submission(SMALL)))) == []


@pytest.mark.parametrize(
    ("change", "breach"),
    [
        ({"TrainingJobName": "a_b"}, "TrainingJobName: 'a_b' is not"),
        ({"Environment": {"A": "x" * 513}}, "513 is out of"),
        ({"Surprise": 1}, "Surprise is unknown"),
        ({"ResourceConfig": {"InstanceType": "ml.x"}}, "is none of"),
    ],
)
def test_the_look_at_the_model_finds_what_is_planted(change: dict[str, Any], breach: str) -> None:
    assert breach in "\n".join(breaches({**request(submission(SMALL)), **change}))


def test_every_machine_of_the_table_is_one_of_sagemaker() -> None:
    known = set(model().shape_for("TrainingInstanceType").enum)
    if "ml.p5.4xlarge" not in known:
        pytest.skip("this botocore is older than the newest of them")
    assert set(INSTANCES.values()) <= known


@pytest.mark.parametrize("name", ["glue", "cifar"])
def test_a_dry_run_of_periflow_s_files_shows_two_nodes_of_four_processes_and_what_is_missing(
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


def test_what_is_missing_is_refused_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError) as error:
        ENGINE.check(periflow("glue"))
    text = str(error.value)
    assert isinstance(error.value, JobFileError)  # the command line tells each on a line of its own
    for part in ("no role", "not in ECR", "not on S3", "AWS_DEFAULT_REGION", "no AWS credentials"):
        assert part in text
    monkeypatch.setenv("WANDB_API_KEY", "secret-value")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    ENGINE.check(submission(WHOLE))


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (("role: arn:aws:iam::111122223333:role/training", "role: training"), "no ARN"),
        (("-spot", ""), "`max_wait` is for spot"),
        (("max_wait: 7200", "max_wait: 60"), "less than the 3600 seconds"),
        (("40gb-a100-8g", "40gb-a100-3g"), "Write the machine as `instance_type`"),
        (("num_devices: 16\nengine", "engine"), None),
        (("MODE: fast", "HF_CLOUDTRAIN_GRACE: 300"), "SageMaker gives 120 s"),
        (("/workspace/data", "/opt/ml/input/data/x"), "SageMaker's own folder"),
        (("extra:", "dataset:"), "one of ours"),
        (("run_url: s3://bucket/runs/mnli", "run_url: /runs/mnli"), "which no container sees"),
        (("111122223333.dkr.ecr.us-west-2.amazonaws.com/", "docker.io/"), "not in ECR"),
    ],
)
def test_what_sagemaker_would_refuse_is_refused_before(changed: tuple[str, str], problem: str | None) -> None:
    assert changed[0] in WHOLE
    text = WHOLE.replace(*changed)
    if "a100-3g" in text:
        text = text.replace("num_devices: 16", "num_devices: 6")
    found = list(problems(submission(text)))
    assert ([] if problem is None else [True]) == [problem in line for line in found if problem]
    assert len(found) == (problem is not None)


@pytest.mark.parametrize("name", ["a", "mnli.v2_final", "x" * 63, "a--b..c__d", "A-" * 30 + "b"])
def test_a_name_is_one_of_sagemaker_and_no_other_store_s(name: str) -> None:
    pattern = model().shape_for("TrainingJobName").metadata["pattern"]
    item = dataclasses.replace(submission(SMALL), id=f"{name}-12")
    names = [training_job_name(item, number) for number in (1, 2, 1000)]
    names.append(training_job_name(dataclasses.replace(item, store="s3://other/store")))
    names.append(training_job_name(dataclasses.replace(item, id=f"{name}-13")))
    assert len(set(names)) == len(names)
    for found in names:
        assert re.fullmatch(pattern, found), found
        assert len(found) <= 63


def test_the_job_s_own_variables_are_shown_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret-value")
    shown = ENGINE.show(submission(WHOLE))
    assert "WANDB_API_KEY: '***'" in shown
    assert "MODE: '***'" in shown
    assert "secret-value" not in shown
    assert "fast" not in shown
    sent = request(submission(WHOLE), variables={"WANDB_API_KEY": "secret-value", "MODE": "fast"})
    assert sent["Environment"]["WANDB_API_KEY"] == "secret-value"


def test_a_long_value_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 513)
    with pytest.raises(ConfigurationError, match="'WANDB_API_KEY' are longer than the 512") as error:
        ENGINE.check(submission(WHOLE))
    assert "kkkk" not in str(error.value)


def test_the_grace_is_sagemaker_s_unless_the_job_names_one() -> None:
    assert request(submission(SMALL))["Environment"]["HF_CLOUDTRAIN_GRACE"] == "105"
    named = submission(SMALL + "env: {HF_CLOUDTRAIN_GRACE: '40'}")
    assert request(named)["Environment"]["HF_CLOUDTRAIN_GRACE"] == "40"


# --- Against moto ----------------------------------------------------------------------------------------------------


@pytest.fixture
def aws(moto: MotoServer, monkeypatch: pytest.MonkeyPatch) -> MotoServer:
    for name, value in moto.env.items():
        monkeypatch.setenv(name, value)
    return moto


@pytest.fixture
def handed_over(
    aws: MotoServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Any, ...]]:
    """A store on S3 with a dataset, and a job with a workspace."""
    monkeypatch.setenv("WANDB_API_KEY", "secret-value")
    store_url = f"s3://{aws.make_bucket()}/store"
    (tmp_path / "mnli").mkdir()
    (tmp_path / "mnli" / "train.txt").write_text("one\n")
    DatasetStore(store_url).create("mnli", tmp_path / "mnli")
    text = WHOLE.replace("mnli@2", "mnli").replace("us-west-2-spot", "us-east-1-spot")
    item = submission(text, tmp_path, store=store_url, has_workspace=True, dataset_version=1)
    item.workspace.mkdir(parents=True)
    (item.workspace / "main.py").write_text("print('hello')\n")
    store = JobStore(store_url)
    record = store.create(item.job.name, engine="sagemaker", **shape_of(item))
    return dataclasses.replace(item, id=record.id), store, record


def shape_of(item: Submission) -> dict[str, Any]:
    plan, job = item.plan, item.job
    return {
        "nodes": plan.nodes,
        "nproc_per_node": plan.nproc_per_node,
        "max_restarts": job.max_restarts,
        "run_url": item.run_url,
    }


def test_a_job_is_created_described_and_listed(handed_over: tuple[Any, ...]) -> None:
    item, store, record = handed_over
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
    assert ENGINE.look(record) == sagemaker_engine.EngineStatus("finished")  # moto runs nothing


def test_what_the_containers_need_is_on_the_store_and_no_value_of_a_variable(
    handed_over: tuple[Any, ...],
) -> None:
    item, store, record = handed_over
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


def test_each_hand_over_of_a_job_has_a_name_of_its_own(handed_over: tuple[Any, ...]) -> None:
    item, store, record = handed_over
    first = ENGINE.submit(item, store, record)
    second = ENGINE.submit(item, store, first)
    assert second.handle["training_job"] == f"{first.handle['training_job']}-2"


def test_a_job_that_aws_does_not_know_is_lost(aws: MotoServer) -> None:
    record = record_of(submission(SMALL), handle={"training_job": "small-1", "region": "us-east-1"})
    found = ENGINE.look(record)
    assert found is not None
    assert found.state == "lost"
    assert ENGINE.look(record_of(submission(SMALL))) is None


# --- Answers of AWS --------------------------------------------------------------------------------------------------


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
            "Interrupted: the machines were taken away, and SageMaker waits",
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
def test_what_sagemaker_says_of_a_job(
    status: str, secondary: str, more: dict[str, Any], state: str, reason: str | None
) -> None:
    found = seen({"TrainingJobStatus": status, "SecondaryStatus": secondary, **more})
    assert found.state == state
    assert (found.reason or "").startswith(reason or "")
    assert (found.reason is None) == (reason is None)
    assert "exit code" not in (found.reason or "")


def test_every_status_of_sagemaker_s_model_is_known() -> None:
    names = set(model().shape_for("SecondaryStatus").enum)
    assert names <= set(sagemaker_engine._STATES)


def test_the_last_message_of_a_transition_is_the_reason() -> None:
    transitions = [{"Status": "Starting", "StatusMessage": "old"}, {"StatusMessage": "Insufficient capacity"}]
    description = {"SecondaryStatus": "Starting", "SecondaryStatusTransitions": transitions}
    assert seen(description).reason == "Starting: Insufficient capacity"


class Stubbed:
    """A client whose answers are given, and whose requests botocore checks."""

    def __init__(self, service: str) -> None:
        from botocore.stub import Stubber

        keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
        self.client = session().create_client(service, region_name="us-east-1", **keys)
        self.stub = Stubber(self.client)


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Stubbed]]:
    found = {"sagemaker": Stubbed("sagemaker"), "logs": Stubbed("logs")}

    def client(service: str, region: str, tries: int = 5) -> Any:
        return found[api._CLIENTS[service]].client

    monkeypatch.setattr(api, "_client", client)
    monkeypatch.setattr(sagemaker_engine, "POLL", 0.0)
    monkeypatch.setattr(sagemaker_engine, "LATE", 0.0)
    for item in found.values():
        item.stub.activate()
    yield found
    for item in found.values():
        item.stub.assert_no_pending_responses()
        item.client.close()


HANDLE = {"training_job": "whole-1", "region": "us-east-1"}


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
            ("queued", "Interrupted: the machines were taken"),
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
def test_while_the_containers_run_their_supervisor_knows_better(
    stubbed: dict[str, Stubbed],
    state: Any,
    reason: str | None,
    secondary: str,
    expected: tuple[str, str] | None,
) -> None:
    status = "Stopped" if secondary in ("Stopped", "MaxRuntimeExceeded") else "InProgress"
    answer = {**DESCRIBED, "TrainingJobStatus": status, "SecondaryStatus": secondary}
    stubbed["sagemaker"].stub.add_response("describe_training_job", answer)
    found = ENGINE.look(record_of(submission(SMALL), handle=HANDLE, state=state, reason=reason))
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert found.state == expected[0]
        assert (found.reason or "").startswith(expected[1])


def test_cancel_stops_the_training_job(stubbed: dict[str, Stubbed], tmp_path: Path) -> None:
    stubbed["sagemaker"].stub.add_response("stop_training_job", {}, {"TrainingJobName": "whole-1"})
    ENGINE.cancel(record_of(submission(SMALL), handle=HANDLE), JobStore(str(tmp_path)))
    ENGINE.cancel(record_of(submission(SMALL)), JobStore(str(tmp_path)))  # handed over to nobody


@pytest.mark.parametrize(
    "said",
    [
        "The request was rejected because the training job is in status Completed.",
        "Requested resource not found.",
    ],
)
def test_cancel_of_a_job_that_is_over_or_gone_is_fine(
    stubbed: dict[str, Stubbed], tmp_path: Path, said: str
) -> None:
    stubbed["sagemaker"].stub.add_client_error("stop_training_job", "ValidationException", said)
    ENGINE.cancel(record_of(submission(SMALL), handle=HANDLE), JobStore(str(tmp_path)))


@pytest.mark.parametrize(
    ("code", "said", "advice"),
    [
        (
            "AccessDeniedException",
            "User: x is not authorized to perform: sagemaker:StopTrainingJob",
            "gives you rights",
        ),
        ("ExpiredTokenException", "The security token included in the request is expired", "aws configure"),
        ("ThrottlingException", "Rate exceeded", "in a minute"),
        ("ValidationException", "1 validation error detected", "ValidationException"),
        ("InternalFailure", "", "Try again later"),
    ],
)
def test_a_refusal_says_what_to_do(
    stubbed: dict[str, Stubbed], tmp_path: Path, code: str, said: str, advice: str
) -> None:
    stubbed["sagemaker"].stub.add_client_error("stop_training_job", code, said)
    with pytest.raises(CloudTrainError) as error:
        ENGINE.cancel(record_of(submission(SMALL), handle=HANDLE), JobStore(str(tmp_path)))
    assert "stop the training job 'whole-1'" in str(error.value)
    assert advice in str(error.value)
    assert said[:20] in str(error.value)


def test_what_aws_quotes_of_a_refused_request_shows_no_value(stubbed: dict[str, Stubbed]) -> None:
    said = "Value '{WANDB_API_KEY=secret-value, MODE=fast}' at 'environment' failed to satisfy constraint"
    stubbed["sagemaker"].stub.add_client_error("create_training_job", "ValidationException", said)
    with pytest.raises(ConfigurationError) as error:
        api.create("us-east-1", request(submission(SMALL)), ("secret-value", "fast"))
    assert "failed to satisfy" in str(error.value)
    assert "secret-value" not in str(error.value)
    assert error.value.__cause__ is None


def test_a_name_that_is_taken_is_no_success(stubbed: dict[str, Stubbed]) -> None:
    said = "Training job names must be unique within an AWS account and region"
    stubbed["sagemaker"].stub.add_client_error("create_training_job", "ResourceInUse", said)
    with pytest.raises(ConfigurationError, match="takes each name once"):
        api.create("us-east-1", request(submission(SMALL)), ())


@pytest.mark.parametrize("arrived", [True, False])
def test_where_the_answer_is_lost_it_is_looked_for(stubbed: dict[str, Stubbed], arrived: bool) -> None:
    """To send it once more would be refused, as the name is taken then: by us."""
    stub = stubbed["sagemaker"].stub
    stub.add_client_error("create_training_job", "InternalFailure", "", 500)
    if arrived:
        stub.add_response("describe_training_job", DESCRIBED)
        assert api.create("us-east-1", request(submission(SMALL)), ()).startswith("small-1-")
        return
    stub.add_client_error("describe_training_job", "ValidationException", "Requested resource not found.")
    with pytest.raises(CloudTrainError, match="trouble of its own"):
        api.create("us-east-1", request(submission(SMALL)), ())


NOW = datetime.datetime(2024, 5, 1, tzinfo=datetime.timezone.utc)
DESCRIBED = {
    "TrainingJobName": "whole-1",
    "TrainingJobArn": "arn:aws:sagemaker:us-east-1:111122223333:training-job/whole-1",
    "ModelArtifacts": {"S3ModelArtifacts": "s3://bucket/x"},
    "TrainingJobStatus": "InProgress",
    "SecondaryStatus": "Training",
    "AlgorithmSpecification": {"TrainingInputMode": "File"},
    "ResourceConfig": {"VolumeSizeInGB": 1},
    "StoppingCondition": {},
    "CreationTime": NOW,
}
STREAMS = ["whole-1/algo-1-1700", "whole-1/algo-2-1700"]


def streams(stub: Any, names: list[str] = STREAMS) -> None:
    asked = {"logGroupName": "/aws/sagemaker/TrainingJobs", "logStreamNamePrefix": "whole-1/"}
    stub.add_response(
        "describe_log_streams", {"logStreams": [{"logStreamName": name} for name in names]}, asked
    )


def events(
    stub: Any, stream: str, lines: list[tuple[int, str]], token: str, before: str | None = None
) -> None:
    asked = {"logGroupName": "/aws/sagemaker/TrainingJobs", "logStreamName": stream, "startFromHead": True}
    if before is not None:
        asked["nextToken"] = before
    said = [{"timestamp": when, "message": text} for when, text in lines]
    stub.add_response("get_log_events", {"events": said, "nextForwardToken": token}, asked)


def test_the_lines_of_all_nodes_come_by_their_time(stubbed: dict[str, Stubbed]) -> None:
    stub = stubbed["logs"].stub
    streams(stub)
    events(stub, STREAMS[0], [(1, "one"), (3, "10%\r20%\r30%\n")], "a")
    events(stub, STREAMS[0], [], "a", "a")
    events(stub, STREAMS[1], [(2, "two")], "b")
    events(stub, STREAMS[1], [], "b", "b")
    record = record_of(submission(WHOLE), handle=HANDLE)
    assert list(ENGINE.lines(record, None, follow=False)) == ["[node 0] one", "[node 1] two", "[node 0] 30%"]


def test_the_lines_of_one_node_are_asked_for_alone(stubbed: dict[str, Stubbed]) -> None:
    stub = stubbed["logs"].stub
    streams(stub)
    events(stub, STREAMS[1], [(2, "two")], "b")
    events(stub, STREAMS[1], [], "b", "b")
    record = record_of(submission(WHOLE), handle=HANDLE)
    assert list(ENGINE.lines(record, 1, follow=False)) == ["two"]


def test_the_tenth_container_is_not_the_tenth_node(stubbed: dict[str, Stubbed]) -> None:
    """Names are sorted as texts, by SageMaker and by the entry point: algo-10 comes before algo-2."""
    stub = stubbed["logs"].stub
    names = ["whole-1/algo-10-1700", "whole-1/algo-2-1700"]
    streams(stub, names)
    for name, token in zip(names, "ab", strict=True):
        events(stub, name, [(1, "here")], token)
        events(stub, name, [], token, token)
    record = dataclasses.replace(record_of(submission(WHOLE), handle=HANDLE), nodes=10)
    assert list(ENGINE.lines(record, None, follow=False)) == ["[node 1] here", "[node 2] here"]


def test_following_ends_with_the_job_and_misses_nothing(stubbed: dict[str, Stubbed]) -> None:
    ask, logs = stubbed["sagemaker"].stub, stubbed["logs"].stub
    ask.add_response("describe_training_job", DESCRIBED)
    logs.add_client_error(
        "describe_log_streams", "ResourceNotFoundException", "The specified log group does not exist."
    )
    ask.add_response("describe_training_job", DESCRIBED)
    streams(logs, STREAMS[:1])
    events(logs, STREAMS[0], [(1, "one")], "a")
    events(logs, STREAMS[0], [], "a", "a")
    over = {**DESCRIBED, "TrainingJobStatus": "Completed", "SecondaryStatus": "Completed"}
    ask.add_response("describe_training_job", over)
    streams(logs, STREAMS[:1])
    events(logs, STREAMS[0], [(2, "two")], "b", "a")
    events(logs, STREAMS[0], [], "b", "b")
    ask.add_response("describe_training_job", over)
    streams(logs, STREAMS[:1])
    events(logs, STREAMS[0], [], "b", "b")
    record = record_of(submission(SMALL), handle=HANDLE)
    assert list(ENGINE.lines(record, None, follow=True)) == ["one", "two"]


# --- SageMaker's own model -------------------------------------------------------------------------------------------


@functools.cache
def session() -> Any:
    """One for all tests: it keeps the models, which are megabytes of JSON."""
    import botocore.session

    return botocore.session.Session()


@functools.cache
def model() -> Any:
    return session().get_service_model("sagemaker")


def breaches(found: dict[str, Any]) -> Iterator[str]:
    """Where a request goes against the model of CreateTrainingJob that botocore has, one sentence each."""
    yield from against(found, model().operation_model("CreateTrainingJob").input_shape, "")


def against(value: Any, shape: Any, name: str) -> Iterator[str]:
    yield from sized(value, shape, name)
    if shape.type_name == "structure":
        yield from (f"{name} lacks {key}" for key in set(shape.required_members) - set(value))
        for key, item in value.items():
            if key not in shape.members:
                yield f"{name}.{key} is unknown"
            else:
                yield from against(item, shape.members[key], f"{name}.{key}")
    elif shape.type_name == "list":
        for item in value:
            yield from against(item, shape.member, f"{name}[]")
    elif shape.type_name == "map":
        for key, item in value.items():
            yield from against(key, shape.key, f"{name}.{key}")
            yield from against(item, shape.value, f"{name}.{key}")


def sized(value: Any, shape: Any, name: str) -> Iterator[str]:
    limits = shape.metadata
    size = value if shape.type_name in ("integer", "long") else len(value) if hasattr(value, "__len__") else 0
    if not limits.get("min", size) <= size <= limits.get("max", size):
        yield f"{name}: {size} is out of {limits}"
    if shape.type_name == "string":
        pattern = limits.get("pattern", "(?s:.*)").replace(r"\p{Alnum}", "A-Za-z0-9")
        if not re.fullmatch(pattern, value):
            yield f"{name}: {value!r} is not {pattern}"
        if shape.enum and value not in shape.enum:
            yield f"{name}: {value!r} is none of {shape.enum}"
