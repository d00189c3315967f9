"""Machines of clouds, by SkyPilot's own command `sky`, which may be installed anywhere.

    sky jobs launch -n mnli-2 -y -d --secret WANDB_API_KEY task.yaml     a managed job: SkyPilot starts it again elsewhere
    sky launch -c mnli-2 -y -d --down --secret WANDB_API_KEY task.yaml   a cluster for one start

`task.yaml` (https://docs.skypilot.co/en/latest/reference/yaml-spec.html) is in the job's home. Each node runs
`skypilot_entry`, which tells it to node.py. The values of variables go to `sky` in its environment: none is in a file,
an argument or a listing. Whether a job is started again is said by the exit code of its nodes; see `skypilot_entry`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError
from hf_cloudtrain.jobs.engines import EngineStatus, as_text
from hf_cloudtrain.jobs.engines.skypilot.task import VERDICT, as_task, cluster_name, launch_argv, problems
from hf_cloudtrain.jobs.records import OVER, JobRecord, JobStore, State
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.runtime.provenance import person
from hf_cloudtrain.runtime.redaction import redact
from hf_cloudtrain.storage.client import Storage

logger = logging.getLogger(__name__)

CANCELLED = "Stopped by `cloudtrain job cancel`."
TASK = "task.yaml"
LOOK = 120.0
"""Seconds for an answer of `sky`, which may have to start its API server first: that took 74 s."""
POLL = 2.0
"""Seconds between two looks at a run that is to stop."""
MARGIN = 15.0
"""Seconds beyond heartbeat and grace for a run to say that it has stopped."""
STATES: dict[str, State] = {
    "PENDING": "queued",
    "SUBMITTED": "starting",
    "STARTING": "starting",
    "RUNNING": "running",
    "WINDING_DOWN": "running",
    "RECOVERING": "starting",
    "CANCELLING": "stopping",
    "SUCCEEDED": "finished",
    "CANCELLED": "cancelled",
    # Of a cluster's own queue:
    "INIT": "starting",
    "SETTING_UP": "starting",
}
"""SkyPilot's words and ours (sky/jobs/state.py, sky/skylet/job_lib.py); what begins with FAILED is `failed`."""

ENDS: dict[str, State] = {
    "finished": "finished",
    "preempted": "preempted",
    "stopped": "cancelled",
    "failed": "failed",
    "overtaken": "failed",
}
"""What an attempt says of its end, and what that makes of its job."""
CLOCKS = 600.0
"""Seconds that the clocks of two machines may differ: an older attempt is another job's."""
NONE_RUNS = ("No in-progress managed jobs", "All managed jobs should have finished")
"""SkyPilot's words, with an error, where its controller is not there or is stopped (sky/jobs/server/core.py)."""

JOB_ID = re.compile(r"job(?: submitted,)? ID: *(\d+)", re.IGNORECASE)
"""How a launch says the number of its job (sky/utils/ux_utils.py)."""
_COLOR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# "(worker1, rank=1, pid=4321, ip=10.0.0.5) text", and "(mnli-2, pid=4321) text" of a single node.
_SAID = re.compile(r"\((?:[\w.-]+, rank=(?P<rank>\d+)|[\w.-]+), pid=\d+(?:, ip=[^)]*)?\) ?(?P<text>.*)")


class SkypilotEngine:
    """Managed jobs and clusters of SkyPilot. See `Engine`."""

    def check(self, submission: Submission) -> None:
        """Refuse what cannot run there, before anything is started."""
        if found := problems(submission):
            raise ConfigurationError(" ".join(found))
        submission.plan.own_variables(os.environ)
        _executable()

    def show(self, submission: Submission) -> str:
        """The task and the command, with what is missing above them."""
        comments = "".join(f"# Missing: {problem}\n" for problem in problems(submission))
        words = shlex.join(launch_argv(submission, str(submission.home / TASK)))
        return f"{comments}{as_text(as_task(submission))}---\n{words}\n"

    def submit(self, submission: Submission, store: JobStore, record: JobRecord) -> JobRecord:
        """Hand the task to SkyPilot, which answers once it has accepted it.

        That takes minutes where it must start a machine for its own controller first.
        """
        task = as_task(submission)
        submission.save()
        path = submission.home / TASK
        path.write_text(as_text(task))
        if submission.has_workspace:
            # Without it SkyPilot leaves out what a .gitignore names; what the copy holds, the other engines have too.
            ignore = submission.workspace / ".skyignore"
            if not ignore.exists():
                ignore.write_text(
                    "# Everything is sent: this folder is a copy that leaves out what is not wanted.\n"
                )
        said = _talk(launch_argv(submission, str(path)), submission.plan.own_variables(os.environ))
        managed = submission.job.skypilot.managed
        found = JOB_ID.findall(said)
        number = int(found[-1]) if found else None
        if number is None and managed:
            number = max(
                (row["job_id"] for row in _queue() if row.get("job_name") == task["name"]), default=None
            )
        handle = {
            "managed": managed,
            "name": task["name"] if managed else cluster_name(submission.id),
            "job": number,
        }
        return store.write(record, state="queued" if managed else "starting", handle=handle)

    def look(self, record: JobRecord) -> EngineStatus | None:
        """What SkyPilot says now; None where it knows nothing of the job yet.

        Raises:
            ConfigurationError: it does not answer.
        """
        if record.is_over or not record.handle:
            return None
        row = _row(record)
        return _forgotten(record) if row is None else _seen(record, row)

    def cancel(self, record: JobRecord, store: JobStore) -> None:
        """Ask the run to save and stop, wait for that no longer than heartbeat and grace take, and end the job.

        SkyPilot gives a job that it cancels no time to save, so the run is asked through its storage.
        """
        record = store.write(record, state="stopping")
        if not record.handle:  # nothing was handed over
            return
        try:
            _stop_run(record, Submission.load(record.home).plan.grace)
        except (CloudTrainError, OSError, ValueError) as error:
            logger.warning("The run could not be asked to save: %s", error)
        name, number = record.handle["name"], record.handle.get("job")
        if not record.handle["managed"]:
            _talk(["sky", "down", "-y", name])
            return
        try:
            _talk(["sky", "jobs", "cancel", "-y", *([str(number)] if number is not None else ["-n", name])])
        except ConfigurationError as error:
            if not any(words in str(error) for words in NONE_RUNS):
                raise

    def lines(self, record: JobRecord, node_rank: int | None, follow: bool) -> Iterator[str]:
        """What SkyPilot has of it."""
        words = [*_logs(record), "--follow" if follow else "--no-follow", "--tail", "0"]
        with _open(words) as process:
            try:
                for line in _output(process):
                    shown = _shown(line, record.nodes, node_rank)
                    if shown is not None:
                        yield shown
            finally:
                process.terminate()  # of the listening alone


# --- What SkyPilot says ------------------------------------------------------------------------------------------------


def _row(record: JobRecord) -> dict[str, Any] | None:
    """What SkyPilot knows of a job."""
    name, number = record.handle["name"], record.handle.get("job")
    if record.handle["managed"]:
        rows = [
            row
            for row in _queue()
            if row.get("job_id") == number or (number is None and row.get("job_name") == name)
        ]
    else:
        rows = cast("dict[str, list[dict[str, Any]]]", _json(["sky", "queue", name, "-o", "json"], "{")).get(
            name, []
        )
        rows = [row for row in rows if number in (None, row.get("job_id"))]
    return max(rows, key=lambda row: row.get("job_id") or 0, default=None)


def _seen(record: JobRecord, row: dict[str, Any]) -> EngineStatus:
    status = str(row.get("status"))
    state: State = "failed" if status.startswith("FAILED") else STATES.get(status, record.state)
    said = row.get("failure_reason") or row.get("details")
    reason = None if said is None else redact(str(said))
    if status == "RECOVERING":
        reason = reason or "SkyPilot starts it again on another machine."
    if record.state == "stopping":
        return EngineStatus("cancelled", CANCELLED) if state in OVER else EngineStatus("stopping")
    if state == "finished":
        return _verdict(record) or EngineStatus("finished", reason)
    return EngineStatus(state, reason)


def _queue() -> list[dict[str, Any]]:
    try:
        return cast("list[dict[str, Any]]", _json(["sky", "jobs", "queue", "-a", "-o", "json"], "["))
    except ConfigurationError as error:
        if any(words in str(error) for words in NONE_RUNS):
            return []
        raise


def _json(words: list[str], opens: str) -> Any:
    """What a command of SkyPilot answers. Warnings may stand before it."""
    try:
        answer = subprocess.run(
            [_executable(), *words[1:]],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LOOK,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConfigurationError(f"`{shlex.join(words)}` gave no answer within {LOOK:g} s.") from None
    lines = _COLOR.sub("", answer.stdout).splitlines()
    begin = next((index for index, line in enumerate(lines) if line.startswith(opens)), None)
    if answer.returncode != 0 or begin is None:
        raise _failure(words, answer.returncode, answer.stdout + answer.stderr)
    try:
        return json.JSONDecoder().raw_decode("\n".join(lines[begin:]))[0]
    except ValueError:
        raise _failure(words, answer.returncode, answer.stdout) from None


def _forgotten(record: JobRecord) -> EngineStatus:
    """SkyPilot tears a cluster down after its job, and its controller when nothing runs: then the run has to say it."""
    if record.state == "stopping":
        return EngineStatus("cancelled", CANCELLED)
    try:
        catalog = _catalog(record)
        progress = catalog.read_progress(max(catalog.attempt_numbers(), default=0)) or {}
    except CloudTrainError as error:
        return EngineStatus("lost", f"SkyPilot has forgotten it, and its run cannot be read. {error}")
    seen = progress.get("time")
    is_its_own = isinstance(seen, (int, float)) and seen > record.created - CLOCKS
    state = ENDS.get(str(progress.get("state"))) if is_its_own else None
    if state is None:
        return EngineStatus(
            "lost", f"SkyPilot has forgotten it, and its run has no end. See `{shlex.join(_logs(record))}`."
        )
    return EngineStatus(state, f"SkyPilot has forgotten it; its run is {progress['state']}.")


def _verdict(record: JobRecord) -> EngineStatus | None:
    """What node 0 said at its end: SkyPilot calls everything a success that is not to be started again."""
    try:
        answer = subprocess.run(
            [_executable(), *_logs(record)[1:], "--no-follow", "--tail", "200"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LOOK,
            check=False,
        )
    except (subprocess.TimeoutExpired, OSError):
        return None
    lines = [_shown(line, 1, None) or "" for line in answer.stdout.splitlines()]
    said = next((line for line in reversed(lines) if line.startswith(VERDICT)), None)
    if said is None:
        return None
    try:
        found = json.loads(said[len(VERDICT) :])
        return EngineStatus(found["state"], found["reason"])
    except (ValueError, KeyError, TypeError):
        return None


def _logs(record: JobRecord) -> list[str]:
    name, number = record.handle["name"], record.handle.get("job")
    of_job = [str(number)] if number is not None else []
    if record.handle["managed"]:
        return ["sky", "jobs", "logs", *(of_job or ["-n", name])]
    return ["sky", "logs", name, *of_job]


def _shown(line: str, nodes: int, node_rank: int | None) -> str | None:
    """A line as all engines show it; None where it is of a node that was not asked for."""
    line = _COLOR.sub("", line).rstrip("\r\n")
    match = _SAID.fullmatch(line)
    if match is None:
        return line if node_rank is None else None
    rank = int(match["rank"] or 0)
    if node_rank not in (None, rank):
        return None
    return f"[node {rank}] {match['text']}" if nodes > 1 else match["text"]


def _stop_run(record: JobRecord, grace: float) -> None:
    """Ask what trains to save and stop, and wait until it has, or the time for it is over."""
    catalog = _catalog(record)
    attempt = max(catalog.attempt_numbers(), default=None)
    if attempt is None or not _is_training(catalog, attempt):
        return
    catalog.request_stop(time.time(), person())
    deadline = time.monotonic() + env.heartbeat() + grace + MARGIN
    while _is_training(catalog, attempt) and time.monotonic() < deadline:
        time.sleep(POLL)


def _catalog(record: JobRecord) -> Catalog:
    return Catalog(Storage(record.run_url, env.storage_options(None)))


def _is_training(catalog: Catalog, attempt: int) -> bool:
    return (catalog.read_progress(attempt) or {}).get("state", "started") in ("started", "training")


# --- The command -------------------------------------------------------------------------------------------------------


def _executable() -> str:
    found = shutil.which(
        "sky", path=f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    )
    if found is None:
        raise ConfigurationError(
            "SkyPilot's command 'sky' is not found. Install it with your cloud, and log in to that: "
            "pip install 'hf_cloudtrain[skypilot]' 'skypilot[azure]'; sky check"
        )
    return found


def _talk(words: Sequence[str], variables: Mapping[str, str] | None = None) -> str:
    """Run a command to its end and log what it says. Raises ConfigurationError where it fails."""
    said = []
    with _open(words, variables) as process:
        try:
            for line in _output(process):
                said.append(_COLOR.sub("", line).rstrip())
                logger.info("%s", said[-1])
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        raise _failure(words, process.returncode, "\n".join(said))
    return "\n".join(said)


def _open(words: Sequence[str], variables: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [_executable(), *words[1:]],
        env={**os.environ, **(variables or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def _output(process: subprocess.Popen[str]) -> Iterator[str]:
    yield from process.stdout or ()


def _failure(words: Sequence[str], code: int, said: str) -> ConfigurationError:
    lines = [line.strip() for line in _COLOR.sub("", said).splitlines() if line.strip()][-5:]
    return ConfigurationError(
        redact(
            f"`{shlex.join(words[:3])}` ended with exit code {code}: {' | '.join(lines) or 'it said nothing.'}"
        )
    )


ENGINE = SkypilotEngine()
