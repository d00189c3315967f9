"""A job as SkyPilot's task: the YAML, and the words of the command that hands it over. Data alone, nothing is started."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.jobs.spec.machine import Machine
from hf_cloudtrain.jobs.submission import FILE, Submission

HOME = "~/hf_cloudtrain"
"""Home of the job on SkyPilot's machines."""
BUCKET = f"{HOME}/bucket"
"""Where the bucket of the run is mounted there."""
ENTRY = "hf_cloudtrain.jobs.engines.skypilot.node_main"
SAVED = 75
"""Exit code of a node that saved and stopped: the job is started again, and that counts as no error."""
VERDICT = "cloudtrain-verdict: "
"""Begins the line that node 0 ends with: a state and a reason, as JSON."""
SOURCES = {"s3": "s3", "gs": "gs", "gcs": "gs"}
"""Protocols of run URLs whose bucket is mounted, and SkyPilot's word for them. Azure's is below."""
AZURE = ("az", "abfs", "abfss")
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", **dict.fromkeys(AZURE, "azure")}
"""What of hf_cloudtrain a protocol needs on the machines."""
MEMORIES = {
    "a100": {40: "A100", 80: "A100-80GB"},
    "v100": {16: "V100", 32: "V100-32GB"},
}
"""GPUs that SkyPilot has by their memory (`sky show-gpus --all`); of any other, the name says enough."""


def as_task(submission: Submission, shell: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The task (https://docs.skypilot.co/en/latest/reference/yaml-spec.html). No value of a variable is in it.

    Args:
        submission: the job.
        shell: of whoever submits it; storage options and accounts may be there.

    What `problems` finds is left out of it.
    """
    task = {
        "name": task_name(submission.id),
        "num_nodes": submission.plan.nodes,
        "resources": _resources(submission),
        "workdir": str(submission.workspace) if submission.has_workspace else None,
        "secrets": dict.fromkeys(variables(submission, shell)),
        "file_mounts": {f"{HOME}/{FILE}": str(submission.home / FILE), **_bucket_mount(submission, shell)},
        "setup": _setup(submission),
        # `exec`, so that signals reach it.
        "run": f"exec python3 -m {ENTRY} {HOME}",
    }
    return {key: value for key, value in task.items() if value or key == "resources"}


def problems(submission: Submission, shell: Mapping[str, str] = os.environ) -> list[str]:
    """What SkyPilot would refuse, or its machines could not do, a sentence each."""
    job, found = submission.job, submission.job.machine
    told = []
    if _is_local(submission.run_url):
        told.append(
            f"The run URL {submission.run_url!r} is on this machine, which SkyPilot's machines do not reach. Write "
            f"`run_url: s3://bucket/runs/{job.name}`."
        )
    elif submission.run_url.partition("://")[0] in AZURE and _bucket(submission, shell) is None:
        told.append(
            f"The run URL {submission.run_url!r} does not say whose container it is. Write AZURE_STORAGE_ACCOUNT_NAME "
            "below `env`."
        )
    if job.data is not None and _is_local(submission.store):
        told.append(
            f"The dataset {job.data.name!r} is in the store {submission.store!r}, on this machine, which SkyPilot's "
            f"machines do not reach. Set a store that they do: export {env.STORE}=s3://bucket/store"
        )
    if found is not None and submission.plan.nproc_per_node > found.gpus:
        told.append(
            f"{submission.plan.nproc_per_node} processes a node are more than the {found.gpus} GPUs of {job.vm!r}."
        )
    memories = MEMORIES.get(found.gpu) if found is not None else None
    if found is not None and memories is not None and found.memory_gb not in memories:
        told.append(
            f"There is no {found.gpu.upper()} of {found.memory_gb} GB ({job.vm!r}), only of "
            f"{' and '.join(map(str, memories))} GB."
        )
    return told


def launch_argv(submission: Submission, task: str, shell: Mapping[str, str] = os.environ) -> list[str]:
    """The command that hands over the task in a file."""
    secrets = [word for name in variables(submission, shell) for word in ("--secret", name)]
    if submission.job.skypilot.managed:
        return ["sky", "jobs", "launch", "-n", task_name(submission.id), "-y", "-d", *secrets, task]
    return ["sky", "launch", "-c", cluster_name(submission.id), "-y", "-d", "--down", *secrets, task]


def task_name(job_id: str) -> str:
    """A name that SkyPilot takes: no three of '.', '_' and '-' in a row, none at an end (sky/task.py)."""
    return re.sub(r"([._-]{2})[._-]+", r"\1", job_id).strip("._-")


def cluster_name(job_id: str) -> str:
    """Of a cluster, the first is a letter."""
    name = task_name(job_id)
    return name if name[0].isalpha() else f"job-{name}"


def variables(submission: Submission, shell: Mapping[str, str]) -> list[str]:
    """Names of the variables that the nodes get: the job's own, and how to reach the storage."""
    names = set(submission.job.env)
    if shell.get(env.STORAGE_OPTIONS):
        names.add(env.STORAGE_OPTIONS)
    return sorted(names)


def _resources(submission: Submission) -> dict[str, Any]:
    job, found = submission.job, submission.job.machine
    resources: dict[str, Any] = {}
    if found is not None:
        resources = {
            "infra": f"{found.cloud}/{found.region}",
            "accelerators": f"{accelerator(found)}:{found.gpus}",
            "use_spot": found.is_spot,
        }
    if job.job_setting.docker.image is not None:
        resources["image_id"] = f"docker:{job.job_setting.docker.image}"
    if job.skypilot.managed:
        resources["job_recovery"] = {
            "max_restarts_on_errors": job.max_restarts,
            "recover_on_exit_codes": [SAVED],
        }
    return resources


def accelerator(machine: Machine) -> str:
    """SkyPilot's name of a GPU.

    Example:
        >>> accelerator(Machine.parse("aws-80gb-a100-8g-us-east-1"))
        'A100-80GB'
    """
    return MEMORIES.get(machine.gpu, {}).get(machine.memory_gb) or machine.gpu.upper()


def _bucket_mount(submission: Submission, shell: Mapping[str, str]) -> dict[str, Any]:
    source = _bucket(submission, shell)
    return {} if source is None else {BUCKET: {"source": source, "mode": "MOUNT"}}


def _bucket(submission: Submission, shell: Mapping[str, str]) -> str | None:
    """The bucket to mount, as SkyPilot names it; None where it knows no such storage."""
    given = submission.job.skypilot.bucket
    protocol, _, rest = (given or submission.run_url).partition("://")
    name = rest.partition("/")[0]
    if protocol in SOURCES:
        return f"{SOURCES[protocol]}://{name}"
    if protocol in AZURE:
        container, _, host = name.partition("@")
        account = host.partition(".")[0] or _azure_account(submission, shell)
        return f"https://{account}.blob.core.windows.net/{container}" if account else None
    return given  # in SkyPilot's own words


def _is_local(url: str) -> bool:
    return "://" not in url or url.startswith(("file://", "local://", "memory://"))


def _azure_account(submission: Submission, shell: Mapping[str, str]) -> str | None:
    given = {name: shell.get(name) if value is None else value for name, value in submission.job.env.items()}
    options = env.storage_options(None) if shell.get(env.STORAGE_OPTIONS) else {}
    connection = given.get("AZURE_STORAGE_CONNECTION_STRING") or options.get("connection_string") or ""
    found = re.search(r"AccountName=([a-z0-9]+)", str(connection))
    return (
        given.get("AZURE_STORAGE_ACCOUNT_NAME")
        or options.get("account_name")
        or (found[1] if found else None)
    )


def _setup(submission: Submission) -> str:
    urls = [submission.run_url, *([submission.store] if submission.job.data is not None else [])]
    protocols = {url.partition("://")[0] for url in urls}
    extras = ",".join(sorted({EXTRAS[protocol] for protocol in protocols if protocol in EXTRAS}))
    package = f"hf_cloudtrain{f'[{extras}]' if extras else ''}=={version('hf_cloudtrain')}"
    return f"python3 -m pip install --quiet {shlex.quote(package)}"
