"""The report callbacks of a Trainer (W&B, MLflow, trackio, TensorBoard) go on in one tracker run, and never end a training.

    on_train_begin   which tracker run? start it; what it lacks of the steps before is sent from the checkpoint's log
    on_log           what the tracker run has already, as of steps that are redone after a resume, is left out
    any of them      an error is logged once, and training goes on

The callbacks come before ours in Trainer's list, so their methods are wrapped, on the object and for rank 0 alone: their classes,
and callbacks of services that we do not know, stay as they are.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from transformers.trainer_callback import CallbackHandler

from hf_cloudtrain.storage.client import Storage
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

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

RETRY_SECONDS = 300.0
"""From a start that failed to the next try: the service may be back, and a try may hold up training for half a minute."""
LONGEST_RETRY = 12
"""So many times that, at most: the time doubles with each try."""
_EVENTS = (
    "on_train_begin",
    "on_log",
    "on_evaluate",
    "on_predict",
    "on_save",
    "on_train_end",
    "on_push_begin",
)
_WITH_EVERY_LOG = frozenset({"epoch", "num_input_tokens_seen"})
"""Beside the metrics; alone they are no log."""


class ReportedRun(Protocol):
    """What a report must know of the run: the session of its callbacks."""

    run_url: str
    tracker_pages: dict[str, str]
    """Where users find the tracker runs, by service; filled here."""
    tracker_files: dict[str, EventFiles]
    """Files of tracker runs that are part of the run, by service; filled here."""

    @property
    def tracker_storage(self) -> Storage:
        """Where the ids are kept."""

    @property
    def is_leaving(self) -> bool:
        """Whether the process ends after an emergency save."""

    def why_apart(self) -> str | None:
        """Why this attempt must not go on in the tracker run of the one before, if so."""

    def seconds_left(self) -> float:
        """Until the machine ends."""


def join_reports(run: ReportedRun, callbacks: list[Any]) -> None:
    """Let those of a Trainer's callbacks go on in one tracker run whose service is known."""
    services = {service.trainer_callback: service for service in tracker_services().values()}
    for callback in callbacks:
        report = getattr(callback.on_train_begin, "__self__", None)
        names = [kind.__name__ for kind in type(callback).__mro__]
        service = next((services[name] for name in names if name in services), None)
        if isinstance(report, Report):
            report.join(run)
        elif service is not None:
            Report(run, service, callback)


def find_reports(run: ReportedRun, args: TrainingArguments) -> None:
    """The same for a Trainer to which a callback of the run was added after it was made: no event says so."""
    if args.report_to:
        handlers = [found for found in gc.get_objects() if type(found) is CallbackHandler]
        for handler in handlers:
            parts = (getattr(callback, "_uploads", callback) for callback in handler.callbacks)
            if any(getattr(part, "_session", None) is run for part in parts):
                join_reports(run, handler.callbacks)


class Report:
    """One report callback, which goes on in the tracker run of `run`."""

    def __init__(self, run: ReportedRun, service: TrackerService, callback: Any) -> None:
        self.run = run
        self._service, self._callback = service, callback
        self._tracker_run: TrackerRun | None = None
        self._sent = TrackerContent()
        self._is_started = self._is_over = False
        """Whether its run is active; whether the training has ended it."""
        self._failed_at: float | None = None
        """When its start failed; it gets no events since then."""
        self._failures = 0
        """Starts that failed, one after the other."""
        self._guard = TrackerGuard(service.name)
        self._inner = {event: getattr(callback, event) for event in _EVENTS}
        for event in _EVENTS:
            setattr(callback, event, getattr(self, f"_{event}", partial(self._on_event, event)))

    def join(self, run: ReportedRun) -> None:
        """Report of a training that begins: the same callback may report of several runs, one after the other."""
        if run.run_url != self.run.run_url:
            self._tracker_run = None
        self.run = run

    def _on_train_begin(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        self._is_over = False
        self._start_and_fill(args, state, control, **live)

    def _start_and_fill(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        if not state.is_world_process_zero or state.is_hyper_param_search:
            self._inner["on_train_begin"](args, state, control, **live)
        elif self._start(args, state, control, live):
            self._sent = TrackerContent()
            with self._guard("did not tell what it has"):
                self._catch_up(args, state, control, live)

    def _on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **live: Any) -> None:
        if not state.is_world_process_zero or not isinstance(logs, dict):
            self._inner["on_log"](args, state, control, logs=logs, **live)
            return
        if self._failed_at is None:
            # An evaluation before or after the training belongs to the same tracker run.
            if self._is_started or self._start(args, state, control, live):
                self._send(args, state, control, logs, live)
        elif time.monotonic() - self._failed_at >= RETRY_SECONDS * min(
            2 ** (self._failures - 1), LONGEST_RETRY
        ):
            self._start_and_fill(args, state, control, **live)  # sends this log, too: the state has it
        if self._is_started and self._is_over:  # else the next training would report to this run
            with self._guard("did not end"):
                self._is_started = not self._service.end_again(self._callback)

    def _on_train_end(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        if not self.run.is_leaving or not self._is_started:
            self._on_event("on_train_end", args, state, control, **live)
            self._is_over = self._service.ends_with_training
            self._is_started = self._is_started and not self._is_over
            return
        self._guard.flush(self._service.flush, self.run.seconds_left())

    def _on_event(self, event: str, args: Any, state: Any, control: Any, **live: Any) -> None:
        if self._failed_at is None:
            with self._guard("failed"):
                self._inner[event](args, state, control, **live)

    def _start(self, args: Any, state: Any, control: Any, live: dict[str, Any]) -> bool:
        """Start the tracker run, or go on with it; whether that was possible."""
        self._is_started, self._failures = False, self._failures + 1
        with self._guard("did not start, and is tried again later"):
            folder = Path(str(args.output_dir)).absolute()
            named = self.run.run_url.rpartition("/")[2] or "run"
            start = TrackerStart(state.global_step, folder, named, args.run_name)
            begin = partial(self._begin, start, args, state, control, live)
            run, apart = self._tracker_run, self.run.why_apart()
            run = start_run(self.run.tracker_storage, self._service, start, begin, run=run, apart=apart)
            self._tracker_run = run
            self.run.tracker_pages[self._service.name] = page_of(self._service, run, self._guard)
            self._is_started, self._failures = True, 0
        self._failed_at = None if self._is_started else time.monotonic()
        return self._is_started

    def _begin(
        self, start: TrackerStart, args: Any, state: Any, control: Any, live: dict[str, Any], run: TrackerRun
    ) -> None:
        service, name = self._service, args.run_name
        if getattr(self._callback, "_initialized", False):
            self._callback._initialized = False  # its last start failed, or its run has ended
        try:
            with service.patiently(service.environment(run.id)):
                further = service.before_start(self._callback, args, run.id, start)
                with service.patiently(further):
                    self._inner["on_train_begin"](args, state, control, **live)
        finally:
            args.run_name = name

    def _catch_up(self, args: Any, state: Any, control: Any, live: dict[str, Any]) -> None:
        run = self._tracker_run
        assert run is not None, "it has started"
        files = EventFiles.of(self.run.tracker_storage, self._service, run, self._guard)
        if files is not None:
            self.run.tracker_files[self._service.name] = files
        content = content_of(self.run.tracker_storage, self._service, run, state.global_step)
        self._tracker_run = dataclasses.replace(run, is_new=False)  # what it holds from now on is of this run
        if content is not None:
            self._sent = content
            self._fill(args, state, control, live)

    def _fill(self, args: Any, state: Any, control: Any, live: dict[str, Any]) -> None:
        """Send what the tracker run lacks of the steps so far: what was on its way when a machine died, or all, if it is new."""
        past, count = copy.copy(state), 0
        for entry in list(state.log_history):
            past.global_step = entry.get("step", 0)
            logs = {name: value for name, value in entry.items() if name != "step"}
            count += self._send(args, past, control, logs, live)
        if count:
            logger.info(
                "The tracker %s lacked %d logs of earlier steps, and has them now.", self._service.name, count
            )

    def _send(self, args: Any, state: Any, control: Any, logs: dict[str, Any], live: dict[str, Any]) -> bool:
        """Send what the tracker run does not have of a log; whether there was something."""
        step, named = state.global_step, self._service.metric
        lacks = {name: value for name, value in logs.items() if not self._sent.has(named(name), step, value)}
        if lacks.keys() <= _WITH_EVERY_LOG and lacks != logs:
            return False
        with self._guard("failed"):
            self._inner["on_log"](args, state, control, logs=lacks, **live)
        return True
