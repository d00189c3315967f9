"""The job file: one YAML document that says what to run, on how many machines, and where its checkpoints go.

    read_job(path) -> Job     all problems of the file are reported at once, by line; nothing is started
    Job.plan()     -> Plan    nodes, processes and the environment of each node, the same for every engine

The models of `job.py` check each value; this module checks the values against each other.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from hf_cloudtrain import env
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.jobs.spec.diagnostics import DocumentFormat, quoted
from hf_cloudtrain.jobs.spec.document import MAX_BYTES, KeyPath, dotted
from hf_cloudtrain.jobs.spec.job import Job, shape
from hf_cloudtrain.jobs.spec.values import Count, check_folder, check_mount_path, check_vm, is_below

UNSUPPORTED = {
    "job_setting.docker.env_var": "write the variables below `env`, at the top level.",
    "job_setting.docker.credential_id": "log in to the registry on the machine that pulls the image.",
    "job_setting.launch_mode": "the command is started once on each node.",
    "job_setting.template_id": "only jobs of the type 'custom' are supported.",
    "job_setting.model_config": "only jobs of the type 'custom' are supported.",
    "checkpoint.input": "a job resumes from its `run_url`; upload a model to start from as a dataset, and name it below `data`.",
    "dist": "the script decides how the ranks share the work.",
    "plugin": "report from the script, as with report_to='wandb', and put the key below `env`.",
    "<<": "merge keys are not supported. Write the keys out.",
}
"""Keys of PeriFlow's later files, and what to use instead."""


def read_job(path: str | os.PathLike[str]) -> Job:
    """The job in a file. Nothing is started.

    Raises:
        JobFileError: with all problems, each with file and line. OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    return parse_job(content, os.fspath(path))


def parse_job(content: bytes, source: str = "job.yml") -> Job:
    r"""The job in the content of a job file.

    Args:
        source: name of the file, for the error.

    Raises:
        JobFileError: with all problems, each with its line.

    Example:
        >>> job = parse_job(b"name: mnli\njob_setting: {docker: {command: torchrun train.py}}")
        >>> job.plan().world_size
        1
    """
    return _FORMAT.parse(content, source)


def _relations(data: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    yield from _shape_problems(data)
    yield from _path_problems(data)
    path = ("env", env.GRACE)
    grace = _valid(data, path, str)
    if grace is not None:
        try:
            seconds = float(grace)
        except ValueError:
            seconds = -1.0
        if not 0 < seconds < 1e9:
            yield path, f"{dotted(path)} must be a number of seconds above 0, not {quoted(grace)}."


_FORMAT = DocumentFormat(Job, _relations, hints=UNSUPPORTED, secret=frozenset(("env",)))


def _shape_problems(data: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    engine = _valid(data, ("engine",), str) or "local"
    try:
        shape(
            _valid(data, ("num_devices",), _count),
            _valid(data, ("vm",), check_vm),
            _valid(data, (engine, "nodes"), _count),
            _valid(data, (engine, "nproc_per_node"), _count),
        )
    except ConfigurationError as error:
        yield ("num_devices",), str(error)


def _path_problems(data: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    workspace = _valid(data, ("job_setting", "workspace", "mount_path"), check_mount_path) or "/workspace"
    dataset = _valid(data, path := ("data", "mount_path"), check_mount_path)
    if dataset is not None and is_below(workspace, dataset):
        text = f"would hide the workspace at {quoted(workspace)}. Use a different path."
        yield path, f"{dotted(path)} is {quoted(dataset)}, which {text}"
    folder = _valid(data, path := ("checkpoint", "output_checkpoint_dir"), check_folder)
    if folder is None:
        return
    folder = posixpath.normpath(posixpath.join(workspace, folder))
    if is_below(workspace, folder):
        text = "contains the code of the workspace. Use a separate folder."
        yield path, f"{dotted(path)} is {quoted(folder)}, which {text}"
    elif dataset is not None and (is_below(folder, dataset) or is_below(dataset, folder)):
        text = f"overlaps the read-only dataset at {quoted(dataset)}. Use a different folder."
        yield path, f"{dotted(path)} is {quoted(folder)}, which {text}"


_count = TypeAdapter[int](Count).validate_python


def _valid(data: Any, path: KeyPath, check: Any) -> Any:
    """The value at a path if it is there and valid, else None: an invalid one is reported by the model."""
    for key in path:
        data = data.get(key) if isinstance(data, dict) else None
    try:
        return check(data) if isinstance(data, str) else None
    except ValueError:
        return None
