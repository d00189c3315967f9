"""Where runs are, and the sources of the pages that show them: the list, one run, several runs compared."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, decode_record
from hf_cloudtrain.checkpoints.paths import ACTIONS, PROGRESS, RUN, STEPS
from hf_cloudtrain.checkpoints.run_deletion import DELETED
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError, ManifestError, NoCheckpointError
from hf_cloudtrain.jobs.logs import last_lines
from hf_cloudtrain.report.comparison import Compared, comparison
from hf_cloudtrain.report.page import Report, shown
from hf_cloudtrain.report.sparkline import sparkline
from hf_cloudtrain.runtime.text import clean
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.runtime.values import finite, metric, number
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.names import META
from hf_cloudtrain.tracking.history import history_of
from hf_cloudtrain.tracking.status import ALIVE, RunState, run_state
from hf_cloudtrain.ui.mirror import READERS, Mirror
from hf_cloudtrain.ui.places import Places

BEAT_SECONDS = 1.5
"""Between two reads of the heartbeat: a new step is on the page within two seconds."""
OTHER_SECONDS = 3.0
"""Between two other requests of a run page. Both together are one request a second."""
LEAST_SKEW = 3.0
"""Seconds by which the clocks of two machines differ before it is taken into account: a heartbeat is read late, too."""
LIST_SECONDS = 6.0
"""Between two listings of a run."""
RUNS_SECONDS = 5.0
"""Between two listings of all runs, and at most a tenth of the time goes into them."""
SMOOTHINGS = (0.0, 0.6, 0.9, 0.98)
MOST_LINES = 12
"""Of the log of its job that a run page shows."""
MOST_DETAILS = 2_000
"""Runs of the list whose details are kept."""


class RunsSource:
    """The list of runs: one listing of everything, and the heartbeats of those that may be alive."""

    def __init__(self, places: Places) -> None:
        self.version = 0
        self._places = places
        self._mirrors: dict[str, Mirror] = {}
        self._records: dict[str, dict[str, Any]] = {}
        self._details: OrderedDict[str, tuple[object, dict[str, Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def turn(self) -> float:
        """List everything; read the heartbeats that may have changed."""
        began = time.monotonic()
        records: dict[str, dict[str, Any]] = {}
        for index, root in enumerate(self._places.roots):
            found = [(root, f"{index}/{name}", *of_run) for name, of_run in _runs_in(root).items()]
            (read,) = in_threads(lambda run: self._record(*run), (found, READERS))
            records |= {record["id"]: record for record in read}
        if records != self._records or not self.version:
            self._records, self.version = records, self.version + 1
        self._mirrors = {run_id: mirror for run_id, mirror in self._mirrors.items() if run_id in records}
        return max(RUNS_SECONDS, 10 * (time.monotonic() - began))

    def document(self, variant: str) -> dict[str, Any]:
        """The runs by id."""
        roots = [shown(root.url) for root in self._places.roots]
        return {"roots": roots, "runs": self._records}

    def details(self, run_id: str) -> dict[str, Any]:
        """What takes the step records of a run: its loss curve and goodput. Asked for the rows that a person sees."""
        root, name = self._places.find(run_id)
        record, known = self._records.get(run_id), self._details.get(run_id)
        if record is None:
            raise NoCheckpointError(f"There is no run {run_id[:200]!r} on this page.")
        if known is None or known[0] != record:
            known = (record, _details(Mirror(root, name)))
        with self._lock:
            self._details[run_id] = known
            while len(self._details) > MOST_DETAILS:
                self._details.popitem(last=False)
        return known[1]

    def _record(self, root: Storage, run_id: str, sizes: dict[str, int], size: int) -> dict[str, Any]:
        mirror, before = self._mirrors.get(run_id), self._records.get(run_id)
        if mirror is None:
            mirror = self._mirrors[run_id] = Mirror(root, run_id.partition("/")[2])
        changed = mirror.update(sizes)
        if before is not None and not changed and before["state"] not in ALIVE:
            return before
        beats = sorted(path for path in sizes if path.startswith(f"{PROGRESS}/"))
        if beats:
            mirror.fetch(beats[-1])
        record: dict[str, Any] = {"id": run_id, "name": shown(run_id.partition("/")[2] or mirror.url, 200)}
        try:
            now = run_state(Catalog(mirror))
        except CloudTrainError as error:
            now, record["damaged"] = RunState(mirror.url, "damaged"), shown(error)
        kept = (
            "step",
            "total_steps",
            "eta_seconds",
            "loss",
            "attempts",
            "checkpoints",
            "last_seen",
            "stalled",
        )
        saved = CheckpointKey.named(str(now.last_committed))
        record |= {"state": shown(now.state, 20), "size": size, "safe_step": saved and saved.step}
        return finite(record | {name: getattr(now, name) for name in kept})  # type: ignore[no-any-return]


def _runs_in(root: Storage) -> dict[str, tuple[dict[str, int], int]]:
    """The runs below a storage by name, each with the sizes of its records and of all that it stores; "" is the storage itself."""
    found: dict[str, tuple[dict[str, int], int]] = {}
    objects, suffix = root.list(""), f"/{RUN}"
    names = {f"/{info.path}"[: -len(suffix)] for info in objects if f"/{info.path}".endswith(suffix)}
    records: dict[str, dict[str, int]] = {name: {} for name in names}
    sizes = dict.fromkeys(names, 0)
    for info in objects:
        path = f"/{info.path}"
        above, is_record, below = path.partition(f"/{META}/")
        if is_record and above in records:
            records[above][f"{META}/{below}"] = info.size
        while above and above not in sizes:
            above = above.rpartition("/")[0]
        if above in sizes:
            sizes[above] += info.size
    for name in sorted(names):
        found[name[1:]] = records[name], sizes[name]
    return found


def _details(mirror: Mirror) -> dict[str, Any]:
    mirror.refresh()
    mirror.fetch_all(mirror.missing())
    catalog = Catalog(mirror)
    history = history_of(catalog)
    newest = catalog.newest()
    losses = [(log["step"], metric(log.get("loss"))) for log in history.logs]
    return {
        "curve": sparkline([(step, loss) for step, loss in losses if loss is not None]),
        "goodput": history.goodput,
        "safe_time": None if newest is None else catalog.read(newest).created,
    }


class RunSource:
    """One run: its heartbeat every 1.5 seconds, and in between what a listing shows as new."""

    def __init__(self, places: Places, run_id: str) -> None:
        root, name = places.find(run_id)
        self.version = 0
        self._places = places
        self._job: tuple[str, Path] | None = None
        self._tail: list[str] = []
        self.mirror = Mirror(root, name)
        self.report: Report | None = None
        self._id = run_id
        self._gone: str | None = None
        self._skew = 0.0
        self._last_other = self._last_list = -math.inf
        self._pending: list[str] = []
        self._contents: dict[str, dict[str, Any]] = {}
        self._has_new_beat = False
        self._told: RunState | None = None

    @property
    def now(self) -> float:
        """The time of the training machine."""
        return time.time() - self._skew

    def turn(self) -> float:
        """Read everything the first time, and then the heartbeat and at most one record."""
        self._read_log()
        if self.report is None:
            self._job = self._places.job_of(self._id)
            self.mirror.refresh()
            self.mirror.fetch_all(self.mirror.missing())
            self._last_list = time.monotonic()
            self._rebuild()
            return BEAT_SECONDS
        if self._state().state in (*ALIVE, "killed"):
            self._read_beat()
        if time.monotonic() - self._last_other >= OTHER_SECONDS:
            self._last_other = time.monotonic()
            self._read_other()
        told = dataclasses.replace(self._state(), heartbeat_age_seconds=None, uploading_seconds=None)
        if told != self._told:
            self._told, self.version = told, self.version + 1
            if told.state != self.report.state.state:
                self._rebuild()  # whether an attempt was killed is a question of time
        return BEAT_SECONDS

    def document(self, variant: str) -> dict[str, Any]:
        """What the report has, and how the run stands now; `variant` is the smoothing of its curves."""
        if self._gone is not None or self.report is None:
            return {"id": self._id, "gone": self._gone or "It has no record yet."}
        if variant not in self._contents:
            smoothing = float(variant) if variant in map(str, SMOOTHINGS) else 0.0
            self._contents[variant] = self._content(self.report, smoothing)
        state = self._state()
        live = {
            name: shown(value, 200) if isinstance(value, str) else value
            for name, value in vars(state).items()
        }
        for age in ("heartbeat_age_seconds", "uploading_seconds"):
            del live[age]  # it would change with each look; the page counts by the clock of this machine
        live["last_seen"] = state.last_seen and state.last_seen + self._skew
        known = self._contents[variant]
        notes = [*known["notes"], *self._clock_notes()]
        return {
            "id": self._id,
            **known,
            "notes": notes,
            "job": self._job and self._job[0],
            "log": self._tail,
            "live": finite(live),
            "state": shown(state.state, 20),
        }

    def _clock_notes(self) -> list[str]:
        if not self._skew:
            return []
        side = "behind" if self._skew > 0 else "ahead of"
        return [f"The clock of the training machine is {abs(self._skew):.0f} s {side} this one."]

    def _read_log(self) -> None:
        """The last lines of its job, where they are on this machine: no request to the storage."""
        if self._job is not None:
            lines = last_lines(self._job[1] / "node-0.log", MOST_LINES)
            tail = [shown(line, 400) for line in lines]
            self.version += tail != self._tail
            self._tail = tail

    def _state(self) -> RunState:
        return run_state(Catalog(self.mirror), self.now)

    def _read_beat(self) -> None:
        """Read the newest heartbeat. Only one that changes before our eyes tells how far the clock of its machine is off."""
        beats = [info.path for info in self.mirror.list(PROGRESS)]
        if not beats or not self.mirror.fetch(beats[-1]):
            return
        self._has_new_beat = True
        with contextlib.suppress(CloudTrainError):
            beat = number(decode_record(self.mirror.read(beats[-1]), "heartbeat").get("time"))
            skew = 0.0 if beat is None else time.time() - beat
            self._skew = skew if abs(skew) > LEAST_SKEW else 0.0

    def _read_other(self) -> None:
        """One request: the records of the steps, what a listing has shown, or a new listing."""
        steps = [info.path for info in self.mirror.list(STEPS)]
        if self._has_new_beat and steps:
            self._has_new_beat = False
            self._last_list = -math.inf  # the same heartbeat may tell of a new checkpoint
            if self.mirror.fetch(steps[-1]) and not self._pending:
                self._rebuild()
            return
        if self._pending:
            self.mirror.fetch(self._pending.pop())
            if not self._pending:
                self._rebuild()
            return
        if time.monotonic() - self._last_list >= LIST_SECONDS:
            self._last_list = time.monotonic()
            changed = self.mirror.refresh()
            self._pending = [path for path in self.mirror.missing() if not path.startswith(f"{PROGRESS}/")]
            if changed and not self._pending:
                self._rebuild()

    def _rebuild(self) -> None:
        self.version += 1
        self._contents = {}
        try:
            self.report = Report(Catalog(self.mirror), self.now)
            deleted = self.report.history.attempts[-1].facts.get(DELETED)
            self._gone = f"This run was deleted ({shown(deleted)})." if deleted else None
        except (NoCheckpointError, ManifestError) as error:
            self._gone = shown(error)

    def _content(self, report: Report, smoothing: float) -> dict[str, Any]:
        content = report.content(smoothing)
        url = self.mirror.url
        content["commands"] = {
            info.title: [
                f"cloudtrain checkpoint {verb} {shlex.quote(url)} {folder}-c {shlex.quote(info.title)}"
                for verb, folder in (("download", "out "), ("verify", ""), ("pin", ""), ("view", ""))
            ]
            for info in report.found
            if info.manifest is not None
        }
        content["keys"] = {info.title: info.key for info in report.found}
        content["pinned"] = [
            info.title for info in report.found if info.checkpoint_key in report.roles.pinned
        ]
        content["host"] = report.history.attempts[-1].progress.get("host")
        content["host"] = {
            shown(name, 40): value
            for name, value in (content["host"] if isinstance(content["host"], dict) else {}).items()
            if number(value) is not None
        }
        content["actions"] = [self._action(info.path) for info in self.mirror.list(ACTIONS)[-20:]][::-1]
        return content

    def _action(self, path: str) -> str:
        try:
            record = decode_record(self.mirror.read(path), "record of an action")
        except CloudTrainError:
            return "damaged record"
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(number(record.get("time")) or 0.0))
        return shown(f"{moment} UTC: {clean(record.get('action'))}, by {clean(record.get('user'))}", 300)


class CompareSource:
    """Several runs: each is read in its turn."""

    def __init__(self, places: Places, run_ids: list[str]) -> None:
        if not 1 <= len(run_ids) <= 12:
            raise ConfigurationError(f"{len(run_ids)} runs cannot be compared. Choose 2 to 12.")
        self._sources = [RunSource(places, run_id) for run_id in run_ids]
        self._turn = 0

    @property
    def version(self) -> int:
        """Of all of them together."""
        return sum(source.version for source in self._sources)

    def turn(self) -> float:
        """Read one of the runs."""
        for source in self._sources:  # the first time all of them
            if source.report is None:
                source.turn()
        self._turn += 1
        self._sources[self._turn % len(self._sources)].turn()
        return BEAT_SECONDS

    def document(self, variant: str) -> dict[str, Any]:
        """Charts with a curve for each run, and tables with a column for each."""
        smoothing = float(variant) if variant in map(str, SMOOTHINGS) else 0.0
        runs = [
            Compared(source.mirror.url, source.report)
            for source in self._sources
            if source.report is not None
        ]
        return comparison(runs, smoothing)
