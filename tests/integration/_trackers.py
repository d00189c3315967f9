"""A tracker service in a file, with a Trainer callback of its own, for trainings whose curves must go on."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from hf_cloudtrain import CloudTrainCallback
from hf_cloudtrain.checkpoints.paths import EVENTS
from hf_cloudtrain.integrations.trainer import reports
from hf_cloudtrain.tracking.services.service import (
    TrackerContent,
    TrackerService,
    TrackerStart,
    register_tracker,
)
from tests.integration import _attempts


class Notebook:
    """The service: a line for each value, and one for each run. `NOTEBOOK` is its file."""

    def __init__(self) -> None:
        self.path = Path(os.environ["NOTEBOOK"])

    def write(self, **line: Any) -> None:
        if os.environ.get("NOTEBOOK_DOWN"):
            raise ConnectionError(f"503 for token={os.environ['NOTEBOOK_TOKEN']}")
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def values(self, run: str | None = None) -> list[tuple[str, int, float]]:
        return [
            (line["name"], line["step"], line["value"])
            for line in self.lines()
            if "name" in line and run in (None, line["run"])
        ]


class NotebookCallback(TrainerCallback):
    """As those of transformers: it starts when training begins or at the first log, and knows its id from a variable."""

    def __init__(self) -> None:
        self.run: str | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.setup(state)

    def setup(self, state):
        if self.run is None:
            run = os.environ.get("NOTEBOOK_RUN_ID", "unknown")
            if any(line.get("deleted") == run for line in Notebook().lines()):
                raise ValueError(f"{run} was deleted")
            Notebook().write(run=run, begins=state.global_step)
            self.run = run

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.setup(state)
        for name, value in (logs or {}).items():
            Notebook().write(run=self.run, name=name, step=state.global_step, value=value)

    def on_train_end(self, args, state, control, **kwargs):
        Notebook().write(run=self.run, ends=state.global_step)
        self.run = None


class NotebookService(TrackerService):
    name = "notebook"
    trainer_callback = "NotebookCallback"
    ends_with_training = True

    def __init__(self, ids: list[str]) -> None:
        self._ids = iter(ids)

    def users_id(self, start: TrackerStart) -> str | None:
        return os.environ.get("NOTEBOOK_RUN_ID")

    def new_id(self, start: TrackerStart) -> str:
        return next(self._ids)

    def environment(self, tracker_id: str) -> dict[str, str]:
        return {"NOTEBOOK_RUN_ID": tracker_id}

    def is_lost(self, error: Exception) -> bool:
        return "deleted" in str(error)

    def sent(self, tracker_id: str) -> TrackerContent:
        steps: dict[str, int] = {}
        for name, step, _ in Notebook().values(tracker_id):
            steps[name] = max(step, steps.get(name, -1))
        return TrackerContent(steps)

    def metric(self, name: str) -> str:
        return name

    def page(self, tracker_id: str) -> str:
        return f"https://notebook.example/{tracker_id}"

    def follows(self, previous: str, reason: str) -> None:
        Notebook().write(run=previous, followed=reason)

    def flush(self) -> None:
        Notebook().write(flushed=True)


class NotebookTracker(GeneralTracker):
    """The same for Accelerate."""

    name = "notebook"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.run = ""

    @property
    def tracker(self) -> str:
        return self.run

    def start(self) -> None:
        self.run = os.environ.get("NOTEBOOK_RUN_ID", "unknown")
        Notebook().write(run=self.run, begins=0)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        Notebook().write(run=self.run, config=values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        for name, value in values.items():
            Notebook().write(run=self.run, name=name, step=step, value=value)


class BackAt(TrainerCallback):
    """The service answers again from a step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.environ.pop("NOTEBOOK_DOWN", None)


def train(
    *,
    ids: list[str] | None = None,
    added_later: bool = False,
    back_at: int | None = None,
    tested: bool = False,
    **arguments: Any,
) -> dict[str, Any]:
    """An attempt that reports to the notebook, as `_attempts.train`.

    Args:
        added_later: our callback joins by `add_callback`, after the Trainer is made.
        back_at: step at which a service that is down answers again.
        tested: the script evaluates once more after the training.
    """
    integration_utils.INTEGRATION_TO_CALLBACK["notebook"] = NotebookCallback
    register_tracker(NotebookService(ids or ["one"]))
    reports.RETRY_SECONDS = 0.0
    if back_at is not None:
        arguments["callbacks"] = [BackAt(back_at)]
    if added_later:
        arguments |= {"parts": "none", "prepare": partial(_add, arguments["run_url"])}
    if tested:
        arguments["prepare"] = _evaluate_after_training
    return _attempts.train(**{"report_to": "notebook", **arguments})


class Histograms(TrainerCallback):
    """What a script sends to Trainer's own writer; a kill has to wait until that of a save is stored."""

    def __init__(self, trainer: Any, run_url: str | None, committed: int) -> None:
        self.trainer, self.run_url, self.committed = trainer, run_url, committed

    def on_step_end(self, args, state, control, **kwargs):
        callbacks = self.trainer.callback_handler.callbacks
        writer = next(one.tb_writer for one in callbacks if hasattr(one, "tb_writer"))
        writer.add_histogram("weights", np.arange(9.0) * state.global_step, state.global_step)
        if 0 < self.committed < state.global_step:
            _attempts.wait_until(lambda: self.committed in histograms_in(Path(self.run_url, EVENTS)))


def histograms_in(folder: Path) -> list[int]:
    """The steps of all histograms in the event files below a folder, as TensorBoard shows them."""
    steps: list[int] = []
    for run in {path.parent for path in folder.rglob("events.out.tfevents.*")}:
        found = EventAccumulator(str(run), size_guidance={"histograms": 0})
        found.Reload()
        if "weights" in found.Tags()["histograms"]:
            steps += [event.step for event in found.Histograms("weights")]
    return steps


def train_with_histograms(*, run_url: str, committed: int = 0, **arguments: Any) -> dict[str, Any]:
    """An attempt that sends a histogram at each step."""

    def prepare(trainer: Any) -> None:
        trainer.add_callback(Histograms(trainer, run_url, committed))

    given = {"report_to": "tensorboard", "prepare": prepare, **arguments}
    return _attempts.train(run_url=run_url, committed=committed, **given)


def _add(run_url: str, trainer: Any) -> None:
    trainer.add_callback(CloudTrainCallback(run_url))


def _evaluate_after_training(trainer: Any) -> None:
    train = trainer.train

    def train_and_test(**arguments: Any) -> None:
        train(**arguments)
        trainer.evaluate(metric_key_prefix="test")

    trainer.train = train_and_test
