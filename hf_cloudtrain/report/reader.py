"""One run that is read again and again while a person looks at it: its heartbeat often, and in between what is new."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import decode_record
from hf_cloudtrain.checkpoints.paths import PROGRESS, STEPS
from hf_cloudtrain.checkpoints.run_deletion import DELETED
from hf_cloudtrain.errors import CloudTrainError, ManifestError, NoCheckpointError
from hf_cloudtrain.report.page import Report, shown
from hf_cloudtrain.runtime.values import number
from hf_cloudtrain.tracking.mirror import Mirror
from hf_cloudtrain.tracking.status import ALIVE, RunState, run_state

BEAT_SECONDS = 1.5
"""Between two reads of the heartbeat: a new step is seen within two seconds."""
OTHER_SECONDS = 3.0
"""Between two other requests. Both together are one request a second."""
LEAST_SKEW = 3.0
"""Seconds by which the clocks of two machines differ before it is taken into account: a heartbeat is read late, too."""
LIST_SECONDS = 6.0
"""Between two listings."""


class RunReader:
    """Reads a run from a mirror, and keeps the report up to date.

    Args:
        mirror: of the run.

    Example:
        >>> reader = RunReader(Mirror(storage))
        >>> while True:
        ...     time.sleep(reader.turn())
        ...     print(reader.state().step, reader.report.history.goodput)
    """

    def __init__(self, mirror: Mirror) -> None:
        self.mirror = mirror
        self.catalog = Catalog(mirror)
        self.report: Report | None = None
        """Of the last records that could be read."""
        self.gone: str | None = None
        """Why there is no run now, if so."""
        self.version = 0
        """Changes with the report, and with how the run stands."""
        self.skew = 0.0
        """Seconds by which the clock of the training machine is behind ours, as far as that is known."""
        self._last_other = self._last_list = -math.inf
        self._pending: list[str] = []
        self._has_new_beat = False
        self._told: RunState | None = None

    def turn(self) -> float:
        """Read everything the first time, and then the heartbeat and at most one record; seconds until the next turn."""
        if self.report is None:
            self.mirror.refresh()
            self.mirror.fetch_all(self.mirror.missing())
            self._last_list = time.monotonic()
            self._rebuild()
            return BEAT_SECONDS
        if self.state().state in (*ALIVE, "killed"):
            self._read_beat()
        if time.monotonic() - self._last_other >= OTHER_SECONDS:
            self._last_other = time.monotonic()
            self._read_other()
        told = dataclasses.replace(self.state(), heartbeat_age_seconds=None, uploading_seconds=None)
        if told != self._told:
            self._told, self.version = told, self.version + 1
            if told.state != self.report.state.state:
                self._rebuild()  # whether an attempt was killed is a question of time
        return BEAT_SECONDS

    def state(self) -> RunState:
        """How the run stands now; no request."""
        return run_state(self.catalog, time.time() - self.skew)

    def _read_beat(self) -> None:
        """Read the newest heartbeat. Only one that changes before our eyes tells how far the clock of its machine is off."""
        beats = [info.path for info in self.mirror.list(PROGRESS)]
        if not beats or not self.mirror.fetch(beats[-1]):
            return
        self._has_new_beat = True
        with contextlib.suppress(CloudTrainError):
            beat = number(decode_record(self.mirror.read(beats[-1]), "heartbeat").get("time"))
            skew = 0.0 if beat is None else time.time() - beat
            self.skew = skew if abs(skew) > LEAST_SKEW else 0.0

    def _read_other(self) -> None:
        """One request: the records of the steps, what a listing has shown, or a new listing."""
        steps = [info.path for info in self.mirror.list(STEPS)]
        if self._has_new_beat and steps:
            self._has_new_beat = False
            self._last_list = -math.inf  # the same heartbeat may tell of a new checkpoint
            if self.mirror.fetch(steps[-1]) and not self._pending:
                self._rebuild()
        elif self._pending:
            self.mirror.fetch(self._pending.pop())
            if not self._pending:
                self._rebuild()
        elif time.monotonic() - self._last_list >= LIST_SECONDS:
            self._last_list = time.monotonic()
            changed = self.mirror.refresh()
            self._pending = [path for path in self.mirror.missing() if not path.startswith(f"{PROGRESS}/")]
            if changed and not self._pending:
                self._rebuild()

    def _rebuild(self) -> None:
        self.version += 1
        try:
            self.report = Report(self.catalog, time.time() - self.skew)
            deleted = self.report.history.attempts[-1].facts.get(DELETED)
            self.gone = f"This run was deleted ({shown(deleted)})." if deleted else None
        except (NoCheckpointError, ManifestError) as error:
            self.gone = shown(error)
