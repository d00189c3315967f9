"""Endpoints of SageMaker, with Hugging Face's inference container: real-time or serverless.

    model.tar.gz -> S3; CreateModel, CreateEndpointConfig, CreateEndpoint; wait until InService

The requests are data (`requests`), so that tests compare them with files and botocore checks them. None of this has met AWS.
https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_CreateEndpoint.html
"""

from __future__ import annotations

import gzip
import logging
import re
import secrets
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError
from hf_cloudtrain.jobs.engines.sagemaker import api
from hf_cloudtrain.serving.endpoints.records import Endpoint, Endpoints, State
from hf_cloudtrain.serving.models.source import Model
from hf_cloudtrain.storage.client import Storage

logger = logging.getLogger(__name__)

POLL = 15.0
ARCHIVE = "model.tar.gz"
VARIANT = "AllTraffic"
WORDS = {"InService": "in service", "Failed": "failed", "Deleting": "deleting"}
PARTS = (("endpoint", "EndpointName"), ("endpoint_config", "EndpointConfigName"), ("model", "ModelName"))
"""What is made at AWS, last first: the part of the operation's name, and the key of its name."""


@dataclass(frozen=True)
class Machine:
    """What an endpoint runs on.

    Args:
        role: ARN of the role that the endpoint assumes.
        image: URI of the container in ECR.
        serverless_mb: memory of a serverless endpoint; None: instances.
    """

    role: str
    image: str
    instance_type: str = "ml.m5.xlarge"
    instances: int = 1
    serverless_mb: int | None = None


def check(machine: Machine, store: str, region: str | None, model: Model | None = None) -> None:
    """Raise ConfigurationError with everything that keeps SageMaker from serving a model, one line each.

    Args:
        model: None if it is not downloaded yet.
    """
    found = "\n".join([*_problems(machine, store, model), *api.missing_here(region)])
    if found:
        raise ConfigurationError(f"SageMaker cannot serve {model.title if model else 'a model'}:\n{found}")


def _problems(machine: Machine, store: str, model: Model | None) -> Iterator[str]:
    if not re.fullmatch(r"arn:aws[a-z-]*:iam::\d{12}:role/?[\w+=,.@/-]+", machine.role, re.ASCII):
        yield f"--role {machine.role!r} is not the ARN of a role, such as 'arn:aws:iam::111122223333:role/serving'."
    if not re.match(r"\d{12}\.dkr\.ecr[a-z0-9.-]*\.[a-z0-9.-]+/", machine.image):
        yield f"--image {machine.image!r} is not in ECR. docs/endpoints.md says where the images of Hugging Face are."
    if not store.startswith(("s3://", "s3a://")):
        yield f"The store {store!r} is not on S3. Set one: export {env.STORE}=s3://bucket/store"
    if model is None:
        return
    if model.base is not None:
        yield "The container loads no adapters. Merge it (merge_and_unload), and save the model by name."
    if model.processor is not None:
        yield "The tokenizer must be in the checkpoint; the container has no --processor."


def archive(model: Model, path: Path) -> None:
    """Write the files of a model as SageMaker unpacks them into /opt/ml/model. The same files give the same bytes."""
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for file in sorted(path for path in model.folder.rglob("*") if path.is_file()):
            info = tar.gettarinfo(str(file), file.relative_to(model.folder).as_posix())
            info.uid = info.gid = info.mtime = 0
            info.uname = info.gname = ""
            info.mode = 0o644
            with file.open("rb") as content:
                tar.addfile(info, content)


def requests(name: str, model: Model, machine: Machine, data_url: str) -> dict[str, dict[str, Any]]:
    """The three requests, by operation.

    Args:
        name: of all three, from `aws_name`.
        data_url: of the archive on S3.
    """
    variables = {} if model.task is None else {"HF_TASK": model.task.name}
    variant: dict[str, Any] = {"VariantName": VARIANT, "ModelName": name}
    if machine.serverless_mb is not None:
        variant["ServerlessConfig"] = {"MemorySizeInMB": machine.serverless_mb, "MaxConcurrency": 10}
    else:
        variant |= {"InstanceType": machine.instance_type, "InitialInstanceCount": machine.instances}
    return {
        "create_model": {
            "ModelName": name,
            "ExecutionRoleArn": machine.role,
            "PrimaryContainer": {"Image": machine.image, "ModelDataUrl": data_url, "Environment": variables},
        },
        "create_endpoint_config": {"EndpointConfigName": name, "ProductionVariants": [variant]},
        "create_endpoint": {"EndpointName": name, "EndpointConfigName": name},
    }


def data_url(endpoints: Endpoints, name: str) -> str:
    """Where the archive of an endpoint is."""
    return endpoints.jobs.below("endpoints", name, ARCHIVE)


def create(
    endpoints: Endpoints,
    endpoint: Endpoint,
    asked: dict[str, dict[str, Any]],
    packed: Path,
    on_wait: Callable[[str], None],
) -> Endpoint:
    """Upload the archive, and make model, configuration and endpoint; returns when the endpoint is in service.

    Raises:
        CloudTrainError: AWS refused or failed; what had been made is deleted again.
    """
    endpoints.add(endpoint)
    try:
        try:
            on_wait(f"Uploading {ARCHIVE}.")
            _archives(endpoints, endpoint.name).upload(str(packed), ARCHIVE)
            for operation, request in asked.items():
                on_wait(f"SageMaker: {operation.replace('_', ' ')} {_name(endpoint)!r}.")
                _ask(endpoint, operation, **request)
            while (state := look(endpoint)).word != "in service":
                if state.word != "starting":
                    raise CloudTrainError(
                        f"The endpoint {endpoint.name!r} is {state.word}. {state.reason or ''}".strip()
                    )
                on_wait("Waiting until it is in service; this takes minutes.")
                time.sleep(POLL)
        except Exception:
            try:
                delete(endpoints, endpoint)
            except CloudTrainError as error:
                logger.warning(
                    "%s Delete the rest with `cloudtrain endpoint delete %s`.", error, endpoint.name
                )
            raise
    except KeyboardInterrupt:  # also while it is deleted again
        logger.warning(
            "The endpoint %r may still exist at AWS and incur cost. See it with `cloudtrain endpoint view %s`; delete it with `cloudtrain "
            "endpoint delete %s`.",
            *[endpoint.name] * 3,
        )
        raise
    return endpoint


def look(endpoint: Endpoint) -> State:
    """How SageMaker's endpoint is."""
    try:
        found = _ask(endpoint, "describe_endpoint", EndpointName=_name(endpoint))
    except api.UnknownError:
        return State("gone", "SageMaker does not know it.")
    return State(WORDS.get(found["EndpointStatus"], "starting"), found.get("FailureReason"))


def invoke(endpoint: Endpoint, body: bytes, kind: str, accept: str) -> bytes:
    """The answer to a request."""
    region = str(endpoint.handle.get("region"))
    what = f"invoke the endpoint {endpoint.name!r}"
    given = {"EndpointName": _name(endpoint), "Body": body, "ContentType": kind, "Accept": accept}
    answer: bytes = api.ask(api.RUNTIME, region, "invoke_endpoint", what, **given)["Body"].read()
    return answer


def delete(endpoints: Endpoints, endpoint: Endpoint) -> None:
    """Delete all that was made, last first; what is gone already is not an error. The record goes last, so it can be repeated."""
    for part, key in PARTS:
        try:
            _ask(endpoint, f"delete_{part}", **{key: _name(endpoint)})
        except api.UnknownError:
            continue
    _archives(endpoints, endpoint.name).delete([ARCHIVE])
    endpoints.remove(endpoint.name)


def aws_name(name: str) -> str:
    """A new name for AWS, where no other endpoint has it: so whatever has it may be deleted."""
    return f"{name}-{secrets.token_hex(4)}"


def _name(endpoint: Endpoint) -> str:
    return str(endpoint.handle.get("name"))


def _ask(endpoint: Endpoint, operation: str, **given: Any) -> Any:
    what = f"{operation.replace('_', ' ')} {_name(endpoint)!r}"
    return api.ask(api.SAGEMAKER, str(endpoint.handle.get("region")), operation, what, **given)


def _archives(endpoints: Endpoints, name: str) -> Storage:
    return Storage(endpoints.jobs.below("endpoints", name), env.storage_options(None))
