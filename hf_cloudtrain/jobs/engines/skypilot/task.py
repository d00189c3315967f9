"""A job as SkyPilot's task: the YAML, and the command line that launches it. Only data; nothing is started here."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.jobs.spec.values import Machine
from hf_cloudtrain.jobs.submission import FILE, Submission
from hf_cloudtrain.storage.urls import is_local

HOME = "~/hf_cloudtrain"
"""The job's home on SkyPilot's machines."""
BUCKET = f"{HOME}/bucket"
"""Where the run's bucket is mounted there."""
ENTRY = "hf_cloudtrain.jobs.engines.skypilot.node_main"
SAVED = 75
"""Exit code of a node that saved and stopped: SkyPilot restarts the job, and does not count an error."""
VERDICT = "cloudtrain-verdict: "
"""Prefix of the last line of node 0: a state and a reason, as JSON."""
SOURCES = {"s3": "s3", "gs": "gs", "gcs": "gs"}
"""Protocols of run URLs whose bucket is mounted, and SkyPilot's name for each. Azure is below."""
AZURE = ("az", "abfs", "abfss")
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", **dict.fromkeys(AZURE, "azure")}
"""The extra of hf_cloudtrain that a protocol needs on the machines."""
MEMORIES = {
    "a100": {40: "A100", 80: "A100-80GB"},
    "v100": {16: "V100", 32: "V100-32GB"},
}
"""GPUs whose name in SkyPilot depends on their memory, in GB (`sky show-gpus --all`)."""


def as_task(submission: Submission, shell: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The task (https://docs.skypilot.co/en/latest/reference/yaml-spec.html), without the value of any variable.

    Args:
        submission: the job. What `problems` finds is missing from the task.
        shell: the environment of the submitter, for storage options and accounts.
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
    """What SkyPilot would refuse, or its machines could not do: one sentence each, with what to write."""
    job, machine = submission.job, submission.job.machine
    found = []
    if _is_local(submission.run_url):
        found.append(
            f"The run URL {submission.run_url!r} is on this machine, and SkyPilot's machines cannot reach it. Write "
            f"`run_url: s3://bucket/runs/{job.name}`."
        )
    elif submission.run_url.partition("://")[0] in AZURE and _bucket(submission, shell) is None:
        found.append(
            f"The run URL {submission.run_url!r} does not name the account of its container. Write "
            "AZURE_STORAGE_ACCOUNT_NAME below `env`."
        )
    if job.data is not None and _is_local(submission.store):
        found.append(
            f"The dataset {job.data.name!r} is in the store {submission.store!r}, on this machine, and SkyPilot's "
            f"machines cannot reach it. Use a remote store: export {env.STORE}=s3://bucket/store"
        )
    if machine is None:
        return found
    if submission.plan.nproc_per_node > machine.gpus:
        found.append(
            f"{submission.plan.nproc_per_node} processes per node are more than the {machine.gpus} GPUs of {job.vm!r}."
        )
    memories = MEMORIES.get(machine.gpu)
    if memories is not None and machine.memory_gb not in memories:
        found.append(
            f"`vm` is {job.vm!r}, but SkyPilot has the {machine.gpu.upper()} only with "
            f"{' or '.join(map(str, memories))} GB."
        )
    return found


def launch_argv(submission: Submission, task: str, shell: Mapping[str, str] = os.environ) -> list[str]:
    """The command that launches the task in a file."""
    secrets = [part for name in variables(submission, shell) for part in ("--secret", name)]
    if submission.job.skypilot.managed:
        return ["sky", "jobs", "launch", "-n", task_name(submission.id), "-y", "-d", *secrets, task]
    return ["sky", "launch", "-c", cluster_name(submission.id), "-y", "-d", "--down", *secrets, task]


def task_name(job_id: str) -> str:
    """A name that SkyPilot accepts: no three of '.', '_' and '-' in a row, and none at an end (sky/task.py)."""
    return re.sub(r"([._-]{2})[._-]+", r"\1", job_id).strip("._-")


def cluster_name(job_id: str) -> str:
    """The name of a cluster, which must begin with a letter."""
    name = task_name(job_id)
    return name if name[0].isalpha() else f"job-{name}"


def variables(submission: Submission, shell: Mapping[str, str]) -> list[str]:
    """Names of the variables that the nodes receive: the job's own, and the storage options."""
    names = set(submission.job.env)
    if shell.get(env.STORAGE_OPTIONS):
        names.add(env.STORAGE_OPTIONS)
    return sorted(names)


def _resources(submission: Submission) -> dict[str, Any]:
    job, machine = submission.job, submission.job.machine
    resources: dict[str, Any] = {}
    if machine is not None:
        resources = {
            "infra": f"{machine.cloud}/{machine.region}",
            "accelerators": f"{accelerator(machine)}:{machine.gpus}",
            "use_spot": machine.is_spot,
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
    """SkyPilot's name for a GPU.

    Example:
        >>> accelerator(Machine.parse("aws-80gb-a100-8g-us-east-1"))
        'A100-80GB'
    """
    return MEMORIES.get(machine.gpu, {}).get(machine.memory_gb) or machine.gpu.upper()


def _bucket_mount(submission: Submission, shell: Mapping[str, str]) -> dict[str, Any]:
    source = _bucket(submission, shell)
    return {} if source is None else {BUCKET: {"source": source, "mode": "MOUNT"}}


def _bucket(submission: Submission, shell: Mapping[str, str]) -> str | None:
    """The bucket to mount, by SkyPilot's name; None if SkyPilot cannot mount this storage."""
    given = submission.job.skypilot.bucket
    protocol, _, rest = (given or submission.run_url).partition("://")
    name = rest.partition("/")[0]
    if protocol in SOURCES:
        return f"{SOURCES[protocol]}://{name}"
    if protocol in AZURE:
        container, _, host = name.partition("@")
        account = host.partition(".")[0] or _azure_account(submission, shell)
        return f"https://{account}.blob.core.windows.net/{container}" if account else None
    return given  # as SkyPilot itself writes it


def _is_local(url: str) -> bool:
    return is_local(url) or url.startswith("memory://")


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
