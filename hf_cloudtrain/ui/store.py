"""The sources of the pages about the store: jobs, one job with its log, datasets."""

from __future__ import annotations

import contextlib
import math
import platform
import subprocess
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_cloudtrain.datasets.store import DatasetStore, key_of
from hf_cloudtrain.errors import CloudTrainError
from hf_cloudtrain.jobs import lifecycle
from hf_cloudtrain.jobs.logs import joined_lines, last_lines
from hf_cloudtrain.jobs.records import JobRecord, JobStore, KnownJobs, job_columns, start_columns
from hf_cloudtrain.report.page import fact_table, record_table, shown, utc
from hf_cloudtrain.report.summary import read_infos
from hf_cloudtrain.runtime.text import count_text, size_text
from hf_cloudtrain.ui.places import Places, address

JOBS_SECONDS = 5.0
LOG_SECONDS, RECORD_SECONDS = 1.0, 4.0
"""Between two looks at the files of a job's log, and at its record."""
FAR = ("skypilot", "sagemaker")
"""Engines that keep the logs of a job themselves."""
FAR_SECONDS = 30.0
"""Between two questions to one of them: SkyPilot takes seconds to answer."""
DATASETS_SECONDS = 15.0
MOST_LINES, MOST_JOBS, MOST_URL = 400, 500, 2_000


class JobsSource:
    """The jobs of the store by their records, whatever engine runs them."""

    def __init__(self, places: Places) -> None:
        self.version = 0
        self._places = places
        self._store = KnownJobs()
        self._records: list[JobRecord] = []

    def turn(self) -> float:
        """List the records; read those that are new or not over. A job of this machine may have ended without a record."""
        mirror = self._store.mirror
        mirror.refresh()
        mirror.fetch_all(f"records/{record.id}.json" for record in self._records if not record.is_over)
        records = [_seen(self._store, job) if job.engine == "local" else job for job in self._store.records()]
        if records != self._records or not self.version:
            self._records, self.version = records, self.version + 1
        return JOBS_SECONDS

    def document(self, variant: str) -> dict[str, Any]:
        """A row for each job, the newest first; those of one experiment are together."""
        jobs = sorted(self._records[: -MOST_JOBS - 1 : -1], key=lambda job: job.experiment or "")
        columns = {**job_columns(utc), "run": lambda job: job.run_url}
        if not any(job.experiment for job in jobs):
            del columns["experiment"]
        text = "Times are in UTC." if jobs else "There is none. Start one with cloudtrain job run -f job.yml."
        table = record_table(f"Jobs in {shown(self._store.url)}", columns if jobs else {}, jobs, text)
        for row, job in zip(table.rows, jobs, strict=True):
            row[0] = (*row[0], address("job", job.id))
            run = self._places.id_of(job.run_url) if len(job.run_url) <= MOST_URL else None
            row[-1] = row[-1] if run is None else (*row[-1], address("run", run))
        return {"tables": [vars(table)]}


class JobSource:
    """One job, and the last lines of its nodes: from files on this machine, or from an engine that keeps them."""

    def __init__(self, places: Places, job_id: str) -> None:
        self.version = 0
        self._places = places
        self._store = JobStore()
        self._record = self._store.read(job_id)
        # Not the home that the record names: it comes from storage, and would let it name any file here.
        self._log = self._store.home(self._record.id) / "log"
        self._lines: dict[str, list[str]] = {}
        self._seen: dict[Path, tuple[int, float]] = {}
        self._no_log = "There is no log yet."
        self._looked = self._record, self._record
        """The stored record at the last look, and the record with its engine's state."""
        self._record_due = self._far_due = self._look_due = -math.inf

    def turn(self) -> float:
        """Look at the files, every few seconds at the record, and less often ask an engine."""
        now, is_first = time.monotonic(), not self.version
        if now >= self._record_due:
            self._record_due = now + RECORD_SECONDS
            stored = record = self._store.read(self._record.id)
            if stored.engine == "local" or (now >= self._look_due and not is_first):
                self._look_due = now + FAR_SECONDS
                with contextlib.suppress(CloudTrainError, OSError, subprocess.SubprocessError, LookupError):
                    self._looked = stored, _seen(self._store, stored)
            if stored == self._looked[0]:
                record = self._looked[1]
            self.version += record != self._record or not self.version
            self._record = record
        for path in sorted(self._log.glob("*.log"))[:65]:
            stat = path.stat()
            if self._seen.get(path) != (stat.st_size, stat.st_mtime):
                self._seen[path] = stat.st_size, stat.st_mtime
                self._note(path.stem, last_lines(path, MOST_LINES))
        has_far_log = self._record.engine in FAR and self._record.handle and not self._seen
        if has_far_log and now >= self._far_due and not is_first:  # the page has the record by then
            self._far_due = now + FAR_SECONDS
            try:
                lines = lifecycle.starter(self._record).lines(self._record, None, follow=False)
                self._note("log", deque(lines, MOST_LINES))
                self._far_due = math.inf if self._record.is_over else self._far_due
            except (CloudTrainError, OSError) as error:
                self._no_log, self.version = shown(error), self.version + 1
        return LOG_SECONDS

    def document(self, variant: str) -> dict[str, Any]:
        """The record as facts and starts, and the lines of each node."""
        record, by = self._record, self._record.submitted_by
        reason = None if self._lines else self._no_log
        if reason and record.engine not in FAR and by.get("host") != platform.node():
            reason = f"The log is not on this machine. On {shown(by.get('host'), 80)!r}, `cloudtrain job logs -f {record.id}` shows it."
        facts = {
            "reason": record.reason,
            "engine": record.engine,
            "nodes": f"{record.nodes}, with {count_text(record.nproc_per_node, 'process')} each",
            "restarts": f"{record.restarts} of {record.max_restarts}",
            "experiment": record.experiment,
            "vm": record.vm,
            "created (UTC)": utc(record.created),
            "submitted by": f"{by.get('user')} on {by.get('host')}",
            "run": record.run_url,
        }
        starts = record.starts[:-51:-1]
        columns, text = (start_columns(utc), "Times are in UTC.") if starts else ({}, "There is none yet.")
        table = record_table("Starts, the newest first", columns, starts, text, "reason")
        return {
            "id": shown(record.id, 80),
            "state": shown(record.state, 20),
            "is_over": record.is_over,
            "run": self._places.id_of(record.run_url) if len(record.run_url) <= MOST_URL else None,
            "tables": [vars(fact_table("Job", facts)), vars(table)],
            "logs": dict(self._lines),
            "no_log": reason,
        }

    def _note(self, name: str, lines: Iterable[str]) -> None:
        known = self._lines.get(name, [])
        self._lines[name] = joined_lines(known, [shown(line, 1_000) for line in lines], MOST_LINES)
        self.version += self._lines[name] != known


class DatasetsSource:
    """The datasets of the store, each with its newest version."""

    def __init__(self) -> None:
        self.version = 0
        self._store = DatasetStore()
        self._table: dict[str, Any] = {}

    def turn(self) -> float:
        """Read the versions and the manifests of the newest."""
        known = {key_of(name, found[-1]): (name, found) for name, found in self._store.versions().items()}
        columns = {
            "dataset": lambda info: known[info.key][0],
            ">version": lambda info: known[info.key][1][-1],
            ">versions": lambda info: len(known[info.key][1]),
            ">files": lambda info: info.manifest and len(info.manifest.files),
            ">size": lambda info: size_text(info.manifest.size) if info.manifest else "damaged",
            "stored (UTC)": lambda info: info.manifest and utc(info.manifest.created),
        }
        infos = read_infos(self._store.catalog, known)
        table = vars(record_table(f"Datasets in {shown(self._store.url)}", columns, infos))
        if table != self._table:
            self._table, self.version = table, self.version + 1
        return DATASETS_SECONDS

    def document(self, variant: str) -> dict[str, Any]:
        """One table."""
        return {"tables": [self._table]}


def _seen(store: JobStore, record: JobRecord) -> JobRecord:
    """A record with its engine's state. Of a lost job, its supervisor may have written the end since the record was read."""
    seen = lifecycle.glance(record)
    again = store.read(record.id) if seen.state == "lost" else record
    return again if again.is_over else seen
