"""Requests to AWS: refusals, lost answers, and the lines of CloudWatch Logs."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain.errors import CloudTrainError, ConfigurationError
from hf_cloudtrain.jobs.engines.sagemaker import api
from hf_cloudtrain.jobs.engines.sagemaker.engine import ENGINE
from hf_cloudtrain.jobs.engines.sagemaker.request import request, training_job_name
from hf_cloudtrain.jobs.records import JobStore
from tests.unit.jobs.engines.sagemaker._aws import DESCRIBED, HANDLE, NAME, Stubbed
from tests.unit.jobs.engines.sagemaker._requests import SMALL, WHOLE, record_of, submission


def cancel_small(tmp_path: Path) -> None:
    store = JobStore(str(tmp_path))
    handle = {**HANDLE, "training_job": training_job_name(store.url, "small-1")}
    ENGINE.cancel(record_of(submission(SMALL), handle=handle), store)


def test_cancel_stops_the_training_job(stubbed: dict[str, Stubbed], tmp_path: Path) -> None:
    store = JobStore(str(tmp_path))
    for number in (1, 2):
        name = training_job_name(store.url, "small-1", number)
        handle = {"training_job": name, "region": "us-east-1", "number": number}
        stubbed["sagemaker"].stub.add_response("stop_training_job", {}, {"TrainingJobName": name})
        ENGINE.cancel(record_of(submission(SMALL), handle=handle), store)
    ENGINE.cancel(record_of(submission(SMALL)), store)  # SageMaker never had it


def test_law_11_no_training_job_of_the_account_but_the_jobs_own_is_stopped_or_shown(
    stubbed: dict[str, Stubbed],
) -> None:
    store = JobStore()
    for name, number in (
        ("the-training-of-a-colleague", 1),
        (training_job_name(store.url, "other-1"), 1),
        (training_job_name(store.url, "small-1"), 2),
        (training_job_name("s3://other/store", "small-1"), "1"),
        (["small-1"], None),
    ):
        handle = {"training_job": name, "region": "us-east-1", "number": number}
        record = record_of(submission(SMALL), handle=handle)
        for ask in (
            partial(ENGINE.cancel, record, store),
            partial(ENGINE.look, record),
            partial(next, ENGINE.lines(record, None, follow=False)),
        ):
            with pytest.raises(
                ConfigurationError, match=r"No request was sent\. Set HF_CLOUDTRAIN_STORE"
            ) as error:
                ask()
            assert str(name) in str(error.value)


@pytest.mark.parametrize("more", [{}, {"region": None}, {"region": 7}])
def test_a_record_without_a_region_is_refused_with_a_sentence(
    stubbed: dict[str, Stubbed], more: dict[str, object]
) -> None:
    record = record_of(submission(WHOLE), handle={"training_job": NAME, **more})
    for ask in (partial(ENGINE.cancel, record, JobStore()), partial(ENGINE.look, record)):
        with pytest.raises(ConfigurationError, match=r"is damaged: '\w+' is not an AWS region"):
            ask()


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
    cancel_small(tmp_path)


@pytest.mark.parametrize(
    ("code", "said", "advice"),
    [
        (
            "AccessDeniedException",
            "User: x is not authorized to perform: sagemaker:StopTrainingJob",
            "administrator of the account",
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
        cancel_small(tmp_path)
    assert "stop the training job 'small-1-" in str(error.value)
    assert advice in str(error.value)
    assert said[:20] in str(error.value)


def test_no_value_is_shown_when_aws_quotes_a_refused_request(stubbed: dict[str, Stubbed]) -> None:
    said = "Value '{WANDB_API_KEY=secret-value, MODE=fast}' at 'environment' failed to satisfy constraint"
    stubbed["sagemaker"].stub.add_client_error("create_training_job", "ValidationException", said)
    with pytest.raises(ConfigurationError) as error:
        api.create("us-east-1", request(submission(SMALL)), ("secret-value", "fast"))
    assert "failed to satisfy" in str(error.value)
    assert "secret-value" not in str(error.value)
    assert error.value.__cause__ is None


def test_a_name_that_exists_is_refused(stubbed: dict[str, Stubbed]) -> None:
    said = "Training job names must be unique within an AWS account and region"
    stubbed["sagemaker"].stub.add_client_error("create_training_job", "ResourceInUse", said)
    with pytest.raises(ConfigurationError, match="accepts each name only once"):
        api.create("us-east-1", request(submission(SMALL)), ())


@pytest.mark.parametrize("arrived", [True, False])
def test_after_a_lost_answer_the_job_is_looked_up(stubbed: dict[str, Stubbed], arrived: bool) -> None:
    """A second request would be refused, because the first one has taken the name."""
    stub = stubbed["sagemaker"].stub
    stub.add_client_error("create_training_job", "InternalFailure", "", 500)
    if arrived:
        stub.add_response("describe_training_job", DESCRIBED)
        assert api.create("us-east-1", request(submission(SMALL)), ()).startswith("small-1-")
        return
    stub.add_client_error("describe_training_job", "ValidationException", "Requested resource not found.")
    with pytest.raises(CloudTrainError, match="itself has a problem"):
        api.create("us-east-1", request(submission(SMALL)), ())


STREAMS = [f"{NAME}/algo-1-1700", f"{NAME}/algo-2-1700"]


def streams(stub: Any, names: list[str] = STREAMS) -> None:
    asked = {"logGroupName": "/aws/sagemaker/TrainingJobs", "logStreamNamePrefix": f"{NAME}/"}
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


def test_the_lines_of_all_nodes_are_sorted_by_time(stubbed: dict[str, Stubbed]) -> None:
    stub = stubbed["logs"].stub
    streams(stub)
    events(stub, STREAMS[0], [(1, "one"), (3, "10%\r20%\r30%\n")], "a")
    events(stub, STREAMS[0], [], "a", "a")
    events(stub, STREAMS[1], [(2, "two")], "b")
    events(stub, STREAMS[1], [], "b", "b")
    record = record_of(submission(WHOLE), handle=HANDLE)
    assert list(ENGINE.lines(record, None, follow=False)) == ["[node 0] one", "[node 1] two", "[node 0] 30%"]


def test_only_the_lines_of_one_node_are_requested(stubbed: dict[str, Stubbed]) -> None:
    stub = stubbed["logs"].stub
    streams(stub)
    events(stub, STREAMS[1], [(2, "two")], "b")
    events(stub, STREAMS[1], [], "b", "b")
    record = record_of(submission(WHOLE), handle=HANDLE)
    assert list(ENGINE.lines(record, 1, follow=False)) == ["two"]


def test_the_tenth_container_is_not_the_tenth_node(stubbed: dict[str, Stubbed]) -> None:
    """SageMaker and the containers sort names as text: algo-10 comes before algo-2."""
    stub = stubbed["logs"].stub
    names = [f"{NAME}/algo-10-1700", f"{NAME}/algo-2-1700"]
    streams(stub, names)
    for name, token in zip(names, "ab", strict=True):
        events(stub, name, [(1, "here")], token)
        events(stub, name, [], token, token)
    record = dataclasses.replace(record_of(submission(WHOLE), handle=HANDLE), nodes=10)
    assert list(ENGINE.lines(record, None, follow=False)) == ["[node 1] here", "[node 2] here"]


def test_following_ends_after_the_job_and_misses_no_line(stubbed: dict[str, Stubbed]) -> None:
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
    record = dataclasses.replace(record_of(submission(WHOLE), handle=HANDLE), nodes=1)
    assert list(ENGINE.lines(record, None, follow=True)) == ["one", "two"]
