"""What an engine does, and the table that finds one by name. Light to import: SageMaker's containers start with it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from hf_cloudtrain.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hf_cloudtrain.jobs.records import JobRecord, JobStore, State
    from hf_cloudtrain.jobs.submission import Submission


@dataclass(frozen=True)
class EngineStatus:
    """What an engine knows about a job now.

    Example:
        >>> EngineStatus("queued", "Slurm: Resources.")
    """

    state: State
    reason: str | None = None


class Engine(Protocol):
    """What every engine does: docs/add-an-engine.md explains it step by step."""

    def check(self, submission: Submission) -> None:
        """Raise ConfigurationError if this machine or this job lacks something: a command, credentials, GPUs."""

    def show(self, submission: Submission) -> str:
        """Exactly what would be started, for `--dry-run`: commands, scripts, requests; no value of a variable."""

    def submit(self, submission: Submission, store: JobStore, record: JobRecord) -> JobRecord:
        """Hand the job over and return the record, with a handle that finds the job again. Do not wait for its end.

        Raises:
            ConfigurationError: nothing was started; the message says what to do.
        """

    def look(self, record: JobRecord) -> EngineStatus | None:
        """What the engine knows now; None if the record already says everything."""

    def cancel(self, record: JobRecord, store: JobStore) -> None:
        """Ask for the end of a job. `store` already holds the cancel mark, which supervisors see by themselves."""

    def lines(self, record: JobRecord, node_rank: int | None, follow: bool) -> Iterator[str]:
        """The output of one node, or of all: with several nodes, each line begins with "[node N] "."""


_HOMES = {
    "local": "hf_cloudtrain.jobs.engines.local",
    "slurm": "hf_cloudtrain.jobs.engines.slurm.engine",
    "skypilot": "hf_cloudtrain.jobs.engines.skypilot.engine",
    "sagemaker": "hf_cloudtrain.jobs.engines.sagemaker.engine",
}
"""The module of each engine, with an `ENGINE` in it; imported on first use."""


def engine(name: str) -> Engine:
    """The engine with this name. Raises ConfigurationError: it is not in the table."""
    if name not in _HOMES:
        raise ConfigurationError(
            f"Unknown engine {name!r}: a newer version of hf_cloudtrain submitted the job, or its record is damaged. Use that "
            f"version; this one has {', '.join(_HOMES)}."
        )
    return cast("Engine", importlib.import_module(_HOMES[name]).ENGINE)


def states(**theirs: str) -> dict[str, State]:
    """The states of an engine's own service, and ours for each.

    Example:
        >>> states(queued="PENDING REQUEUED", running="RUNNING")["REQUEUED"]
        'queued'
    """
    return {name: cast("State", ours) for ours, names in theirs.items() for name in names.split()}


def as_text(request: Any) -> str:
    """A request to a cloud as `--dry-run` shows it: YAML."""
    import yaml

    text: str = yaml.safe_dump(request, sort_keys=False, width=110)
    return text
