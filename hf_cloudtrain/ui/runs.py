"""The sources of the pages about runs: the list, one run, several runs compared."""

from __future__ import annotations

import itertools
import shlex
import time
from pathlib import Path
from typing import Any

from hf_cloudtrain.checkpoints.attempts import run_listing
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, decode_record
from hf_cloudtrain.checkpoints.paths import ACTIONS, PROGRESS
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError, ManifestError, NoCheckpointError
from hf_cloudtrain.jobs.logs import last_lines
from hf_cloudtrain.report.card import facts
from hf_cloudtrain.report.comparison import Compared, comparison
from hf_cloudtrain.report.page import Report, shown, utc
from hf_cloudtrain.report.reader import RunReader
from hf_cloudtrain.report.sparkline import sparkline
from hf_cloudtrain.runtime.text import clean, size_text
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.runtime.values import finite, metric, number
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.tracking.history import history_of
from hf_cloudtrain.tracking.mirror import READERS, Mirror
from hf_cloudtrain.tracking.status import ALIVE, RunState, run_state
from hf_cloudtrain.ui.places import Places

RUNS_SECONDS = 5.0
"""Between two listings of all runs, and at most a twentieth of the time goes into them: one request a second if one takes 50 ms."""
COMPARE_SECONDS = 2.0
"""Between two runs of a comparison, each of which takes at most two requests."""
SMOOTHINGS = (0.0, 0.6, 0.9, 0.98)
MOST_LINES = 12
"""Of the log of its job that a run page shows."""
LISTED = ("step", "total_steps", "eta_seconds", "loss", "attempts", "checkpoints", "last_seen", "stalled")


class RunsSource:
    """The list of runs: one listing of everything, the heartbeats of those that may be alive, and once who belongs together."""

    def __init__(self, places: Places) -> None:
        self.version = 0
        self._places = places
        self._mirrors: dict[str, Mirror] = {}
        self._records: dict[str, dict[str, Any]] = {}
        self._experiments: dict[str, str] = {}
        self._details: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}

    def turn(self) -> float:
        """List everything and read the heartbeats that may have changed; or read to which experiments new runs belong."""
        began = time.monotonic()
        fresh = [run_id for run_id in self._records if run_id not in self._experiments]
        if fresh:
            (found,) = in_threads(self._experiment, (fresh, READERS))
            self._experiments |= dict(zip(fresh, found, strict=True))
            self._records = {
                name: {**run, "experiment": self._experiments[name]} for name, run in self._records.items()
            }
            self.version += any(found)
            return RUNS_SECONDS
        records: dict[str, dict[str, Any]] = {}
        for index, root in enumerate(self._places.roots):
            runs = [(root, f"{index}/{name}", *of_run) for name, of_run in run_listing(root).items()]
            (read,) = in_threads(lambda run: self._record(*run), (runs, READERS))
            records |= {record["id"]: record for record in read}
        if records != self._records or not self.version:
            self._records, self.version = records, self.version + 1
        for known in (self._mirrors, self._experiments, self._details):
            for run_id in known.keys() - records.keys():
                known.pop(run_id)
        is_new = len(self._experiments) < len(records)
        return 0.0 if is_new else max(RUNS_SECONDS, 20 * (time.monotonic() - began))

    def document(self, variant: str) -> dict[str, Any]:
        """The runs by id."""
        roots = [shown(root.url) for root in self._places.roots]
        return {"roots": roots, "runs": self._records}

    def details(self, run_id: str) -> dict[str, Any]:
        """What takes the step records of a run: its loss curve, goodput and cost. Asked for the rows that a person sees."""
        record, known = self._records.get(run_id), self._details.get(run_id)
        if record is None:
            raise NoCheckpointError(f"There is no run {run_id[:200]!r} on this page.")
        if known is None or known[0] != record:
            mirror = self._mirrors[run_id]
            known = self._details[run_id] = record, _details(mirror)
            if record["state"] not in ALIVE:
                mirror.forget()
        return known[1]

    def _record(self, root: Storage, run_id: str, sizes: dict[str, int], size: int) -> dict[str, Any]:
        mirror, before = self._mirrors.get(run_id), self._records.get(run_id)
        if mirror is None:
            mirror = self._mirrors[run_id] = Mirror(root, run_id.partition("/")[2])
        changed = mirror.update(sizes)
        told = {"experiment": self._experiments.get(run_id, "")}
        if before is not None and not changed and before["state"] not in ALIVE:
            return before | told
        beats = sorted(path for path in sizes if path.startswith(f"{PROGRESS}/"))
        if beats:
            mirror.fetch(beats[-1])
        record: dict[str, Any] = {"id": run_id, "name": shown(run_id.partition("/")[2] or mirror.url, 200)}
        try:
            now = run_state(Catalog(mirror))
        except CloudTrainError as error:
            now, record["damaged"] = RunState(mirror.url, "damaged"), shown(error)
        saved = CheckpointKey.named(str(now.last_committed))
        record |= {"state": shown(now.state, 20), "size": size, "size_text": size_text(size), **told}
        record["safe_step"] = saved and saved.step
        return finite(record | {name: getattr(now, name) for name in LISTED})  # type: ignore[no-any-return]

    def _experiment(self, run_id: str) -> str:
        try:
            facts = Catalog(self._mirrors[run_id]).attempts.run_facts() or {}
        except (ManifestError, NoCheckpointError, FileNotFoundError, PermissionError):
            return ""  # after any other error a later turn reads it again
        return shown(facts.get("experiment") or "", 60)


def _details(mirror: Mirror) -> dict[str, Any]:
    mirror.fetch_all(mirror.missing())
    catalog = Catalog(mirror)
    history, newest = history_of(catalog), catalog.newest()
    losses = [(log["step"], metric(log.get("loss"))) for log in history.logs]
    return {
        "curve": sparkline([(step, loss) for step, loss in losses if loss is not None]),
        "goodput": history.goodput,
        "cost": history.cost,
        "safe_time": None if newest is None else catalog.read(newest).created,
    }


class RunSource:
    """One run: the report as it changes, how the run stands now, and the end of its job's log."""

    def __init__(self, places: Places, run_id: str) -> None:
        root, name = places.find(run_id)
        self.reader = RunReader(Mirror(root, name))
        self._places = places
        self._id = run_id
        self._job: tuple[str, Path] | None = None
        self._log: list[str] = []
        self._logs = 0
        self._contents: dict[float, tuple[Report, dict[str, Any]]] = {}

    @property
    def version(self) -> int:
        """Of the run and the log together."""
        return self.reader.version + self._logs

    def turn(self) -> float:
        """Read what is due. The log is a file here, if it is shown: no request to the storage."""
        if self.reader.report is None:
            self._job = self._places.job_of(self._id)
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
        actions = [self._action(info.path) for info in reader.mirror.list(ACTIONS)[-20:]][::-1]
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

    def _action(self, path: str) -> str:
        try:
            record = decode_record(self.reader.mirror.read(path), "record of an action")
        except CloudTrainError:
            return "damaged record"
        moment = utc(number(record.get("time")) or 0.0)
        return shown(f"{moment} UTC: {clean(record.get('action'))}, by {clean(record.get('user'))}", 300)


class CompareSource:
    """Several runs: each is read in its turn."""

    def __init__(self, places: Places, run_ids: list[str]) -> None:
        if not 1 <= len(run_ids) <= 12:
            raise ConfigurationError(f"{len(run_ids)} runs cannot be compared. Choose 2 to 12.")
        self._readers = [RunReader(Mirror(*places.find(run_id))) for run_id in run_ids]
        self._next = itertools.cycle(self._readers)

    @property
    def version(self) -> int:
        """Of all of them together."""
        return sum(reader.version for reader in self._readers)

    def turn(self) -> float:
        """Read one of the runs; the first time all of them."""
        for reader in self._readers:
            if reader.report is None:
                reader.turn()
        next(self._next).turn()
        return COMPARE_SECONDS

    def document(self, variant: str) -> dict[str, Any]:
        """Charts with a curve for each run, and tables with a column for each."""
        found = [(reader.mirror.url, reader.report) for reader in self._readers]
        return comparison([Compared(url, report) for url, report in found if report], smoothing(variant))


def smoothing(variant: str) -> float:
    """The weight that a browser asks for; 0 for any that the page does not offer."""
    return float(variant) if variant in map(str, SMOOTHINGS) else 0.0
