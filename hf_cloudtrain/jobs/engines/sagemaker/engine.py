"""The engine `sagemaker`: what is uploaded and requested for a training job, and what its status means for the job."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.manifest import Manifest
from hf_cloudtrain.datasets.store import DatasetStore
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError, JobFileError
from hf_cloudtrain.jobs.engines.protocol import EngineStatus, as_text, states
from hf_cloudtrain.jobs.engines.sagemaker import api
from hf_cloudtrain.jobs.engines.sagemaker import request as requests
from hf_cloudtrain.jobs.engines.sagemaker.request import problems, request
from hf_cloudtrain.jobs.node.archive import pack
from hf_cloudtrain.jobs.records import OVER, JobRecord, JobStore, State
from hf_cloudtrain.jobs.submission import FILE, Submission
from hf_cloudtrain.runtime.redaction import redact, secrets_of_environment
from hf_cloudtrain.runtime.text import count_text
from hf_cloudtrain.storage.client import Storage

POLL = 5.0
"""Seconds between two requests for new lines. CloudWatch allows an account 25 requests a second."""
LATE = 10.0
"""Seconds after the end of a job during which lines may still arrive."""

_STATES = states(
    queued="Pending Interrupted",
    starting="Starting LaunchingMLInstances PreparingTrainingStack Downloading DownloadingTrainingImage Restarting",
    running="Training Updating Uploading",
    stopping="Stopping",
    finished="Completed",
    failed="Failed",
    cancelled="Stopped",
    preempted="MaxRuntimeExceeded MaxWaitTimeExceeded",
)
"""By SecondaryStatus: https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_DescribeTrainingJob.html"""
_EXPLAINED = {
    "Interrupted": "the machines were preempted, and SageMaker waits for others",
    "MaxRuntimeExceeded": "the training took longer than 'max_run'",
    "MaxWaitTimeExceeded": "waiting and training took longer than 'max_wait'",
}


class SagemakerEngine:
    """Training jobs of the account and region of the user's AWS configuration. See `Engine`."""

    def check(self, submission: Submission) -> None:
        """Refuse what SageMaker would refuse, all at once. Looks only at this machine."""
        found = [*problems(submission), *_problems_here(submission)]
        if found:
            raise JobFileError("\n".join(found))

    def show(self, submission: Submission) -> str:
        """The request, below comments that name what is missing and what to know."""
        plan = submission.plan
        shape = f"{count_text(plan.nodes, 'node')} of {count_text(plan.nproc_per_node, 'process')}"
        machine = requests.instance_type(submission) or "a machine that the job must name"
        spot = ", managed spot" if requests.is_spot(submission) else ""
        notes = [
            f"CreateTrainingJob: {shape}, each on {machine}{spot}",
            *requests.warnings(submission),
            *(f"Missing: {problem}" for problem in problems(submission)),
        ]
        dataset = None
        with contextlib.suppress(CloudTrainError):  # a store that does not answer must not hide the rest
            dataset = _dataset(submission)
        return "".join(f"# {note}\n" for note in notes) + as_text(request(submission, dataset=dataset))

    def submit(self, submission: Submission, store: JobStore, record: JobRecord) -> JobRecord:
        """Upload job and workspace to the store, and create the training job."""
        self.check(submission)
        variables = submission.plan.own_variables(os.environ)
        region = _region(submission)
        assert region is not None  # by `check`
        dataset = _dataset(submission)
        number = int(record.handle.get("number", 0)) + 1
        wanted = request(submission, variables=variables, dataset=dataset, number=number)
        _upload(submission, dataset)
        name = api.create(region, wanted, tuple(variables.values()))
        handle = {"training_job": name, "region": region, "number": number}
        return store.write(record, state="queued", reason=None, handle=handle)

    def look(self, record: JobRecord) -> EngineStatus | None:
        """What SageMaker says; while the containers run, their supervisor writes the record, and knows more."""
        if "training_job" not in record.handle:
            return None
        try:
            found = api.describe(*_own(record, JobStore()))
        except api.UnknownError as error:
            return EngineStatus("lost", str(error))
        now = status_of(found)
        if now.state == "running" and record.state in ("starting", "running", "stopping"):
            return None
        if now.state in ("cancelled", "preempted") and record.state == "stopping" and record.reason:
            why = f"{now.reason}. " if found.get("SecondaryStatus") in _EXPLAINED else ""
            return EngineStatus(now.state, why + record.reason)  # the record names the newest checkpoint
        return now

    def cancel(self, record: JobRecord, store: JobStore) -> None:
        """Ask SageMaker to stop the job: it sends SIGTERM, and SIGKILL after 120 s."""
        if "training_job" in record.handle:
            api.stop(*_own(record, store))

    def lines(self, record: JobRecord, node_rank: int | None, follow: bool) -> Iterator[str]:
        """From CloudWatch Logs, where each container has a stream."""
        if "training_job" in record.handle:
            _own(record, JobStore())
        logs = api.Logs(record, node_rank)
        ended: float | None = None
        while True:
            # Before the lines are read, so that none is missed; some arrive even later, as CloudWatch lags.
            now = self.look(record) if follow else None
            if now is not None and now.state in OVER:
                ended = ended or time.monotonic()
            found = False
            for line in logs.news():
                found = True
                yield line
            if not follow or (ended is not None and not found and time.monotonic() >= ended + LATE):
                return
            time.sleep(POLL)


def _own(record: JobRecord, store: JobStore) -> tuple[str, str]:
    """Region and name of this job's training job.

    Raises:
        ConfigurationError: the record, which is untrusted, names a training job that is not this job's, or no region.
    """
    name, region, number = (record.handle.get(key) for key in ("training_job", "region", "number"))
    own = requests.training_job_name(store.url, record.id, number if isinstance(number, int) else 1)
    if name != own:
        raise ConfigurationError(
            f"The record of the job {record.id!r} names the training job {str(name)[:100]!r}, but this job's in the store "
            f"{store.url!r} is {own!r}: the record is damaged, or the job was submitted with a different store. No request was "
            f"sent. Set {env.STORE} to the store of its submission, or use the SageMaker console."
        )
    if not isinstance(region, str):
        raise ConfigurationError(
            f"The record of the job {record.id!r} is damaged: {str(region)[:100]!r} is not an AWS region. No request was "
            f"sent. Find the training job {own!r} in the SageMaker console."
        )
    return region, own


def status_of(description: Mapping[str, Any]) -> EngineStatus:
    """Our state and reason for an answer of DescribeTrainingJob."""
    secondary = str(description.get("SecondaryStatus") or description.get("TrainingJobStatus"))
    state = _STATES.get(secondary) or _STATES.get(str(description.get("TrainingJobStatus"))) or "running"
    if state == "finished":
        return EngineStatus("finished")
    failure = description.get("FailureReason")
    if state == "failed" and failure:
        text = redact(str(failure), secrets_of_environment())
        # container_main writes "preempted: …" or "cancelled: …"; SageMaker adds "AlgorithmError: " and the code.
        match = re.match(r"(?:\w+: )?(preempted|cancelled): (.*?)(?:, exit code: \d+)?$", text, re.DOTALL)
        return EngineStatus(cast("State", match[1]), match[2]) if match else EngineStatus("failed", text)
    detail = _EXPLAINED.get(secondary)
    if detail is None:
        message = (description.get("SecondaryStatusTransitions") or [{}])[-1].get("StatusMessage")
        detail = redact(str(message), secrets_of_environment()) if message else None
    return EngineStatus(state, f"{secondary}: {detail}" if detail else secondary)


def _upload(submission: Submission, dataset: Manifest | None) -> None:
    """Upload what the containers need from us."""
    storage = Storage(requests.own_prefix(submission).rstrip("/"), env.storage_options(None))
    plan = dataclasses.replace(submission.plan, grace_seconds=requests.grace(submission))
    job = dataclasses.replace(submission, plan=plan).encode()
    if submission.has_workspace:
        with tempfile.TemporaryDirectory() as folder:
            archive = Path(folder, requests.WORKSPACE)
            pack(submission.workspace, archive)
            storage.upload(str(archive), requests.WORKSPACE)
    if dataset is not None:
        storage.write(requests.DATASET, dataset.encode())
    storage.write(FILE, json.dumps(job, indent=2).encode())


def _dataset(submission: Submission) -> Manifest | None:
    data = submission.job.data
    if data is None:
        return None
    name = data.name.partition("@")[0]
    return DatasetStore(submission.store).find(name, submission.dataset_version).manifest


def _problems_here(submission: Submission) -> Iterator[str]:
    """What this shell lacks."""
    try:
        yield from requests.value_problems(submission.plan.own_variables(os.environ))
    except ConfigurationError as error:
        yield str(error)
    yield from api.missing_here(_region(submission))


def _region(submission: Submission) -> str | None:
    """The region of `vm` if its cloud is AWS, else that of the user's configuration, if there is one."""
    machine = submission.job.machine
    return machine.region if machine is not None and machine.cloud == "aws" else api.configured_region()


ENGINE = SagemakerEngine()
