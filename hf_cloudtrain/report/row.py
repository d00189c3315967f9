"""One run in the list: its state from the heartbeat and, on request, what needs its step records."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.paths import PROGRESS
from hf_cloudtrain.errors import CloudTrainError, StorageUnavailableError
from hf_cloudtrain.report.page import shown
from hf_cloudtrain.report.reader import ClockSkew
from hf_cloudtrain.report.sparkline import sparkline
from hf_cloudtrain.report.summary import read_infos
from hf_cloudtrain.runtime.text import size_text
from hf_cloudtrain.runtime.values import finite, metric
from hf_cloudtrain.tracking.history import history_of
from hf_cloudtrain.tracking.mirror import Mirror
from hf_cloudtrain.tracking.status import ALIVE, RunState, run_state

RECENT_SECONDS = 3600.0
"""Seconds for which the heartbeat of a killed run is read again."""
LISTED = ("step", "total_steps", "eta_seconds", "loss", "attempts", "checkpoints", "stalled")


class Row:
    """One run of the list.

    Args:
        mirror: of the run.
        name: what the list calls it.

    Example:
        >>> row = Row(Mirror(root, "mrpc"), "mrpc")
        >>> row.update(sizes, size)["state"], row.details()["goodput"]
    """

    def __init__(self, mirror: Mirror, name: str) -> None:
        self.experiment: str | None = None
        """The group that the run belongs to; None before it was read."""
        self._mirror = mirror
        self._name = name
        self._clock = ClockSkew()
        self._record: dict[str, Any] = {}
        self._details: tuple[dict[str, Any], dict[str, Any]] | None = None

    @property
    def is_read(self) -> bool:
        """Whether more than its name is known."""
        return bool(self._record)

    @property
    def record(self) -> dict[str, Any]:
        """What is known of the run without its step records."""
        return {"name": self._name, **self._record, "experiment": self.experiment or ""}

    def update(self, sizes: Mapping[str, int], size: int) -> None:
        """Read its newest heartbeat, if it may have changed since the last listing.

        Args:
            sizes: of its records, by the new listing; `size`: of all that it stores, in bytes.

        Raises:
            StorageUnavailableError: the storage does not answer; any other error is shown in the row.
        """
        if not self._mirror.update(sizes) and not self._may_change():
            return
        beats = sorted(path for path in sizes if path.startswith(f"{PROGRESS}/"))
        found: dict[str, Any] = {}
        try:
            if beats:
                self._mirror.fetch(beats[-1])
                self._clock.look(self._mirror, beats[-1])
            now = run_state(Catalog(self._mirror), time.time() - self._clock.seconds)
        except StorageUnavailableError:
            raise
        except (CloudTrainError, OSError) as error:
            now, found["damaged"] = RunState(self._mirror.url, "damaged"), shown(error)
        saved = CheckpointKey.named(str(now.last_committed))
        found |= {"state": shown(now.state, 20), "size": size, "size_text": size_text(size)}
        found |= {"safe_step": saved and saved.step, **{name: getattr(now, name) for name in LISTED}}
        found["last_seen"] = now.last_seen and now.last_seen + self._clock.seconds
        self._record = finite(found)

    def _may_change(self) -> bool:
        """Whether a heartbeat of the same size may tell more: a run that looks killed may have a clock that is behind ours."""
        state, seen = self._record.get("state"), self._record.get("last_seen") or 0.0
        is_fresh = state == "killed" and time.time() - seen < RECENT_SECONDS
        return state in (None, *ALIVE, "damaged") or is_fresh

    def read_experiment(self) -> None:
        """Read to which group it belongs. Raises StorageUnavailableError."""
        try:
            facts = Catalog(self._mirror).attempts.run_facts() or {}
        except StorageUnavailableError:
            raise
        except (CloudTrainError, OSError):
            facts = {}
        self.experiment = shown(facts.get("experiment") or "", 60)

    def details(self) -> dict[str, Any]:
        """Its loss curve, goodput, cost, and when its newest checkpoint was saved: this takes its step records."""
        record = self.record
        if self._details is None or self._details[0] != record:
            self._details = record, self._read_details()
            if record["state"] not in ALIVE:
                self._mirror.forget()
        return self._details[1]

    def _read_details(self) -> dict[str, Any]:
        self._mirror.fetch_all(self._mirror.missing())
        catalog = Catalog(self._mirror)
        history = history_of(catalog, time.time() - self._clock.seconds)
        newest = read_infos(catalog, catalog.checkpoints()[-1:])
        losses = [(log["step"], metric(log.get("loss"))) for log in history.logs]
        return {
            "curve": sparkline([(step, loss) for step, loss in losses if loss is not None]),
            "goodput": history.goodput,
            "is_goodput_bound": history.is_goodput_bound,
            "cost": history.cost,
            "is_cost_bound": history.is_cost_bound,
            "safe_time": newest[0].manifest.created if newest and newest[0].manifest else None,
        }
