"""Run by the Python that has SkyPilot: what its own code reads in our tasks and command lines, as JSON."""

from __future__ import annotations

import asyncio
import inspect
import json
import shlex
import sys
from typing import Any


def parsed(task: dict[str, Any]) -> dict[str, Any]:
    """A task as SkyPilot reads it, or its error."""
    import sky

    try:
        found = sky.Task.from_yaml_config(task)
    except Exception as error:  # noqa: BLE001 - any error is the answer
        return {"error": str(error)}
    (resources,) = found.resources
    return {
        "name": found.name,
        "num_nodes": found.num_nodes,
        "cloud": str(resources.cloud).lower(),
        "region": resources.region,
        "accelerators": resources.accelerators,
        "use_spot": resources.use_spot,
        "image_id": resources.image_id,
        "job_recovery": resources.job_recovery,
        "workdir": found.workdir,
        "file_mounts": found.file_mounts,
        "buckets": {
            path: [storage.source, storage.mode.value] for path, storage in found.storage_mounts.items()
        },
        "setup": found.setup,
        "run": found.run,
    }


def options(line: str) -> dict[str, Any]:
    """The options and arguments of a command line, or its error."""
    import click
    from sky.client.cli import command

    argv = shlex.split(line)
    group: Any = command.cli
    context = click.Context(group, info_name="sky")
    try:
        while hasattr(group, "get_command"):
            name = argv.pop(0)
            group = group.get_command(context, name)
            if group is None:
                return {"error": f"no command {name}"}
        found = group.make_context(group.name, argv)
    except click.ClickException as error:
        return {"error": error.format_message()}
    return {name: value for name, value in found.params.items() if value not in (None, (), False)}


def restarts(recovery: dict[str, Any], codes: list[list[int]]) -> list[bool]:
    """Whether SkyPilot restarts a managed job after each of these ends of its nodes."""
    from sky.jobs.recovery_strategy import StrategyExecutor

    executor = object.__new__(StrategyExecutor)
    executor.max_restarts_on_errors = recovery["max_restarts_on_errors"]
    executor.recover_on_exit_codes = recovery["recover_on_exit_codes"]
    executor.restart_cnt_on_failure = 0
    answers = [executor.should_restart_on_failure(exit_codes=ended) for ended in codes]
    return [asyncio.run(answer) if inspect.isawaitable(answer) else answer for answer in answers]


def main() -> None:
    """Answer the questions on stdin."""
    asked = json.load(sys.stdin)
    from sky.jobs.state import ManagedJobStatus
    from sky.skylet.job_lib import JobStatus
    from sky.utils import ux_utils

    answers = {
        "tasks": {name: parsed(task) for name, task in asked["tasks"].items()},
        "lines": {line: options(line) for line in asked["lines"]},
        "restarts": restarts(asked["recovery"], asked["codes"]),
        "managed": [status.value for status in ManagedJobStatus],
        "own": [status.value for status in JobStatus],
        "launched": ux_utils.command_hint_messages(ux_utils.CommandHintType.MANAGED_JOB, job_id="12"),
        "cluster": ux_utils.command_hint_messages(
            ux_utils.CommandHintType.CLUSTER_JOB, job_id="7", cluster_name="x-1"
        ),
    }
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
