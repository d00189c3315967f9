"""Training jobs of Amazon SageMaker, by boto3; their containers run sagemaker_entry.py.

    submit    workspace and job go to <store>/jobs/<id>/submission/, then CreateTrainingJob (sagemaker_request.py)
    look      DescribeTrainingJob
    cancel    StopTrainingJob: SIGTERM, and SIGKILL after 120 s
    lines     CloudWatch Logs

SageMaker itself starts a managed spot job again when its machines were taken away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.manifest import Manifest
from hf_cloudtrain.datasets.store import DatasetStore
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError, JobFileError
from hf_cloudtrain.jobs.engines.protocol import EngineStatus, as_text
from hf_cloudtrain.jobs.engines.sagemaker.api import (
    Logs,
    UnknownError,
    configured_region,
    create,
    describe,
    missing_here,
    stop,
)
from hf_cloudtrain.jobs.engines.sagemaker.request import (
    DATASET,
    MAX_VALUE,
    WORKSPACE,
    grace,
    instance_type,
    is_spot,
    long_values,
    own_prefix,
    problems,
    request,
    warnings,
)
from hf_cloudtrain.jobs.records import JobRecord, JobStore, State
from hf_cloudtrain.jobs.submission import FILE, Submission
from hf_cloudtrain.runtime.redaction import redact, secrets_of_environment
from hf_cloudtrain.storage.client import Storage

POLL = 5.0
"""Seconds between two looks at the logs. CloudWatch allows 25 requests a second to all of an account together."""
LATE = 10.0
"""Seconds after the end of a job in which lines may still arrive."""

_STATES: dict[str, State] = {
    "Pending": "queued",
    "Starting": "starting",
    "LaunchingMLInstances": "starting",
    "PreparingTrainingStack": "starting",
    "Downloading": "starting",
    "DownloadingTrainingImage": "starting",
    "Restarting": "starting",
    "Interrupted": "queued",
    "Training": "running",
    "Updating": "running",
    "Uploading": "running",
    "Stopping": "stopping",
    "Completed": "finished",
    "Failed": "failed",
    "Stopped": "cancelled",
    "MaxRuntimeExceeded": "preempted",
    "MaxWaitTimeExceeded": "preempted",
}
"""By SecondaryStatus.

https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_DescribeTrainingJob.html
"""
_TOLD: dict[str, str] = {
    "Interrupted": "the machines were taken away, and SageMaker waits for others",
    "MaxRuntimeExceeded": "the training took longer than 'max_run'",
    "MaxWaitTimeExceeded": "waiting and training took longer than 'max_wait'",
}


class SagemakerEngine:
    """Training jobs of the account and region of the user's AWS configuration. See `Engine`."""

    def check(self, submission: Submission) -> None:
        """Refuse what SageMaker would refuse, all at once; asks nobody but this machine."""
        found = [*problems(submission), *_problems_here(submission)]
        if found:
            raise JobFileError("\n".join(found))

    def show(self, submission: Submission) -> str:
        """The request, with what is missing and what to know above it."""
        plan = submission.plan
        spot = ", managed spot" if is_spot(submission) else ""
        machine = instance_type(submission) or "a machine to be named"
        nodes = f"{plan.nodes} node{'s' * (plan.nodes > 1)}"
        processes = f"{plan.nproc_per_node} process{'es' * (plan.nproc_per_node > 1)}"
        notes = [
            f"CreateTrainingJob: {nodes} of {processes}, each on {machine}{spot}",
            *warnings(submission),
            *(f"Missing: {problem}" for problem in problems(submission)),
        ]
        comments = "".join(f"# {note}\n" for note in notes)
        return comments + as_text(request(submission, dataset=_dataset_if_known(submission)))

    def submit(self, submission: Submission, store: JobStore, record: JobRecord) -> JobRecord:
        """Put job and workspace on the store, and create the training job."""
        self.check(submission)
        variables = submission.plan.own_variables(os.environ)
        region = _region_or_none(submission)
        assert region is not None  # checked
        dataset = _dataset(submission)
        number = int(record.handle.get("number", 0)) + 1
        wanted = request(submission, variables=variables, dataset=dataset, number=number)
        _upload(submission, dataset)
        name = create(region, wanted, tuple(variables.values()))
        handle = {"training_job": name, "region": region, "number": number}
        return store.write(record, state="queued", reason=None, handle=handle)

    def look(self, record: JobRecord) -> EngineStatus | None:
        """What SageMaker says; while the containers run, their supervisor writes the record, and knows better."""
        if "training_job" not in record.handle:
            return None
        name = str(record.handle["training_job"])
        try:
            found = describe(str(record.handle["region"]), name)
        except UnknownError as error:
            return EngineStatus("lost", str(error))
        now = seen(found)
        if now.state == "running" and record.state in ("starting", "running", "stopping"):
            return None
        if now.state in ("cancelled", "preempted") and record.state == "stopping" and record.reason:
            why = f"{now.reason}. " if found.get("SecondaryStatus") in _TOLD else ""
            return EngineStatus(now.state, why + record.reason)  # what was saved
        return now

    def cancel(self, record: JobRecord, store: JobStore) -> None:
        """Ask SageMaker to stop it: it sends SIGTERM, and SIGKILL after 120 s."""
        if "training_job" not in record.handle:
            return
        stop(str(record.handle["region"]), str(record.handle["training_job"]))

    def lines(self, record: JobRecord, node_rank: int | None, follow: bool) -> Iterator[str]:
        """From CloudWatch Logs, where each container is a stream."""
        logs = Logs(record, node_rank)
        ended: float | None = None
        while True:
            # Before the last look, so that nothing said until then is missed; and then some, as CloudWatch lags.
            now = self.look(record) if follow else None
            if now is not None and now.state in ("finished", "failed", "cancelled", "preempted", "lost"):
                ended = ended or time.monotonic()
            found = False
            for line in logs.news():
                found = True
                yield line
            if not follow or (ended is not None and not found and time.monotonic() >= ended + LATE):
                return
            time.sleep(POLL)


def seen(description: Mapping[str, Any]) -> EngineStatus:
    """Our state and reason for what DescribeTrainingJob answers."""
    secondary = str(description.get("SecondaryStatus") or description.get("TrainingJobStatus"))
    state = _STATES.get(secondary) or _STATES.get(str(description.get("TrainingJobStatus"))) or "running"
    failure = description.get("FailureReason")
    if state == "failed" and failure:
        text = redact(str(failure), secrets_of_environment())
        # What the entry point wrote begins with the outcome; SageMaker puts "AlgorithmError: " before it.
        match = re.match(r"(?:\w+: )?(preempted|cancelled): (.*?)(?:, exit code: \d+)?$", text, re.DOTALL)
        if match:
            ours: State = "preempted" if match[1] == "preempted" else "cancelled"
            return EngineStatus(ours, match[2])
        return EngineStatus("failed", text)
    if state == "finished":
        return EngineStatus("finished")
    said = _TOLD.get(secondary) or _last_message(description)
    return EngineStatus(state, f"{secondary}: {said}" if said else secondary)


def _last_message(description: Mapping[str, Any]) -> str | None:
    transitions = description.get("SecondaryStatusTransitions") or [{}]
    message = transitions[-1].get("StatusMessage")
    return redact(str(message), secrets_of_environment()) if message else None


# --- What a container gets -----------------------------------------------------------------------------------------


def _upload(submission: Submission, dataset: Manifest | None) -> None:
    """Put on the store what the containers get of us. One archive keeps modes, links and empty folders, which S3 does not."""
    storage = Storage(own_prefix(submission).rstrip("/"), env.storage_options(None))
    plan = dataclasses.replace(submission.plan, grace_seconds=grace(submission))
    job = dataclasses.replace(submission, plan=plan).encode()
    if submission.has_workspace:
        with tempfile.TemporaryDirectory() as folder:
            packed = Path(folder, WORKSPACE)
            with tarfile.open(packed, "w:gz", compresslevel=1) as archive:
                archive.add(submission.workspace, arcname=".")
            storage.upload(str(packed), WORKSPACE)
    if dataset is not None:
        storage.write(DATASET, dataset.encode())
    storage.write(FILE, json.dumps(job, indent=2).encode())


def _dataset(submission: Submission) -> Manifest | None:
    data = submission.job.data
    if data is None:
        return None
    name = data.name.partition("@")[0]
    return DatasetStore(submission.store).find(name, submission.dataset_version).manifest


def _dataset_if_known(submission: Submission) -> Manifest | None:
    """For people: a store that does not answer, or has no such dataset, is no reason to show nothing."""
    with contextlib.suppress(CloudTrainError):
        return _dataset(submission)
    return None


# --- This machine --------------------------------------------------------------------------------------------------


def _problems_here(submission: Submission) -> Iterator[str]:
    """What is missing in this shell, and not in the job."""
    try:
        variables = submission.plan.own_variables(os.environ)
    except ConfigurationError as error:
        yield str(error)
    else:
        names = long_values(variables)
        if names:
            yield (
                f"The values of {', '.join(map(repr, names))} are longer than the {MAX_VALUE} characters that SageMaker "
                "takes. Put them into a file of the workspace, or fetch them in the script."
            )
    yield from missing_here(_region_or_none(submission))


def _region_or_none(submission: Submission) -> str | None:
    """The region of `vm` where that is one of AWS, else that of the user's configuration."""
    machine = submission.job.machine
    return machine.region if machine is not None and machine.cloud == "aws" else configured_region()


ENGINE = SagemakerEngine()
