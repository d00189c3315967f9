"""What SkyPilot runs on each machine: it reads SkyPilot's variables, runs the node, and chooses the exit code.

    python3 -m hf_cloudtrain.jobs.engines.skypilot.node_main ~/hf_cloudtrain

At the end of a managed job SkyPilot decides by the exit codes of the nodes whether to restart it:

    0      do not restart: finished; or stopped by a person, overtaken, nothing to train
    75     saved and stopped, because the machine is preempted: restart, without a limit (`recover_on_exit_codes`)
    else   a crash: restart, at most `max_restarts` times (`max_restarts_on_errors`)

So 0 need not mean success: node 0 prints the verdict, and the engine reads it. SkyPilot kills the other nodes at once
when the first one ends with a code other than 0 (sky/backends/task_codegen.py, get_or_fail): a node that has saved
waits for those that are still saving.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.jobs.engines.skypilot.task import SAVED, VERDICT
from hf_cloudtrain.jobs.logs import show_messages
from hf_cloudtrain.jobs.node.mounts import Mount, link
from hf_cloudtrain.jobs.node.node import run_node
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.jobs.verdict import Verdict, judge

logger = logging.getLogger(__name__)

WORKDIR = "~/sky_workdir"
"""Where SkyPilot syncs the workdir (sky/skylet/constants.py)."""
PORT = 29500
"""Torch's default; no other job runs on these machines."""


def run(home: Path, environment: Mapping[str, str] = os.environ) -> int:
    """Run this node for one start; return the exit code for SkyPilot. Raises as `rank_and_master`."""
    submission = Submission.load(home)
    rank, master = rank_and_master(submission, environment)
    _find_workspace(submission)
    start = _next_start(home)
    code = run_node(
        submission, node_rank=rank, master_addr=master, master_port=PORT, start=start, wrap=in_links
    )
    verdict = judge(submission, start, (code,) * submission.plan.nodes, None)
    code = exit_code(verdict, code, managed=submission.job.skypilot.managed)
    if rank == 0 and verdict.state is not None:
        print(VERDICT + json.dumps({"state": verdict.state, "reason": verdict.reason}), flush=True)  # noqa: T201
    if code == SAVED and submission.plan.nodes > 1:
        _linger(submission.plan.grace)
    return code


def rank_and_master(submission: Submission, environment: Mapping[str, str]) -> tuple[int, str]:
    """This node's rank and the address of node 0, from SkyPilot's variables.

    https://docs.skypilot.co/en/latest/running-jobs/environment-variables.html

    Raises:
        ConfigurationError: there are too few nodes or GPUs, or SkyPilot's variables are missing.
    """
    try:
        rank = int(environment["SKYPILOT_NODE_RANK"])
        addresses = environment["SKYPILOT_NODE_IPS"].split()
        nodes = int(environment["SKYPILOT_NUM_NODES"])
        gpus = int(float(environment.get("SKYPILOT_NUM_GPUS_PER_NODE") or 0))
        master = addresses[0]
    except (KeyError, ValueError, IndexError) as error:
        raise ConfigurationError(f"SkyPilot's variables are missing or wrong here: {error}.") from None
    plan = submission.plan
    if nodes != plan.nodes:
        raise ConfigurationError(f"SkyPilot started {nodes} nodes, but the job needs {plan.nodes}.")
    if submission.job.vm is not None and gpus < plan.nproc_per_node:
        raise ConfigurationError(f"The node has {gpus} GPUs, but the job needs {plan.nproc_per_node}.")
    return rank, master


def exit_code(verdict: Verdict, code: int, *, managed: bool) -> int:
    """The exit code for SkyPilot; the module's docstring has the table."""
    if verdict.state is None:
        return SAVED if code == SAVED or not verdict.is_crash else 1
    if verdict.state == "finished" or managed:
        return 0
    return 1  # a cluster for one start: SkyPilot never restarts it


def in_links(_: Submission, mounts: Sequence[Mount], command: list[str]) -> list[str]:
    """Make each mount path a link, as SkyPilot made this machine for the job. Raises ConfigurationError as `link`."""
    link(mounts)
    return command


def _find_workspace(submission: Submission) -> None:
    if submission.workspace.exists():
        return
    synced = Path(WORKDIR).expanduser()
    if submission.has_workspace:
        submission.workspace.symlink_to(synced, target_is_directory=True)
    else:
        submission.workspace.mkdir()


def _next_start(home: Path) -> int:
    """SkyPilot may restart a job on the same machine, where the files of the earlier start still are."""
    path = home / "start"
    number = int(path.read_text()) + 1 if path.exists() else 1
    path.write_text(str(number))
    return number


def _linger(seconds: float) -> None:
    """Wait while the other nodes use their grace. SIGTERM ends the wait."""
    ended = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.append(True))
    deadline = time.monotonic() + seconds
    while not ended and time.monotonic() < deadline:
        time.sleep(0.1)


def main() -> None:
    """The command line that the module's docstring shows."""
    show_messages("cloudtrain: %(message)s")
    try:
        sys.exit(run(Path(sys.argv[1]).expanduser()))
    except ConfigurationError as error:
        sys.exit(f"cloudtrain: {error}")


if __name__ == "__main__":
    main()
