"""What a tracker service must be able to do so that its run goes on, and the services that are known."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class TrackerStart:
    """The training that is about to report to a service."""

    step: int
    """The step from which it resumes; 0 at the first start."""
    output_dir: Path
    run: str = "run"
    """The name of the run: the last part of its URL."""
    run_name: str | None = None
    """As the user named the tracker run."""
    chosen: str | None = None
    """The id that the user gave as an argument, if any."""
    logging_dir: Path | None = None
    """Where Accelerate's tracker writes files; None for Trainer's callbacks."""


@dataclass(frozen=True)
class TrackerContent:
    """What a tracker run holds already.

    Example:
        >>> TrackerContent({"train/loss": 120}).has("train/loss", 100, 0.5)
        True
    """

    steps: Mapping[str, int] = field(default_factory=dict)
    """The last step of each metric."""
    last: int = -1
    """Where the service tells only the last step of all metrics: that step."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The newest value of each metric, to tell at the last step which ones were sent."""

    @property
    def newest(self) -> int:
        """The last step of any metric; -1 where there is none."""
        return max([self.last, *self.steps.values()])

    def has(self, name: str, step: int, value: Any) -> bool:
        """Whether the service has the value of this metric at this step."""
        if name in self.steps:
            return step <= self.steps[name]
        return step < self.last or (
            step == self.last and name in self.values and _same(self.values[name], value)
        )


class TrackerService:
    """One tracker service. Derive from it to add one, and pass an instance to `register_tracker`.

    A service that chooses ids itself returns the id of a run that it has just created from `new_id`. All methods run on rank 0
    only, may ask the network and may raise: an error is shown once, and training goes on without the tracker.

    Example:
        >>> class Notebook(TrackerService):
        ...     name, trainer_callback = "notebook", "NotebookCallback"
        ...     def new_id(self, start): return secrets.token_hex(8)
        ...     def environment(self, tracker_id): return {"NOTEBOOK_RUN_ID": tracker_id}
        >>> register_tracker(Notebook())
    """

    name: ClassVar[str] = ""
    """As `report_to` of TrainingArguments and `log_with` of Accelerator name it."""
    trainer_callback: ClassVar[str] = ""
    """The class of the Trainer callback that reports to it."""
    patience: ClassVar[Mapping[str, str]] = {}
    """Environment variables that keep its client from waiting for minutes; those that the user sets win."""
    id_argument: ClassVar[str] = ""
    """The argument of its start that holds the id."""
    has_fixed_parameters: ClassVar[bool] = False
    """Whether it refuses parameters of a run that differ from those of its first start."""
    ends_with_training: ClassVar[bool] = False
    """Whether its Trainer callback ends the run with the training, so that a later evaluation must start it again."""

    def users_id(self, start: TrackerStart) -> str | None:
        """The id that the user has chosen, by a variable or because its run has begun in this process; None without one."""
        return None

    def new_id(self, start: TrackerStart) -> str:
        """An id for a run that has none yet."""
        raise NotImplementedError

    def lacks(self, tracker_id: str) -> str | None:
        """Why the service cannot go on with a run, such as "was deleted"; None if it can, or only its start shows it."""
        return None

    def is_lost(self, error: Exception) -> bool:
        """Whether an error of its start means that its run no longer exists."""
        return False

    def environment(self, tracker_id: str) -> dict[str, str]:
        """Variables with which the service's own start goes on with a run."""
        return {}

    def arguments(self, tracker_id: str, start: TrackerStart) -> dict[str, Any]:
        """Arguments of Accelerate's tracker with which it goes on with a run."""
        return {}

    def before_start(self, callback: Any, args: Any, tracker_id: str, start: TrackerStart) -> dict[str, str]:
        """What the Trainer callback needs before it starts; returns further variables for its start.

        Args:
            args: the TrainingArguments; a `run_name` that is set here is set back.
        """
        return {}

    def location(self, tracker_id: str) -> str:
        """What tells its run from all others of the service; called once it has started."""
        return tracker_id

    def files(self, tracker_id: str) -> Path | None:
        """The folder of event files that are part of the run, None without one; called once it has started."""
        return None

    def sent(self, tracker_id: str) -> TrackerContent:
        """What its run holds; called once it has started."""
        return TrackerContent()

    def metric(self, name: str) -> str:
        """How its Trainer callback calls a metric that Trainer logs."""
        for prefix in ("eval_", "test_"):
            if name.startswith(prefix):
                return f"{prefix[:-1]}/{name.removeprefix(prefix)}"
        return f"train/{name}"

    def page(self, tracker_id: str) -> str | None:
        """URL of the page of its run; None if it has none."""
        return None

    def follows(self, previous: str, reason: str) -> None:
        """Link the run that has just started to the one before it."""

    def end_again(self, callback: Any) -> bool:
        """End the run that an evaluation after the training has started again, if its Trainer callback ends runs; whether it did."""
        return False

    def flush(self) -> None:
        """Send what waits: the process ends soon."""

    @contextmanager
    def patiently(self, variables: Mapping[str, str] | None = None) -> Iterator[None]:
        """Within it, requests give up early, and `variables` are set; afterwards the environment is as before."""
        wanted = {name: value for name, value in self.patience.items() if name not in os.environ}
        wanted |= variables or {}
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


_services: dict[str, TrackerService] = {}


def register_tracker(service: TrackerService) -> None:
    """Let runs of one more tracker service go on; one with the same name is replaced.

    Args:
        service: what it can do.

    Example:
        >>> register_tracker(Notebook())
    """
    _services[service.name] = service


def tracker_services() -> dict[str, TrackerService]:
    """The known services by name: ours, and those of `register_tracker`. Imports no package of a service."""
    from hf_cloudtrain.tracking.services.mlflow import MLflow
    from hf_cloudtrain.tracking.services.tensorboard import TensorBoard
    from hf_cloudtrain.tracking.services.trackio import Trackio
    from hf_cloudtrain.tracking.services.wandb import WeightsAndBiases

    ours: tuple[TrackerService, ...] = (WeightsAndBiases(), MLflow(), Trackio(), TensorBoard())
    return {**{service.name: service for service in ours}, **_services}


def _same(one: Any, other: Any) -> bool:
    try:
        first, second = float(one), float(other)
    except (TypeError, ValueError):
        return bool(one == other)
    return first == second or (math.isnan(first) and math.isnan(second))
