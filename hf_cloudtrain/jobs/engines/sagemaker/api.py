"""The requests to AWS about training jobs and endpoints. Only this file of the engines imports boto3, and only for a request."""

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
SAGEMAKER, LOGS, RUNTIME = "SageMaker", "CloudWatch Logs", "SageMaker Runtime"
"""Names for messages."""

_CLIENTS = {SAGEMAKER: "sagemaker", LOGS: "logs", RUNTIME: "sagemaker-runtime"}
_SIGN_IN = "Sign in with `aws configure` or `aws sso login`, or set AWS_PROFILE."


class UnknownError(CloudTrainError):
    """AWS does not know the training job, or the log."""


class _TakenError(CloudTrainError):
    """A training job with this name exists."""


class _OverError(CloudTrainError):
    """The training job has ended."""


class _NoAnswerError(CloudTrainError):
    """AWS may or may not have done it."""


_QUOTA = (
    "Request a higher quota from AWS (Service Quotas, 'for training job usage'), or use a different machine."
)
_RIGHTS = "Ask the administrator of the account for this permission."
_PROBLEM = "{service} itself has a problem ({code}). Try again later."
_REFUSALS: tuple[tuple[str, type[CloudTrainError], str], ...] = (
    ("^ResourceInUse:", _TakenError, ""),
    ("^ResourceNotFound(Exception)?:|resource not found|could not find", UnknownError, ""),
    ("job is in status|is not in a (?:stoppable|valid) state", _OverError, ""),
    (
        "^(5xx |InternalFailure|InternalServerError|ServiceUnavailable|RequestTimeout|50[0234]:)",
        _NoAnswerError,
        _PROBLEM,
    ),
    (
        r"^(\w*Throttl|TooManyRequestsException|RequestLimitExceeded)",
        CloudTrainError,
        "Try again in a minute.",
    ),
    ("^ResourceLimitExceeded", ConfigurationError, _QUOTA),
    ("^(AccessDenied|UnauthorizedOperation)", ConfigurationError, _RIGHTS),
    (
        r"^\w*(Expired|InvalidClientToken|UnrecognizedClient|InvalidSignature|SignatureDoes)",
        ConfigurationError,
        _SIGN_IN,
    ),
)
"""A pattern of "code: message", the error of ours, and what to do.

https://docs.aws.amazon.com/sagemaker/latest/APIReference/CommonErrors.html
"""


def create(region: str, request: Mapping[str, Any], secrets: tuple[str, ...]) -> str:
    """Create a training job, once, even if the answer is lost; return its name.

    Args:
        secrets: values that no error may show; AWS quotes the request that it refuses.
    """
    name = str(request["TrainingJobName"])
    # No retry by boto3: the second request would be refused, because the first one has taken the name.
    client = _client(SAGEMAKER, region, tries=1)
    try:
        _ask(SAGEMAKER, f"create the training job {name!r}", client.create_training_job, secrets, **request)
    except _TakenError as error:
        raise ConfigurationError(
            f"SageMaker already has a training job {name!r}, and accepts each name only once. Run the job again: "
            "it gets a new name."
        ) from error
    except _NoAnswerError as error:
        try:
            describe(region, name)
        except UnknownError:
            raise error from None
    return name


def describe(region: str, name: str) -> dict[str, Any]:
    """What SageMaker knows about a training job. Raises UnknownError."""
    call = _client(SAGEMAKER, region).describe_training_job
    found: dict[str, Any] = _ask(SAGEMAKER, f"look at the training job {name!r}", call, TrainingJobName=name)
    return found


def stop(region: str, name: str) -> None:
    """Stop a training job. One that has ended, or that SageMaker has forgotten, is not an error."""
    call = _client(SAGEMAKER, region).stop_training_job
    try:
        _ask(SAGEMAKER, f"stop the training job {name!r}", call, TrainingJobName=name)
    except (UnknownError, _OverError):
        return


def ask(service: str, region: str, operation: str, what: str, **given: Any) -> Any:
    """The answer of AWS to one request, which is not repeated; endpoints (serving/) use it.

    Args:
        operation: of boto3's client, such as `create_endpoint`.
        what: what is asked, for messages: "create the endpoint 'nsmc'".

    Raises:
        UnknownError: what is named does not exist. ConfigurationError, CloudTrainError: AWS refuses or fails.
    """
    return _ask(service, what, getattr(_client(service, region, tries=1), operation), **given)


class Logs:
    """The streams of a training job in CloudWatch Logs, each read from where the last call ended."""

    def __init__(self, record: JobRecord, node_rank: int | None) -> None:
        self._name = str(record.handle.get("training_job"))
        self._client = _client(LOGS, str(record.handle.get("region")))
        self._node_rank = node_rank
        self._label = record.nodes > 1 and node_rank is None
        # Sorted by name, as the containers sort them: algo-10 comes before algo-2.
        self._hosts = sorted(f"algo-{number}" for number in range(1, record.nodes + 1))
        self._tokens: dict[str, str] = {}

    def news(self) -> Iterator[str]:
        """The lines since the last call, sorted by time."""
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
                page = self._ask("list", self._client.describe_log_streams, **given)
            except UnknownError:  # no job of this account has written a line yet
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
            page = self._ask("read", self._client.get_log_events, **given)
            for event in page.get("events", []):
                # A progress bar overwrites its line.
                text = str(event.get("message", "")).rstrip("\r\n").rpartition("\r")[2]
                yield int(event.get("timestamp", 0)), text
            token = page.get("nextForwardToken")
            if not token or token == self._tokens.get(stream):  # the same token again: the end
                return
            self._tokens[stream] = token

    def _rank(self, stream: str) -> int | None:
        """The node whose stream it is; a name is like `mnli-1-3f2a/algo-2-1700000000`."""
        match = re.match(r"[^/]+/(algo-\d+)", stream)
        return self._hosts.index(match[1]) if match and match[1] in self._hosts else None

    def _ask(self, what: str, call: Any, **given: Any) -> Any:
        return _ask(LOGS, f"{what} the log of {self._name!r}", call, **given)


def configured_region() -> str | None:
    """The region of the user's AWS configuration; None without one, or without boto3."""
    try:
        import boto3
    except ImportError:
        return None
    region: str | None = boto3.session.Session().region_name or os.environ.get("AWS_REGION")
    return region


def missing_here(region: str | None) -> Iterator[str]:
    """What this machine lacks to use AWS, one line each. Sends no request, unless credentials come from a service."""
    try:
        import boto3
        import botocore.exceptions as theirs
    except ImportError:
        yield "boto3 is not installed: pip install 'hf_cloudtrain[sagemaker]'"
        return
    if region is None:
        yield "No AWS region is set. Set one: export AWS_DEFAULT_REGION=us-east-1"
    try:
        found = boto3.session.Session().get_credentials()
    except theirs.BotoCoreError as error:
        yield f"{_plain(error)} {_SIGN_IN}"
    else:
        if found is None:
            yield f"No AWS credentials were found. {_SIGN_IN}"


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
        raise ConfigurationError(f"Cannot connect to {service}: {_plain(error)}") from None


def _ask(service: str, what: str, call: Any, secrets: tuple[str, ...] = (), **given: Any) -> Any:
    """The answer to a request. Every error becomes one of ours, without secrets."""
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
    """Our error for an answer of AWS."""
    answer = error.response.get("Error", {})
    code, message = str(answer.get("Code")), _plain(answer.get("Message") or "", secrets)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    could_not = f"Could not {what}: {message or code}".removesuffix(".")
    for pattern, kind, advice in _REFUSALS:
        if re.search(pattern, f"{'5xx ' * (status >= 500)}{code}: {message}", re.IGNORECASE):
            return kind(f"{could_not}. {advice.format(service=service, code=code)}".rstrip())
    return ConfigurationError(f"{could_not}. ({code})")


def _plain(message: object, secrets: tuple[str, ...] = ()) -> str:
    """A message of AWS or boto3 on one line, without secrets."""
    hidden = tuple(sorted((secret for secret in secrets if len(secret) > 3), key=len, reverse=True))
    return redact(" ".join(str(message).split()), (*hidden, *secrets_of_environment()))[:1000]
