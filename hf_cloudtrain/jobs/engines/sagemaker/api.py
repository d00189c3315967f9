"""What is asked of AWS for a training job: the one module of the engines that imports boto3, and only when it asks."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from hf_cloudtrain.errors import CloudTrainError, ConfigurationError, MissingExtraError
from hf_cloudtrain.jobs.records import JobRecord
from hf_cloudtrain.runtime.redaction import redact, secrets_of_environment

LOG_GROUP = "/aws/sagemaker/TrainingJobs"
"""https://docs.aws.amazon.com/sagemaker/latest/dg/logging-cloudwatch.html"""
SAGEMAKER, LOGS = "SageMaker", "CloudWatch Logs"
"""As people call them."""

_CLIENTS = {SAGEMAKER: "sagemaker", LOGS: "logs"}
_SIGN_IN = "Sign in with `aws configure` or `aws sso login`, or set AWS_PROFILE."
_WORTH_A_LOOK = {
    "InternalFailure",
    "InternalServerError",
    "ServiceUnavailable",
    "RequestTimeout",
    "500",
    "502",
    "503",
    "504",
}


class UnknownError(CloudTrainError):
    """AWS does not know what was asked for."""


class _TakenError(CloudTrainError):
    """A training job has the name already."""


class _OverError(CloudTrainError):
    """The training job has ended."""


class _NoAnswerError(CloudTrainError):
    """Nobody knows whether it was done."""


def create(region: str, request: Mapping[str, Any], secrets: tuple[str, ...]) -> str:
    """Create a training job, once, even where the answer is lost; gives its name.

    Args:
        secrets: values that no error may show; AWS quotes what it refuses.
    """
    name = str(request["TrainingJobName"])
    # By itself boto3 would send it again, and then hear that the name is taken: by us.
    client = _client(SAGEMAKER, region, tries=1)
    try:
        _asked(SAGEMAKER, f"create the training job {name!r}", client.create_training_job, secrets, **request)
    except _TakenError as error:
        raise ConfigurationError(
            f"SageMaker has had a training job {name!r} before, and takes each name once. Run the job again for another."
        ) from error
    except _NoAnswerError as error:
        try:
            describe(region, name)
        except UnknownError:
            raise error from None
    return name


def describe(region: str, name: str) -> dict[str, Any]:
    """What SageMaker knows of a training job. Raises UnknownError."""
    call = _client(SAGEMAKER, region).describe_training_job
    found: dict[str, Any] = _asked(
        SAGEMAKER, f"look at the training job {name!r}", call, TrainingJobName=name
    )
    return found


def stop(region: str, name: str) -> None:
    """Ask for the end of a training job; one that has ended is fine."""
    call = _client(SAGEMAKER, region).stop_training_job
    try:
        _asked(SAGEMAKER, f"stop the training job {name!r}", call, TrainingJobName=name)
    except (UnknownError, _OverError):
        return


class Logs:
    """The streams of a training job in CloudWatch Logs, each read on from where it was."""

    def __init__(self, record: JobRecord, node_rank: int | None) -> None:
        self._name = str(record.handle.get("training_job"))
        self._client = _client(LOGS, str(record.handle.get("region")))
        self._node_rank = node_rank
        self._label = record.nodes > 1 and node_rank is None
        # As the containers count: by their names, of which algo-10 comes before algo-2.
        self._hosts = sorted(f"algo-{number}" for number in range(1, record.nodes + 1))
        self._tokens: dict[str, str] = {}

    def news(self) -> Iterator[str]:
        """Lines since the last time, by their time."""
        found: list[tuple[int, int, str]] = []
        for stream in self._streams():
            rank = self._rank(stream)
            if self._node_rank in (None, rank):
                label = f"[node {rank}] " if self._label else ""
                found += [(when, len(found), label + line) for when, line in self._events(stream)]
        yield from (line for _, _, line in sorted(found, key=lambda item: item[:2]))

    def _streams(self) -> list[str]:
        found: list[str] = []
        given: dict[str, Any] = {"logGroupName": LOG_GROUP, "logStreamNamePrefix": f"{self._name}/"}
        while True:
            try:
                page = self._asked("list", self._client.describe_log_streams, **given)
            except UnknownError:  # no job of this account has said anything yet
                return []
            found += [str(stream["logStreamName"]) for stream in page.get("logStreams", [])]
            if not page.get("nextToken"):
                return sorted(found)
            given["nextToken"] = page["nextToken"]

    def _events(self, stream: str) -> Iterator[tuple[int, str]]:
        while True:
            given: dict[str, Any] = {
                "logGroupName": LOG_GROUP,
                "logStreamName": stream,
                "startFromHead": True,
            }
            if stream in self._tokens:
                given["nextToken"] = self._tokens[stream]
            page = self._asked("read", self._client.get_log_events, **given)
            for event in page.get("events", []):
                # A progress bar is one line that writes over itself.
                text = str(event.get("message", "")).rstrip("\r\n").rpartition("\r")[2]
                yield int(event.get("timestamp", 0)), text
            token = page.get("nextForwardToken")
            if not token or token == self._tokens.get(stream):  # the same one again: that was all
                return
            self._tokens[stream] = token

    def _rank(self, stream: str) -> int | None:
        """The node that a stream such as `mnli-1-3f2a/algo-2-1700000000` is of."""
        match = re.match(r"[^/]+/(algo-\d+)", stream)
        return self._hosts.index(match[1]) if match and match[1] in self._hosts else None

    def _asked(self, what: str, call: Any, **given: Any) -> Any:
        return _asked(LOGS, f"{what} the log of {self._name!r}", call, **given)


def configured_region() -> str | None:
    """The region of the user's AWS configuration; None without boto3, too."""
    try:
        import boto3
    except ImportError:
        return None
    region: str | None = boto3.session.Session().region_name or os.environ.get("AWS_REGION")
    return region


def missing_here(region: str | None) -> Iterator[str]:
    """What this machine lacks to ask AWS, one sentence each. Asks no service of AWS, unless its credentials come from one."""
    try:
        import boto3
        import botocore.exceptions as theirs
    except ImportError:
        yield "boto3 is not installed: pip install 'hf_cloudtrain[sagemaker]'"
        return
    if region is None:
        yield "There is no region. Set it: export AWS_DEFAULT_REGION=us-east-1"
    try:
        found = boto3.session.Session().get_credentials()
    except theirs.BotoCoreError as error:
        yield f"{_plain(error)} {_SIGN_IN}"
    else:
        if found is None:
            yield f"There are no AWS credentials. {_SIGN_IN}"


def _client(service: str, region: str, tries: int = 5) -> Any:
    try:
        import boto3
        import botocore.config
        import botocore.exceptions as theirs
    except ImportError as error:
        raise MissingExtraError("boto3 is not installed: pip install 'hf_cloudtrain[sagemaker]'") from error
    config = botocore.config.Config(
        retries={"total_max_attempts": tries}, connect_timeout=10, read_timeout=60
    )
    try:
        return boto3.session.Session(region_name=region).client(_CLIENTS[service], config=config)
    except (theirs.BotoCoreError, ValueError) as error:
        raise ConfigurationError(f"{service} cannot be asked: {_plain(error)}") from None


def _asked(service: str, what: str, call: Any, secrets: tuple[str, ...] = (), **given: Any) -> Any:
    """The answer to a request; every error leaves here as one of ours, with no secret in it."""
    import botocore.exceptions as theirs

    try:
        return call(**given)
    except theirs.ClientError as error:
        raise _refusal(service, what, error, secrets) from None
    except (theirs.ConnectionError, theirs.HTTPClientError) as error:
        raise _NoAnswerError(
            f"Could not {what}: {service} does not answer ({_plain(error, secrets)}). Check the network."
        ) from None
    except (
        theirs.NoCredentialsError,
        theirs.PartialCredentialsError,
        theirs.CredentialRetrievalError,
    ) as error:
        raise ConfigurationError(f"Could not {what}: {_plain(error)}. {_SIGN_IN}") from None
    except theirs.BotoCoreError as error:
        raise ConfigurationError(f"Could not {what}: {_plain(error, secrets)}") from None


def _refusal(service: str, what: str, error: Any, secrets: tuple[str, ...]) -> CloudTrainError:
    """Our error for what AWS answered, by its code and, where that says nothing, by its words.

    https://docs.aws.amazon.com/sagemaker/latest/APIReference/CommonErrors.html
    """
    answer = error.response.get("Error", {})
    code, said = str(answer.get("Code")), _plain(answer.get("Message") or "", secrets)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    could_not = f"Could not {what}: {said or code}"
    could_not += "" if could_not.endswith(".") else "."
    if code == "ResourceInUse":
        return _TakenError(could_not)
    if code in ("ResourceNotFound", "ResourceNotFoundException") or re.search(
        "resource not found|could not find", said, re.IGNORECASE
    ):
        return UnknownError(could_not)
    if re.search("job is in status|is not in a (?:stoppable|valid) state", said, re.IGNORECASE):
        return _OverError(could_not)
    if code in _WORTH_A_LOOK or status >= 500:
        return _NoAnswerError(f"{could_not} {service} has trouble of its own ({code}). Try again later.")
    if "Throttl" in code or code in ("TooManyRequestsException", "RequestLimitExceeded"):
        return CloudTrainError(f"{could_not} {service} asks for fewer requests. Try again in a minute.")
    if code == "ResourceLimitExceeded":
        return ConfigurationError(
            f"{could_not} Ask AWS for more (Service Quotas, 'for training job usage'), or take another machine."
        )
    if code.startswith("AccessDenied") or code == "UnauthorizedOperation":
        return ConfigurationError(f"{could_not} Ask whoever gives you rights in this account.")
    if re.search(
        "Expired|InvalidClientToken|UnrecognizedClient|InvalidSignature|SignatureDoesNotMatch", code
    ):
        return ConfigurationError(f"{could_not} {_SIGN_IN}")
    return ConfigurationError(f"{could_not} ({code})")


def _plain(said: object, secrets: tuple[str, ...] = ()) -> str:
    """What AWS or boto3 said, on one line, without secrets."""
    hidden = tuple(sorted((secret for secret in secrets if len(secret) > 3), key=len, reverse=True))
    return redact(" ".join(str(said).split()), (*hidden, *secrets_of_environment()))[:1000]
