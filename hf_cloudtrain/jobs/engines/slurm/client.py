"""Slurm's own commands, and what they say about a job; no library.

`scontrol show job -o` is parsed rather than `--json`, whose structure changes between Slurm's releases.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from hf_cloudtrain.errors import ConfigurationError

PATIENCE = 120.0
"""Seconds for one command; without a controller Slurm itself retries for 9 to 18 s (22.05)."""
SILENCE = 30.0
"""Seconds without a new question after Slurm did not answer: `job list` asks about every job."""
FILTERS = ("SQUEUE_", "SCANCEL_", "SCONTROL_", "SLURM_TIME_FORMAT")
"""Variables that filter what the commands show, or change its format."""
UNKNOWN = "invalid job id"
SILENT = "unable to contact|connection refused|timed out|no route to host|zero bytes were transmitted"
"""Errors of a controller that does not answer."""


class SlurmError(ConfigurationError):
    """A command of Slurm failed; the message is Slurm's own."""


class SlurmSilentError(SlurmError):
    """Slurm's controller does not answer."""


@dataclass(frozen=True)
class SlurmJob:
    """What Slurm knows about a job."""

    name: str
    """What sbatch called it: the id of our job."""
    state: str
    """Such as `PENDING`. While Slurm takes the nodes back it is `COMPLETING`, whatever follows."""
    reason: str
    restarts: int
    """How many times Slurm queued it again."""
    exit_code: str
    """Exit code and signal of the batch script, such as `1:0`."""
    began: float | None
    ended: float | None
    """When it ended, or must end. Seconds since 1970."""
    limit: float | None
    """In seconds; None: no limit."""
    preempted: float | None
    """When it was preempted; None: it was not."""
    command: str = ""
    """The batch script, as it was submitted."""

    @property
    def was_preempted(self) -> bool:
        """Whether this start of it was preempted."""
        return self.preempted is not None and self.preempted >= (self.began or 0.0)

    @property
    def is_out_of_time(self) -> bool:
        """Whether its time limit has ended it. Slurm counts in whole seconds."""
        if self.began is None or self.ended is None or self.limit is None or self.ended > time.time() + 1:
            return False
        return self.ended - self.began >= self.limit - 1


def call(*command: str, environment: Mapping[str, str] | None = None) -> str:
    """The output of a command. Raises SlurmSilentError if the controller does not answer, else SlurmError."""
    environment = {
        name: value
        for name, value in (os.environ if environment is None else environment).items()
        if not name.startswith(FILTERS)
    }
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    except FileNotFoundError:
        raise SlurmError(
            f"{command[0]!r} is not found. Run this on a machine of the Slurm cluster, such as its login node."
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmSilentError(
            f"Slurm does not answer: {command[0]} timed out after {PATIENCE:.0f} s."
        ) from None
    problem = " ".join(done.stderr.split())
    if re.search(SILENT, problem, re.IGNORECASE):
        raise SlurmSilentError(f"Slurm does not answer: {problem}. `scontrol ping` shows when it does again.")
    if done.returncode:
        raise SlurmError(problem or f"{command[0]} ended with exit code {done.returncode}.")
    return done.stdout


class SlurmClient:
    """Asks Slurm about jobs."""

    def __init__(self) -> None:
        self._silence: tuple[float, SlurmSilentError] | None = None

    def job(self, number: str) -> SlurmJob | None:
        """What Slurm knows about a job; None if it has forgotten this number. Raises SlurmError."""
        if self._silence is not None and time.monotonic() < self._silence[0]:
            raise self._silence[1]
        try:
            return parse_job(call("scontrol", "show", "job", "-o", number))
        except SlurmSilentError as error:
            self._silence = time.monotonic() + SILENCE, error
            raise
        except SlurmError as error:
            if UNKNOWN in str(error).lower():
                return None
            raise


def parse_job(text: str) -> SlurmJob | None:
    """The job in a line of `scontrol show job -o`."""
    pairs = dict(re.findall(r"(?:^| )([A-Z][\w/:]*)=(.*?)(?= [A-Z][\w/:]*=|\s*$)", text.strip()))
    if "JobState" not in pairs:
        return None
    return SlurmJob(
        name=pairs.get("JobName", ""),
        state=pairs["JobState"],
        reason=pairs.get("Reason", "None"),
        restarts=int(pairs.get("Restarts") or 0),
        exit_code=pairs.get("ExitCode", ""),
        began=_time(pairs.get("StartTime")),
        ended=_time(pairs.get("EndTime")),
        limit=_limit(pairs.get("TimeLimit")),
        preempted=_time(pairs.get("PreemptTime")),
        command=pairs.get("Command", ""),
    )


def seconds(text: str) -> float:
    """A time limit as sbatch reads it: `minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours[:…]`."""
    days, separator, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not separator and len(parts) < 3:
        parts = [0, *parts]
    hours, mins, secs = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + mins) * 60.0 + secs


def _time(text: str | None) -> float | None:
    try:
        return datetime.fromisoformat(text or "").timestamp()
    except ValueError:  # None, N/A, Unknown
        return None


def _limit(text: str | None) -> float | None:
    return seconds(text) if text and text[0].isdigit() else None  # UNLIMITED, Partition_Limit
