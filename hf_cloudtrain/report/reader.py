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
OTHER_SECONDS = 3.5
"""Between two other requests. Both together, with the periodic lookup of the run's job, are one request a second."""
LEAST_SKEW = 3.0
"""Seconds by which the clocks of two machines differ before it is taken into account: a heartbeat is stored late, too."""
LIST_SECONDS = 6.0
"""Between two listings."""
MOST_DUE = 100
"""Most overdue requests that a page sends after it was hidden."""


class ClockSkew:
    """By how many seconds the clock of a training machine is behind ours, measured from a heartbeat that changes between two reads.

    Example:
        >>> clock = ClockSkew()
        >>> mirror.fetch(path)      # as often as one likes
        >>> clock.look(mirror, path)
        >>> run_state(catalog, time.time() - clock.seconds)
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        """0 while nothing is known, or the difference is too small to matter."""
        self._looked = 0.0
        self._beat: float | None = None

    def look(self, mirror: Mirror, path: str) -> None:
        """Take the time of a heartbeat that was just read."""
        beat = None
        with contextlib.suppress(CloudTrainError):
            beat = number(decode_record(mirror.read(path), "heartbeat").get("time"))
        gap, self._looked = time.monotonic() - self._looked, time.monotonic()
        before, self._beat = self._beat, beat
        if beat is None or before is None or beat == before:
            return
        # It was written at some time since the look before, so an age up to the gap does not indicate a clock difference.
        skew = time.time() - beat
        least, most = skew - gap - LEAST_SKEW, skew + LEAST_SKEW
        if not least <= 0 <= most:
            self.seconds = skew
        elif not least <= self.seconds <= most:
            self.seconds = 0.0


class RunReader:
    """Reads a run from a mirror, and keeps the report up to date.

    Args:
        mirror: of the run.
        other_seconds: seconds between two requests beside those for heartbeats; None: `OTHER_SECONDS`.

    Example:
        >>> reader = RunReader(Mirror(storage))
        >>> while True:
        ...     time.sleep(reader.turn())
        ...     print(reader.state().step, reader.report.history.goodput)
    """

    def __init__(self, mirror: Mirror, other_seconds: float | None = None) -> None:
        self.mirror = mirror
        self._other_seconds = other_seconds or OTHER_SECONDS
        self.catalog = Catalog(mirror)
        self.report: Report | None = None
        """Of the last records that could be read."""
        self.gone: str | None = None
        """Why there is no run now, if so."""
        self.version = 0
        """Changes with the report, and with how the run stands."""
        self._clock = ClockSkew()
        self._last_other = self._last_list = -math.inf
        self._pending: list[str] = []
        self._due = 0.0
        self._has_new_beat = False
        self._told: RunState | None = None

    def turn(self) -> float:
        """Read everything the first time, and then the heartbeat and at most one record; seconds until the next turn."""
        if self.report is None:
            self.mirror.refresh()
            self.mirror.fetch_all(self.mirror.missing())
            self._last_list = self._last_other = time.monotonic()
            for beat in self.mirror.list(PROGRESS)[-1:]:
                self._clock.look(self.mirror, beat.path)
            self._rebuild()
            return BEAT_SECONDS if self.report else OTHER_SECONDS
        if self.state().state in (*ALIVE, "killed"):
            self._read_beat()
        waited, self._last_other = time.monotonic() - self._last_other, time.monotonic()
        self._due = min(MOST_DUE, self._due + waited / self._other_seconds)
        if self._due >= 1:
            done = self._read_other(int(self._due))
            self._due = self._due - done if done else 1.0  # what is not needed now is not due later
        told = dataclasses.replace(self.state(), heartbeat_age_seconds=None, uploading_seconds=None)
        if told != self._told:
            self._told, self.version = told, self.version + 1
            if told.state != self.report.state.state:
                self._rebuild()  # whether an attempt was killed is a question of time
        return BEAT_SECONDS

    @property
    def skew(self) -> float:
        """Seconds by which the clock of the training machine is behind ours, as far as that is known."""
        return self._clock.seconds

    def state(self) -> RunState:
        """How the run stands now; no request."""
        return run_state(self.catalog, time.time() - self.skew)

    def _read_beat(self) -> None:
        for beat in self.mirror.list(PROGRESS)[-1:]:
            self._has_new_beat |= self.mirror.fetch(beat.path)
            self._clock.look(self.mirror, beat.path)

    def _read_other(self, most: int) -> int:
        """The records of the steps, or a new listing, or up to `most` records that it has shown; how many requests it took."""
        steps = [info.path for info in self.mirror.list(STEPS) if "rank" not in info.path]
        if self._has_new_beat and steps:
            self._has_new_beat = False
            self._last_list = -math.inf  # the same heartbeat may tell of a new checkpoint
            if self.mirror.fetch(steps[-1]) and not self._pending:
                self._rebuild()
            return 1
        if self._pending:
            reading, self._pending = self._pending[-most:], self._pending[:-most]
            self.mirror.fetch_all(reading)
            if not self._pending:  # before that, the report would read what is left, all at once
                self._rebuild()
            return len(reading)
        if time.monotonic() - self._last_list >= LIST_SECONDS:
            self._last_list = time.monotonic()
            changed = self.mirror.refresh()
            self._pending = [path for path in self.mirror.missing() if not path.startswith(f"{PROGRESS}/")]
            if changed and not self._pending:
                self._rebuild()
            return 1
        return 0

    def _rebuild(self) -> None:
        self.version += 1
        try:
            self.report = Report(self.catalog, time.time() - self.skew)
            deleted = self.report.history.attempts[-1].facts.get(DELETED)
            self.gone = f"This run was deleted ({shown(deleted)})." if deleted else None
        except (NoCheckpointError, ManifestError) as error:
            self.gone = shown(error)
