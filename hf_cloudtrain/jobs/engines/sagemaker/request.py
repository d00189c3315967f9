"""The request for a SageMaker training job, as data; nothing is sent from here.

What SageMaker accepts: https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_CreateTrainingJob.html
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.manifest import Manifest
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.storage.urls import is_local

ENTRY = ("python", "-m", "hf_cloudtrain.jobs.engines.sagemaker.container_main")
"""The command of each container."""
OWN_CHANNEL = "cloudtrain"
"""The channel with the job and its workspace."""
WORKSPACE, DATASET = "workspace.tar.gz", "dataset.json"
"""Files of that channel: the workspace, and the manifest of the dataset."""
DATA_CHANNEL = "dataset"
"""The channel with the job's dataset."""
CHECKPOINTS = "/opt/ml/checkpoints"
"""The folder of a container that SageMaker syncs with a folder on S3."""
GRACE = 105.0
"""Seconds between SIGTERM and the end of the command; SageMaker sends SIGKILL after 120, and records need the rest.

https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_StopTrainingJob.html
"""
LONGEST_GRACE = 120.0
MAX_RUN = 86_400
"""Seconds of the longest training if the job sets no `max_run`: SageMaker's own default."""
DISK_GB = 100
"""Per machine, beside the dataset. The smallest machine with a disk of its own has 125, and refuses more."""
MAX_VARIABLES, MAX_VALUE = 100, 512
"""Variables, and characters of one value."""
MAX_CHANNELS = 20
MAX_RETRIES = 30
"""After a failure of SageMaker itself."""

INSTANCES: dict[tuple[str, int], dict[int, str]] = {
    ("v100", 16): {1: "ml.p3.2xlarge", 4: "ml.p3.8xlarge", 8: "ml.p3.16xlarge"},
    ("v100", 32): {8: "ml.p3dn.24xlarge"},
    ("t4", 16): {1: "ml.g4dn.xlarge", 4: "ml.g4dn.12xlarge"},
    ("a10g", 24): {1: "ml.g5.xlarge", 4: "ml.g5.12xlarge", 8: "ml.g5.48xlarge"},
    ("l4", 24): {1: "ml.g6.xlarge", 4: "ml.g6.12xlarge", 8: "ml.g6.48xlarge"},
    ("l40s", 48): {1: "ml.g6e.xlarge", 4: "ml.g6e.12xlarge", 8: "ml.g6e.48xlarge"},
    ("a100", 40): {8: "ml.p4d.24xlarge"},
    ("a100", 80): {8: "ml.p4de.24xlarge"},
    ("h100", 80): {1: "ml.p5.4xlarge", 8: "ml.p5.48xlarge"},
    ("h200", 141): {8: "ml.p5e.48xlarge"},
}
"""By GPU and its memory (GB), by number of GPUs: the smallest machine that has them.

https://aws.amazon.com/sagemaker/ai/pricing/ and https://aws.amazon.com/ec2/instance-types/
"""


def request(
    submission: Submission,
    *,
    variables: Mapping[str, str] | None = None,
    dataset: Manifest | None = None,
    number: int = 1,
) -> dict[str, Any]:
    """The request for a job, with a placeholder for each value that is missing (see `problems`).

    Args:
        variables: the job's own, with their values; None hides the values.
        dataset: manifest of the job's dataset, if it is known.
        number: of this request for the job, from 1: SageMaker accepts each name once.

    Example:
        >>> request(submission)["ResourceConfig"]["InstanceType"]
        'ml.p3.8xlarge'
    """
    job, block = submission.job, submission.job.sagemaker
    found: dict[str, Any] = {
        "TrainingJobName": training_job_name(submission.store, submission.id, number),
        "RoleArn": block.role or "<missing: role>",
        "AlgorithmSpecification": {
            "TrainingImage": job.job_setting.docker.image or "<missing: image>",
            "TrainingInputMode": "File",
            "ContainerEntrypoint": list(ENTRY),
        },
        "InputDataConfig": [_channel(name, url) for name, url in _channels(submission, dataset).items()],
        "OutputDataConfig": {"S3OutputPath": block.output_s3_uri or _beside_run(submission, "output")},
        "ResourceConfig": {
            "InstanceType": instance_type(submission) or "<missing: instance_type>",
            "InstanceCount": submission.plan.nodes,
            "VolumeSizeInGB": DISK_GB + (math.ceil(dataset.size / 1e9) if dataset else 0),
        },
        "StoppingCondition": {"MaxRuntimeInSeconds": block.max_run or MAX_RUN},
        "Environment": _environment(submission, variables),
    }
    if block.metric_definitions:
        metrics = [{"Name": metric.name, "Regex": metric.regex} for metric in block.metric_definitions]
        found["AlgorithmSpecification"]["MetricDefinitions"] = metrics
    if job.checkpoint_dir is not None or block.checkpoint_s3_uri is not None:
        url = block.checkpoint_s3_uri or _beside_run(submission, "checkpoints")
        found["CheckpointConfig"] = {"S3Uri": url, "LocalPath": CHECKPOINTS}
    if is_spot(submission):
        found["EnableManagedSpotTraining"] = True
        found["StoppingCondition"]["MaxWaitTimeInSeconds"] = block.max_wait or 2 * (block.max_run or MAX_RUN)
    if job.max_restarts:
        found["RetryStrategy"] = {"MaximumRetryAttempts": min(job.max_restarts, MAX_RETRIES)}
    return found


def training_job_name(store: str, job_id: str, number: int = 1) -> str:
    """A name that SageMaker accepts (letters, digits, single '-', at most 63), and that no other store's job has."""
    digest = hashlib.sha256(f"{store}\n{job_id}".encode()).hexdigest()[:8]
    end = f"-{digest}" if number == 1 else f"-{digest}-{number}"
    stem = re.sub(r"[^A-Za-z0-9]+", "-", job_id)
    return stem[: 63 - len(end)].strip("-") + end


def instance_type(submission: Submission) -> str | None:
    """The machine that the job names, else the one with the GPUs of `vm`, if there is one."""
    if submission.job.sagemaker.instance_type is not None:
        return submission.job.sagemaker.instance_type
    machine = submission.job.machine
    return None if machine is None else INSTANCES.get((machine.gpu, machine.memory_gb), {}).get(machine.gpus)


def is_spot(submission: Submission) -> bool:
    """Whether the job runs on spot machines."""
    machine = submission.job.machine
    return machine is not None and machine.is_spot


def own_prefix(submission: Submission) -> str:
    """URL of the folder that the containers receive from us. The '/' at its end keeps it from matching longer names."""
    return f"{_store(submission)}/jobs/{submission.id}/submission/"


def grace(submission: Submission) -> float:
    """Seconds between the notice and the end: the job's own grace, else what SageMaker allows."""
    return submission.plan.grace if env.GRACE in submission.plan.variables else GRACE


def problems(submission: Submission) -> Iterator[str]:
    """Everything that keeps SageMaker from running a job, one line each, with what to write."""
    job, block = submission.job, submission.job.sagemaker
    if block.role is None:
        yield "The job has no role. Write the ARN of the training's role as `role`, below `sagemaker`."
    elif not re.fullmatch(r"arn:aws[a-z-]*:iam::\d{12}:role/?[\w+=,.@/-]+", block.role, re.ASCII):
        yield f"{block.role!r} is not the ARN of a role, such as 'arn:aws:iam::111122223333:role/training'."
    image = job.job_setting.docker.image
    if image is None:
        yield "The job has no image. Write an image in ECR as `image`, below `job_setting.docker`."
    elif not re.match(r"\d{12}\.dkr\.ecr[a-z0-9.-]*\.[a-z0-9.-]+/", image):
        yield (
            f"The image {image!r} is not in ECR, and SageMaker pulls images only from there. Push it to a repository "
            "of yours: 111122223333.dkr.ecr.us-east-1.amazonaws.com/…"
        )
    if not _is_s3(submission.store):
        yield (
            f"The store {submission.store!r} is not on S3, and SageMaker reads workspace and dataset only from there. "
            f"Set a store on S3: export {env.STORE}=s3://bucket/store"
        )
    yield from _run_problems(submission)
    yield from _machine_problems(submission)
    yield from _variable_problems(submission)
    yield from _folder_problems(submission)
    channels = _channels(submission, None)
    if len(channels) > MAX_CHANNELS:
        yield f"The job has {len(channels)} channels, ours included; SageMaker accepts at most {MAX_CHANNELS}."
    for name in sorted(set(block.channels) & {OWN_CHANNEL, DATA_CHANNEL}):
        yield f"The channel name {name!r} is reserved. Rename yours below `sagemaker.channels`."


def warnings(submission: Submission) -> Iterator[str]:
    """What a user should know before a job is submitted, one line each."""
    machine = submission.job.machine
    if machine is not None and machine.cloud != "aws":
        yield (
            f"{str(machine)!r} is not a machine of AWS: its GPUs are used, but not its cloud {machine.cloud!r} and "
            f"region {machine.region!r}. The region comes from your AWS configuration."
        )
    if submission.plan.variables:
        yield (
            "SageMaker shows the values of `env` to everyone who may describe training jobs. Keep a secret elsewhere, "
            "such as in Secrets Manager, and let the script fetch it."
        )


def _run_problems(submission: Submission) -> Iterator[str]:
    url = submission.run_url
    if not is_local(url):
        return
    if _is_s3(submission.store) or not url.startswith(submission.store):  # else the store is reported already
        yield (
            f"The run URL {url!r} is a folder of this machine, which containers cannot see. Write "
            f"`run_url: s3://bucket/runs/{submission.job.name}`."
        )


def _machine_problems(submission: Submission) -> Iterator[str]:
    block, machine = submission.job.sagemaker, submission.job.machine
    if instance_type(submission) is None:
        what = (
            "The job has no `vm`."
            if machine is None
            else f"No machine of SageMaker is known with {machine.gpus} GPUs {machine.gpu!r} of {machine.memory_gb} GB."
        )
        yield f"{what} Write the machine as `instance_type`, below `sagemaker`, such as 'ml.g5.12xlarge'."
    longest = block.max_run or MAX_RUN
    if block.max_wait is not None and not is_spot(submission):
        yield "`max_wait` is only for spot machines. Remove it, or use a `vm` that ends in '-spot'."
    elif block.max_wait is not None and block.max_wait < longest:
        yield (
            f"`max_wait` is {block.max_wait}, less than the {longest} seconds that the training may take. Write "
            f"{longest} or more, or a shorter `max_run`."
        )


def _variable_problems(submission: Submission) -> Iterator[str]:
    if grace(submission) > LONGEST_GRACE:
        yield (
            f"{env.GRACE} is {submission.plan.grace:g} s, but SageMaker kills a container after {LONGEST_GRACE:g} s. "
            f"Remove it: the default is {GRACE:g}."
        )
    names = _environment(submission, None)
    if len(names) > MAX_VARIABLES:
        yield f"The job has {len(names)} variables, ours included; SageMaker accepts at most {MAX_VARIABLES}."


def _folder_problems(submission: Submission) -> Iterator[str]:
    job = submission.job
    for path in (job.job_setting.workspace.mount_path, job.data.mount_path if job.data else None):
        if path is not None and re.match(r"/opt/ml(?:/(?:input|output|model|checkpoints)(?:/.*)?)?$", path):
            yield f"{path!r} is a folder of SageMaker. Use a different mount path, such as '/workspace'."


def value_problems(variables: Mapping[str, str]) -> Iterator[str]:
    """What SageMaker would refuse of the variables' values."""
    names = sorted(name for name, value in variables.items() if len(value) > MAX_VALUE)
    if names:
        yield (
            f"The values of {', '.join(map(repr, names))} are longer than the {MAX_VALUE} characters that SageMaker "
            "accepts. Put them into a file of the workspace, or fetch them in the script."
        )


def _environment(submission: Submission, variables: Mapping[str, str] | None) -> dict[str, str]:
    """The variables that are the same on all nodes; each container adds its own (container.py)."""
    plan = submission.plan
    own = dict.fromkeys(plan.variables, "***") if variables is None else dict(variables)
    ours = {
        "NUM_NODES": str(plan.nodes),
        "NPROC_PER_NODE": str(plan.nproc_per_node),
        env.RUN_URL: submission.run_url if "://" in submission.run_url else "<missing: run_url>",
        env.STORE: _store(submission),
        env.GRACE: f"{grace(submission):g}",
    }
    # Containers of SageMaker may not read the machine's metadata service; SIGTERM is the notice.
    return {env.CLOUD_NOTICES: "off", **own, **ours}


def _channels(submission: Submission, dataset: Manifest | None) -> dict[str, str]:
    channels = {OWN_CHANNEL: own_prefix(submission)}
    data = submission.job.data
    if data is not None:
        folder = dataset.folder if dataset else f"<folder of {data.name}>"
        channels[DATA_CHANNEL] = f"{_store(submission)}/datasets/{folder}/"
    return {**submission.job.sagemaker.channels, **channels}


def _channel(name: str, url: str) -> dict[str, Any]:
    source = {"S3DataType": "S3Prefix", "S3Uri": url, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}, "InputMode": "File"}


def _beside_run(submission: Submission, name: str) -> str:
    """A folder of the run, or of the store if the run is not on S3."""
    if _is_s3(submission.run_url):
        return f"{_s3(submission.run_url)}/sagemaker/{name}"
    return f"{_store(submission)}/jobs/{submission.id}/{name}"


def _store(submission: Submission) -> str:
    return _s3(submission.store) if _is_s3(submission.store) else "s3://<missing: a store on S3>"


def _is_s3(url: str) -> bool:
    return url.startswith(("s3://", "s3a://"))


def _s3(url: str) -> str:
    return f"s3://{url.partition('://')[2].rstrip('/')}"
