"""What starts the processes of a job, one module an engine.

    submit      hands a job over and returns; nothing waits for its end
    look        what the engine knows of it now, where it knows more than the record
    cancel      gives the grace, and then insists
    lines       what its nodes say

The record of a job (job_record.py) is written by the submitter until `submit` returns, and then by whoever watches over
the job: its supervisor (supervisor.py) for `local` and `slurm`, and whoever looks for the engines of clouds.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

from hf_cloudtrain.jobs.records import JobRecord, JobStore, State
from hf_cloudtrain.jobs.submission import Submission


@dataclass(frozen=True)
class EngineStatus:
    """What an engine knows of a job now."""

    state: State
    reason: str | None = None


class Engine(Protocol):
    """What every engine does. Errors are ConfigurationError with what to do, before anything is started."""

    def check(self, submission: Submission) -> None:
        """Raise ConfigurationError where this machine or this job cannot do it: a missing command, credentials, GPUs."""

    def show(self, submission: Submission) -> str:
        """Exactly what would be started, for `--dry-run`: commands, scripts, requests; no value of the job's variables."""

    def submit(self, submission: Submission, store: JobStore, record: JobRecord) -> JobRecord:
        """Start it. Gives the record with the handle that finds it again."""

    def look(self, record: JobRecord) -> EngineStatus | None:
        """What the engine knows now; None where the record says all."""

    def cancel(self, record: JobRecord, store: JobStore) -> None:
        """Ask for its end. Returns at once; the grace and the end come after."""

    def lines(self, record: JobRecord, node_rank: int | None, follow: bool) -> Iterator[str]:
        """What its nodes say, line by line, each with "[node] " before it where there are several."""


_HOMES = {
    "local": "hf_cloudtrain.jobs.engines.local",
    "slurm": "hf_cloudtrain.jobs.engines.slurm.engine",
    "skypilot": "hf_cloudtrain.jobs.engines.skypilot.engine",
    "sagemaker": "hf_cloudtrain.jobs.engines.sagemaker.engine",
}
"""Where each engine is; imported when it is asked for."""


def engine(name: str) -> Engine:
    """An engine by its name."""
    return cast("Engine", importlib.import_module(_HOMES[name]).ENGINE)


def as_text(request: Any) -> str:
    """A request to a cloud, as `--dry-run` shows it: YAML, as people write it."""
    import yaml

    text: str = yaml.safe_dump(request, sort_keys=False, width=110)
    return text
