"""Slurm's own commands, and what they say of a job; no library.

`scontrol show job -o` is parsed rather than `--json`, whose shape changes between Slurm's releases.
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
"""Seconds for one command; without a controller they try for 9 to 18 s themselves (22.05)."""
SILENCE = 30.0
"""Seconds in which Slurm is not asked again after it did not answer: `job list` asks for every job."""
FILTERS = ("SQUEUE_", "SCANCEL_", "SCONTROL_", "SLURM_TIME_FORMAT")
"""Variables that change what the commands look at, or how they write what is read here."""
UNKNOWN = ("invalid job id",)
SILENT = (
    "unable to contact",
    "connection refused",
    "timed out",
    "no route to host",
    "zero bytes were transmitted",
)


class SlurmError(ConfigurationError):
    """A command of Slurm's failed; the message is Slurm's own."""


class SlurmSilentError(SlurmError):
    """Slurm's controller does not answer."""


@dataclass(frozen=True)
class SlurmJob:
    """What Slurm knows of a job."""

    state: str
    """Such as `PENDING`. While nodes are given back it is `COMPLETING`, whatever comes after."""
    reason: str
    restarts: int
    """How many times it was queued again."""
    exit_code: str
    """Exit code and signal of the batch script, such as `1:0`."""
    began: float | None
    ended: float | None
    """When it ended, or has to end. Seconds since 1970."""
    limit: float | None
    """Seconds; None: no limit."""
    preempted: float | None
    """When it had to give way; None: it had not."""

    @property
    def was_preempted(self) -> bool:
        """Whether this start of it had to give way to another job."""
        return self.preempted is not None and self.preempted >= (self.began or 0.0)

    @property
    def is_out_of_time(self) -> bool:
        """Whether it was ended by its time limit. Slurm counts in whole seconds; an end to come is no end."""
        if self.began is None or self.ended is None or self.limit is None or self.ended > time.time() + 1:
            return False
        return self.ended - self.began >= self.limit - 1


def call(*command: str, environment: Mapping[str, str] | None = None) -> str:
    """What a command prints.

    Raises:
        SlurmSilentError: the controller does not answer. SlurmError: everything else.
    """
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
            f"{command[0]!r} is not found. Run this on a machine of the cluster, such as its login node."
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmSilentError(
            f"Slurm does not answer: {command[0]} has said nothing for {PATIENCE:.0f} s."
        ) from None
    said = " ".join(done.stderr.split())
    if any(text in said.lower() for text in SILENT):
        raise SlurmSilentError(f"Slurm does not answer: {said}. `scontrol ping` shows when it does again.")
    if done.returncode:
        raise SlurmError(said or f"{command[0]} ended with exit code {done.returncode}.")
    return done.stdout


class SlurmClient:
    """Asks after jobs."""

    def __init__(self) -> None:
        self._silence: tuple[float, SlurmSilentError] | None = None

    def job(self, number: str) -> SlurmJob | None:
        """What Slurm knows of a job; None where it knows none of this number any more.

        Raises:
            SlurmError: it does not say.
        """
        if self._silence is not None and time.monotonic() < self._silence[0]:
            raise self._silence[1]
        try:
            return parse_job(call("scontrol", "show", "job", "-o", number))
        except SlurmSilentError as error:
            self._silence = time.monotonic() + SILENCE, error
            raise
        except SlurmError as error:
            if any(text in str(error).lower() for text in UNKNOWN):
                return None
            raise


def parse_job(text: str) -> SlurmJob | None:
    """The job in one line of `scontrol show job -o`."""
    pairs = dict(re.findall(r"(?:^| )([A-Z][\w/:]*)=(.*?)(?= [A-Z][\w/:]*=|\s*$)", text.strip()))
    if "JobState" not in pairs:
        return None
    return SlurmJob(
        state=pairs["JobState"],
        reason=pairs.get("Reason", "None"),
        restarts=int(pairs.get("Restarts") or 0),
        exit_code=pairs.get("ExitCode", ""),
        began=_time(pairs.get("StartTime")),
        ended=_time(pairs.get("EndTime")),
        limit=_seconds(pairs.get("TimeLimit")),
        preempted=_time(pairs.get("PreemptTime")),
    )


def minutes(text: str) -> float:
    """A time limit as sbatch takes it: `minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours[:…]`."""
    days, separator, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if separator:
        hours, mins, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, mins, seconds = parts
    else:
        hours, (mins, seconds) = 0, (*parts, 0)[:2]
    return int(days or 0) * 1440 + hours * 60 + mins + seconds / 60


def _time(text: str | None) -> float | None:
    try:
        return datetime.fromisoformat(text or "").timestamp()
    except ValueError:  # None, N/A, Unknown
        return None


def _seconds(text: str | None) -> float | None:
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text or "")
    if match is None:
        return None
    days, hours, mins, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + mins) * 60.0 + seconds
