"""The sources of the pages about runs: the list, one run, several runs compared."""

from __future__ import annotations

import math
import shlex
import time
from pathlib import Path
from typing import Any

from hf_cloudtrain.checkpoints.attempts import run_listing
from hf_cloudtrain.errors import (
    ConfigurationError,
    NoCheckpointError,
)
from hf_cloudtrain.jobs.logs import last_lines
from hf_cloudtrain.report.card import facts
from hf_cloudtrain.report.comparison import Compared, comparison
from hf_cloudtrain.report.page import Report, shown, utc
from hf_cloudtrain.report.reader import RunReader
from hf_cloudtrain.report.row import Row
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.runtime.values import finite
from hf_cloudtrain.tracking.actions import newest_actions
from hf_cloudtrain.tracking.mirror import READERS, Mirror
from hf_cloudtrain.tracking.status import ALIVE
from hf_cloudtrain.ui.places import Places

RUNS_SECONDS = 5.0
"""Between two listings of all runs, and at most a twentieth of the time goes into them: one request a second if one takes 50 ms."""
NAMES_SECONDS = 0.05
"""Seconds to send what is known of new runs before more is read."""
JOB_SECONDS = 30.0
"""Seconds between two lookups of a run's job."""
COMPARE_SECONDS = 2.0
"""Between two runs of a comparison, each of which takes at most two requests."""
OVER_TURNS = 8
"""One in this many turns of a comparison reads a run that is not training."""
SMOOTHINGS = (0.0, 0.6, 0.9, 0.98)
MOST_LINES = 12
"""Of the log of its job that a run page shows."""


class RunsSource:
    """The list of runs: one listing of everything, the heartbeats of those that may be alive, and once who belongs together."""

    def __init__(self, places: Places) -> None:
        self.version = 0
        self._places = places
        self._rows: dict[str, Row] = {}
        self._records: dict[str, dict[str, Any]] = {}
        self._listed: dict[str, tuple[dict[str, int], int]] | None = None
        """By the last listing, until the heartbeats are read: the sizes of its records by run, and of all it stores."""

    def turn(self) -> float:
        """List everything and read the heartbeats that may have changed; or read to which experiments new runs belong.

        The first turn only lists, so that the names of a thousand runs are on the page before their states.
        """
        began, is_first = time.monotonic(), not self.version
        fresh = [row for row in self._rows.values() if row.is_read and row.experiment is None]
        if fresh:
            in_threads(Row.read_experiment, (fresh, READERS))
            self._publish()
            return RUNS_SECONDS
        listed = self._list() if self._listed is None else self._listed
        self._listed = listed if is_first else None
        if not is_first:
            in_threads(lambda run: self._rows[run].update(*listed[run]), (list(listed), READERS))
        self._publish()
        is_new = is_first or any(row.experiment is None for row in self._rows.values())
        return NAMES_SECONDS if is_new else max(RUNS_SECONDS, 20 * (time.monotonic() - began))

    def document(self, variant: str) -> dict[str, Any]:
        """The runs by id; after the first listing, only their names."""
        roots = [shown(root.url) for root in self._places.roots]
        return {"roots": roots, "runs": self._records, "loading": self.version == 1}

    def details(self, run_id: str) -> dict[str, Any]:
        """What takes the step records of a run: its loss curve, goodput and cost. Asked for the rows that a person sees."""
        row = self._rows.get(run_id)
        if row is None or not row.is_read:
            raise NoCheckpointError(f"There is no run {run_id[:200]!r} on this page.")
        return row.details()

    def _list(self) -> dict[str, tuple[dict[str, int], int]]:
        listed, rows = {}, {}
        for index, root in enumerate(self._places.roots):
            for name, run in run_listing(root).items():
                run_id = f"{index}/{name}"
                listed[run_id] = run
                rows[run_id] = self._rows.get(run_id) or Row(Mirror(root, name), shown(name or root.url, 200))
        self._rows = rows
        return listed

    def _publish(self) -> None:
        records = {run_id: {"id": run_id, **row.record} for run_id, row in self._rows.items()}
        if records != self._records or self.version < 2:
            self._records, self.version = records, self.version + 1


class RunSource:
    """One run: the report as it changes, how the run stands now, and the end of its job's log."""

    def __init__(self, places: Places, run_id: str) -> None:
        root, name = places.find(run_id)
        self.reader = RunReader(Mirror(root, name))
        self._places = places
        self._id = run_id
        self._job: tuple[str, Path] | None = None
        self._job_due = -math.inf
        self._log: list[str] = []
        self._logs = 0
        self._contents: dict[float, tuple[Report, dict[str, Any]]] = {}

    @property
    def version(self) -> int:
        """Of the run and the log together."""
        return self.reader.version + self._logs

    def turn(self) -> float:
        """Read what is due. The log is a file here, if it is shown: no request to the storage."""
        if time.monotonic() >= self._job_due:
            self._job_due = time.monotonic() + JOB_SECONDS
            job = self._places.job_of(self._id) or self._job
            self._logs += job != self._job
            self._job = job
        if self._job is not None:
            log = [shown(line, 400) for line in last_lines(self._job[1] / "node-0.log", MOST_LINES)]
            self._logs += log != self._log
            self._log = log
        return self.reader.turn()

    def document(self, variant: str) -> dict[str, Any]:
        """What the report has, and how the run stands now; `variant` is the smoothing of its curves."""
        reader, report, weight = self.reader, self.reader.report, smoothing(variant)
        if reader.gone is not None or report is None:
            return {"id": self._id, "gone": reader.gone or "It has no record yet."}
        known = self._contents.get(weight)
        if known is None or known[0] is not report:
            known = self._contents[weight] = report, report.content(weight)
        state, skew, url = reader.state(), reader.skew, shlex.quote(reader.mirror.url)
        pinned = report.roles.pinned
        live = {name: getattr(state, name) for name in ("attempt", "step", "total_steps")}
        differs = f"{abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} this one."
        clock = [f"The clock of the training machine is {differs}"] if skew else []
        noted = newest_actions(reader.mirror)
        actions = [shown(f"{utc(one[0])} UTC: {one[1]}", 300) if one else "damaged record" for one in noted]
        logs = {"Log, the last lines": self._log, "Actions from this page": actions}
        stalled = [f"The run looks stalled, {state.stalled}."] if state.stalled else []
        notes = [note for note in known[1]["notes"] if not note.startswith("The run looks stalled")]
        return {
            **known[1],
            "id": self._id,
            "facts": facts(state),
            "state": shown(state.state, 20),
            "live": finite({**live, "last_seen": state.last_seen and state.last_seen + skew}),
            "notes": [*stalled, *notes, *clock],
            "checkpoints": {  # how commands name each, its key, and whether it is pinned
                info.title: [f"{url} -c {shlex.quote(info.title)}", info.key, info.checkpoint_key in pinned]
                for info in report.found
                if info.manifest
            },
            "job": self._job and self._job[0],
            "logs": {title: lines for title, lines in logs.items() if lines},
        }


class CompareSource:
    """Several runs: each is read in its turn."""

    def __init__(self, places: Places, run_ids: list[str]) -> None:
        if not 1 <= len(run_ids) <= 12:
            raise ConfigurationError(f"{len(run_ids)} runs cannot be compared. Choose 2 to 12.")
        seconds = COMPARE_SECONDS * len(run_ids)
        self._readers = [RunReader(Mirror(*places.find(run_id)), seconds) for run_id in run_ids]
        self._turns = 0
        self._read_in: dict[RunReader, int] = {}

    @property
    def version(self) -> int:
        """Of all of them together."""
        return sum(reader.version for reader in self._readers)

    def turn(self) -> float:
        """Read the run that was not read for the longest time, mostly of those that train; the first time all of them."""
        if not self._turns:
            for reader in self._readers:
                reader.turn()
        self._turns += 1
        alive = [reader for reader in self._readers if reader.report and reader.state().state in ALIVE]
        others = [reader for reader in self._readers if reader not in alive]
        group = others if not alive or (others and self._turns % OVER_TURNS == 0) else alive
        reader = min(group, key=lambda one: self._read_in.get(one, 0))
        self._read_in[reader] = self._turns
        reader.turn()
        return COMPARE_SECONDS

    def document(self, variant: str) -> dict[str, Any]:
        """Charts with a curve for each run, and tables with a column for each."""
        found = [(reader.mirror.url, reader.report) for reader in self._readers]
        gone = [f"{shown(reader.mirror.url)}: {reader.gone}" for reader in self._readers if reader.gone]
        compared = [Compared(url, report) for url, report in found if report]
        return {**comparison(compared, smoothing(variant)), "notes": gone}


def smoothing(variant: str) -> float:
    """The weight that a browser asks for; 0 for any that the page does not offer."""
    return float(variant) if variant in map(str, SMOOTHINGS) else 0.0
