"""The command `sky`: how it is called, and what its answers say about a job.

sky jobs queue | logs | cancel    a managed job: SkyPilot starts it again on a different machine
sky queue | logs | down           the only job of a cluster that is started once
"""

from __future__ import annotations

import codecs
import io
import json
import logging
import os
import re
import select
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, cast

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.jobs.engines.skypilot.task import cluster_name, task_name
from hf_cloudtrain.jobs.records import JobRecord
from hf_cloudtrain.runtime.redaction import redact

logger = logging.getLogger(__name__)

PATIENCE = 120.0
"""Seconds for an answer of `sky`, which may have to start its API server first: that took 74 s."""
NO_CONTROLLER = ("No in-progress managed jobs", "All managed jobs should have finished")
"""Errors of a controller that does not run, because no job does (sky/jobs/server/core.py)."""
JOB_ID = re.compile(r"job(?: submitted,)? ID: *(\d+)", re.IGNORECASE)
"""How a launch prints the number of its job (sky/utils/ux_utils.py)."""
_COLOR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# "(worker1, rank=1, pid=4321, ip=10.0.0.5) text", and "(mnli-2, pid=4321) text" with a single node.
_NODE_LINE = re.compile(r"\((?:[\w.-]+, rank=(?P<rank>\d+)|[\w.-]+), pid=\d+(?:, ip=[^)]*)?\) ?(?P<text>.*)")


class SkyJob:
    """A job that SkyPilot has.

    Args:
        record: untrusted. Its handle has `managed`, `name` (of the job, or of its cluster) and `job`, its number, if known.

    Raises:
        ConfigurationError: the handle names a different job, or something that `sky` could read as an option.
    """

    def __init__(self, record: JobRecord) -> None:
        handle = record.handle
        self._managed = bool(handle.get("managed"))
        self._name = task_name(record.id) if self._managed else cluster_name(record.id)
        self._number: int | None = handle.get("job")
        has_number = self._number is None or (isinstance(self._number, int) and self._number >= 0)
        if handle.get("name") != self._name or not has_number:
            raise ConfigurationError(
                f"{str(dict(handle))[:200]!r} does not name SkyPilot's job {self._name!r}: the record of the job {record.id!r} "
                "is damaged, or SkyPilot has not accepted the job yet. List SkyPilot's jobs with `sky jobs queue`, and its "
                "clusters with `sky status`."
            )

    def row(self) -> dict[str, Any] | None:
        """The job in SkyPilot's table; None if it is not there. Raises ConfigurationError."""
        if self._managed:
            rows = [row for row in managed_jobs() if row.get("job_name") == self._name]
        else:
            rows = _json(["sky", "queue", self._name, "-o", "json"], "{").get(self._name, [])
        rows = [row for row in rows if self._number in (None, row.get("job_id"))]
        return max(rows, key=lambda row: row.get("job_id") or 0, default=None)

    @property
    def logs_argv(self) -> list[str]:
        """The command that prints its log."""
        number = [] if self._number is None else [str(self._number)]
        if self._managed:
            return ["sky", "jobs", "logs", *(number or ["-n", self._name])]
        return ["sky", "logs", self._name, *number]

    def check_number(self) -> None:
        """Raise ConfigurationError if SkyPilot has no job with its name and number: a log is found by the number alone."""
        if self._managed and self._number is not None and self.row() is None:
            raise ConfigurationError(
                f"SkyPilot has no job {self._number} with the name {self._name!r}: it has forgotten the job, or the job's record "
                "is damaged. List SkyPilot's jobs with `sky jobs queue -a`."
            )

    def end(self) -> None:
        """Cancel it, or take its cluster down. Raises ConfigurationError."""
        if not self._managed:
            run(["sky", "down", "-y", self._name])
            return
        which = ["-n", self._name]
        try:
            if self.row() is None:
                logger.warning(
                    "SkyPilot no longer has the job %r with this number; nothing was cancelled there.",
                    self._name,
                )
                return
            if self._number is not None:
                which = [str(self._number)]
        except ConfigurationError as error:
            logger.warning("%s Cancelling the job by its name %r.", error, self._name)
        try:
            run(["sky", "jobs", "cancel", "-y", *which])
        except ConfigurationError as error:
            if not _has_no_controller(error):
                raise


def managed_jobs() -> list[dict[str, Any]]:
    """SkyPilot's table of managed jobs. Raises ConfigurationError."""
    try:
        rows: list[dict[str, Any]] = _json(["sky", "jobs", "queue", "-a", "-o", "json"], "[")
    except ConfigurationError as error:
        if _has_no_controller(error):
            return []
        raise
    return rows


def executable() -> str:
    """Path of `sky`: beside this Python, or on the PATH. Raises ConfigurationError."""
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    found = shutil.which("sky", path=path)
    if found is None:
        raise ConfigurationError(
            "SkyPilot's command 'sky' is not found. Install it for your cloud, and log in to that cloud: "
            "pip install 'hf_cloudtrain[skypilot]' 'skypilot[azure]'; sky check"
        )
    return found


def run(argv: Sequence[str], variables: Mapping[str, str] | None = None) -> str:
    """Run a command to its end, log its output and return it. Raises ConfigurationError if it fails."""
    output = []
    with start(argv, variables) as process:
        try:
            for line in process.stdout or ():
                output.append(_COLOR.sub("", line).rstrip())
                logger.info("%s", output[-1])
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        raise _failure(argv, process.returncode, "\n".join(output))
    return "\n".join(output)


def start(argv: Sequence[str], variables: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command whose output is read line by line."""
    return subprocess.Popen(
        [executable(), *argv[1:]],
        env={**os.environ, **(variables or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def lines(argv: Sequence[str], patience: float | None) -> Iterator[str]:
    """The output of a command as it arrives. The end of the iteration ends the command.

    Args:
        argv: the command.
        patience: seconds that it may be silent; None: as long as it runs.

    Raises:
        ConfigurationError: it was silent for too long.
    """
    # Not `select.select`, which refuses file descriptors above 1023, nor a selector, which needs one of its own.
    poll, milliseconds = select.poll(), None if patience is None else patience * 1000
    with start(argv) as process:
        output = cast("IO[str]", process.stdout).fileno()
        poll.register(output, select.POLLIN)
        text = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")("replace"), True)
        rest = ""
        try:
            while poll.poll(milliseconds):
                data = os.read(output, 2**16)
                *whole, rest = (rest + text.decode(data, final=not data)).split("\n")
                yield from whole
                if not data:
                    yield from [rest] if rest else []
                    return
            process.kill()
            raise ConfigurationError(f"`{shlex.join(argv)}` printed nothing for {patience:g} s.")
        finally:
            process.terminate()


def answer(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The answer of a command, whatever its exit code. Raises ConfigurationError if it takes too long."""
    try:
        return subprocess.run(
            [executable(), *argv[1:]],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConfigurationError(f"`{shlex.join(argv)}` timed out after {PATIENCE:g} s.") from None


def node_line(line: str, nodes: int, node_rank: int | None) -> str | None:
    """A log line of SkyPilot's as all engines show it; None if it belongs to a node that was not asked for."""
    line = _COLOR.sub("", line).rstrip("\r\n")
    match = _NODE_LINE.fullmatch(line)
    if match is None:
        return line if node_rank is None else None
    rank = int(match["rank"] or 0)
    if node_rank not in (None, rank):
        return None
    return f"[node {rank}] {match['text']}" if nodes > 1 else match["text"]


def _json(argv: list[str], opens: str) -> Any:
    """The JSON that a command prints. Warnings may stand before it."""
    done = answer(argv)
    lines = _COLOR.sub("", done.stdout).splitlines()
    begin = next((index for index, line in enumerate(lines) if line.startswith(opens)), len(lines))
    try:
        if done.returncode == 0:
            return json.JSONDecoder().raw_decode("\n".join(lines[begin:]))[0]
    except ValueError:
        pass
    raise _failure(argv, done.returncode, done.stdout + done.stderr)


def _has_no_controller(error: ConfigurationError) -> bool:
    return any(text in str(error) for text in NO_CONTROLLER)


def _failure(argv: Sequence[str], code: int, output: str) -> ConfigurationError:
    lines = [line.strip() for line in _COLOR.sub("", output).splitlines() if line.strip()][-5:]
    why = " | ".join(lines) or "it printed nothing."
    return ConfigurationError(redact(f"`{shlex.join(argv[:3])}` ended with exit code {code}: {why}"))
