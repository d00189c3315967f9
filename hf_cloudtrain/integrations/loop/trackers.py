"""The trackers of an Accelerator go on in one tracker run, and never end a training."""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker

from hf_cloudtrain.errors import CloudTrainError
from hf_cloudtrain.integrations.lifecycle import AttemptLifecycle
from hf_cloudtrain.runtime.tracebacks import short_traceback
from hf_cloudtrain.runtime.values import NOT_FINITE
from hf_cloudtrain.tracking.history import history_of
from hf_cloudtrain.tracking.services.choice import content_of, page_of, start_run
from hf_cloudtrain.tracking.services.event_files import EventFiles
from hf_cloudtrain.tracking.services.guard import TrackerGuard
from hf_cloudtrain.tracking.services.runs import TrackerRun
from hf_cloudtrain.tracking.services.service import (
    TrackerContent,
    TrackerService,
    TrackerStart,
    tracker_services,
)

logger = logging.getLogger(__name__)

_OWN = frozenset({"step", "time", "attempt"})


class TrackedLoop:
    """The part of `TrainLoop` that starts trackers."""

    accelerator: Any
    _lifecycle: AttemptLifecycle
    _report: Any
    _looked_for_checkpoint: bool

    @property
    def global_step(self) -> int:
        """Optimizer steps that are complete."""
        raise NotImplementedError

    def resume(self) -> Path | None:
        """Continue from the newest checkpoint."""
        raise NotImplementedError

    @short_traceback
    def init_trackers(
        self,
        project_name: str,
        config: dict[str, Any] | None = None,
        init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Start the trackers of the accelerator so that they go on in one tracker run; in place of `accelerator.init_trackers`.

        Call it on all ranks, after `prepare` and before the loop: it resumes, if `resume` was not called. What `log` and
        `end_epoch` report is then in each tracker once. A tracker that fails does not end the training.

        Args:
            project_name: as of `accelerator.init_trackers`.
            config: as of `accelerator.init_trackers`; MLflow, which refuses changes, gets it at the first start only.
            init_kwargs: as of `accelerator.init_trackers`; an `id` (W&B), `run_id` (MLflow) or `name` (trackio) here wins.

        Example:
            >>> accelerator = Accelerator(log_with="mlflow")
            >>> loop.init_trackers("glue", config=vars(args))
        """
        if not self._looked_for_checkpoint:
            self.resume()
        lifecycle = self._lifecycle
        apart = "the run starts over" if lifecycle.is_fresh else None
        if lifecycle.restored is not None and lifecycle.restored.step != self.global_step:
            apart = "a step has a different size now"
        self._report.trackers.start(project_name, config, init_kwargs or {}, self.global_step, apart)


class LoopTrackers:
    """The trackers that a loop has started, in place of `accelerator.init_trackers`; without it, those of the accelerator."""

    def __init__(self, accelerator: Any, lifecycle: AttemptLifecycle) -> None:
        self._accelerator, self._lifecycle = accelerator, lifecycle
        self._started: list[_Tracker] | None = None
        self._told = False

    def start(
        self,
        project: str,
        config: dict[str, Any] | None,
        init_kwargs: dict[str, Any],
        step: int,
        apart: str | None,
    ) -> None:
        """Start each tracker of the accelerator, or go on with its run, on all ranks.

        Args:
            step: from which the training resumes.
            apart: why it must not go on in the tracker runs of the attempt before, if so.
        """
        accelerator, wanted = self._accelerator, list(self._accelerator.log_with)
        before, self._started = list(accelerator.trackers), []
        for one in wanted:
            name = one.name if isinstance(one, GeneralTracker) else str(one)
            tracker = _Tracker(name, accelerator, self._lifecycle)
            accelerator.log_with, accelerator.trackers = [one], []
            tracker.start(project, config, init_kwargs, step, apart)
            before += accelerator.trackers
            self._started.append(tracker)
        accelerator.log_with, accelerator.trackers = wanted, before
        if step and self._lifecycle.checkpointer.ranks.is_main:
            self._fill(step)
        self._lifecycle.flushes = [tracker.flush for tracker in self._started]

    def log(self, record: dict[str, float], step: int) -> None:
        """Send what was reported, on the main process."""
        if self._started is None:
            self._accelerator.log(record, step=step)
            self._tell_how_to_go_on()
            return
        for tracker in self._started:
            tracker.log(record, step)

    def _tell_how_to_go_on(self) -> None:
        known = [one.name for one in self._accelerator.trackers if one.name in tracker_services()]
        if known and not self._told:
            self._told = True
            logger.info(
                "Each start has a %s run of its own. With loop.init_trackers(…) in place of accelerator.init_trackers(…) all of them "
                "have one.",
                known[0],
            )

    def _fill(self, step: int) -> None:
        """Send what tracker runs lack of the steps so far, from the records of the run."""
        lacking = [tracker for tracker in self._started or () if tracker.lacks_before(step)]
        if not lacking:
            return
        try:
            logs = history_of(self._lifecycle.checkpointer.catalog).logs
        except CloudTrainError as error:
            logger.warning("Trackers do not get what they lack of the steps up to %d: %s", step, error)
            return
        for log in logs:
            if log["step"] <= step:
                record = {name: _number(value) for name, value in log.items() if name not in _OWN}
                for tracker in lacking:
                    tracker.log(
                        {name: value for name, value in record.items() if value is not None}, log["step"]
                    )


class _Tracker:
    """One tracker of an accelerator."""

    def __init__(self, name: str, accelerator: Any, lifecycle: AttemptLifecycle) -> None:
        self._name, self._accelerator, self._lifecycle = name, accelerator, lifecycle
        self._is_main = lifecycle.checkpointer.ranks.is_main
        self._service: TrackerService | None = tracker_services().get(name)
        self._content = TrackerContent()
        self._is_shared = False
        """Whether a different training reports to its run, too, so that what it lacks is not known."""
        self._guard = TrackerGuard(name)
        self._tracker: Any = None

    def start(
        self,
        project: str,
        config: dict[str, Any] | None,
        init_kwargs: dict[str, Any],
        step: int,
        apart: str | None,
    ) -> None:
        accelerator, service = self._accelerator, self._service
        with self._guard("did not start"):
            if service is None or not self._is_main:
                accelerator.init_trackers(project, config, init_kwargs)
                (self._tracker,) = accelerator.trackers
                return
            given = init_kwargs.get(self._name, {})
            start = self._start(service, project, given, step)
            begin = partial(self._begin, service, project, given, start)
            run = start_run(self._lifecycle.checkpointer.storage, service, start, begin, apart=apart)
            (self._tracker,) = accelerator.trackers
            self._lifecycle.tracker_pages[self._name] = page_of(service, run, self._guard)
            files = EventFiles.of(self._lifecycle.checkpointer.storage, service, run, self._guard)
            if files is not None:
                self._lifecycle.tracker_files[self._name] = files
            with self._guard("did not tell what it has"):
                content = content_of(self._lifecycle.checkpointer.storage, service, run, step)
                self._content, self._is_shared = content or TrackerContent(), content is None
            if config is not None and not (
                service.has_fixed_parameters and (self._is_shared or self._content.newest >= 0)
            ):
                with self._guard("did not take the configuration"):
                    self._tracker.store_init_configuration(config)
        if self._tracker is None:
            accelerator.trackers = []

    def _start(self, service: TrackerService, project: str, given: dict[str, Any], step: int) -> TrackerStart:
        folder, checkpointer = self._accelerator.logging_dir, self._lifecycle.checkpointer
        return TrackerStart(
            step,
            checkpointer.output_dir,
            checkpointer.storage.url.rpartition("/")[2] or "run",
            run_name=given.get("run_name"),
            chosen=given.get(service.id_argument),
            logging_dir=None if folder is None else Path(folder) / project,
        )

    def _begin(
        self,
        service: TrackerService,
        project: str,
        given: dict[str, Any],
        start: TrackerStart,
        run: TrackerRun,
    ) -> None:
        self._accelerator.trackers = []
        with service.patiently(service.environment(run.id)):
            arguments = {**service.arguments(run.id, start), **given}
            self._accelerator.init_trackers(project, None, {self._name: arguments})

    def lacks_before(self, step: int) -> bool:
        """Whether its run may lack something of the steps up to one."""
        return not self._is_shared and self._content.newest < step

    def log(self, record: dict[str, float], step: int) -> None:
        if self._tracker is None:
            return
        lacks = {name: value for name, value in record.items() if not self._content.has(name, step, value)}
        if lacks:
            with self._guard("failed"):
                self._tracker.log(lacks, step=step)

    def flush(self, seconds_left: float) -> None:
        """Send what waits: the process ends soon."""
        if self._service is not None and self._tracker is not None and self._is_main:
            self._guard.flush(self._service.flush, seconds_left)


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        return float(value) if value in NOT_FINITE else None
    return float(value) if isinstance(value, (int, float)) and not math.isinf(value) else None
