"""The sources of the pages about the store: jobs, one job with its log, datasets."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from hf_cloudtrain.datasets.store import DatasetStore, key_of
from hf_cloudtrain.jobs.logs import last_lines
from hf_cloudtrain.jobs.records import JobRecord, JobStore, Start
from hf_cloudtrain.report.page import Table, shown, utc
from hf_cloudtrain.report.summary import read_infos
from hf_cloudtrain.runtime.text import count_text, duration_text, size_text
from hf_cloudtrain.runtime.values import number
from hf_cloudtrain.tracking.mirror import Mirror
from hf_cloudtrain.ui.places import Places

JOBS_SECONDS = 5.0
LOG_SECONDS = 1.0
DATASETS_SECONDS = 15.0
MOST_LINES = 400
MOST_JOBS = 500


class JobsSource:
    """The jobs of the store by their records, whatever engine runs them; no engine is asked."""

    def __init__(self, places: Places) -> None:
        self.version = 0
        self._places = places
        self._store = JobStore()
        self._store.storage = self._mirror = Mirror(self._store.storage, top="records")
        self._records: list[JobRecord] = []

    def turn(self) -> float:
        """List the records; read those that are new or not over."""
        self._mirror.refresh()
        self._mirror.fetch_all(f"records/{record.id}.json" for record in self._records if not record.is_over)
        records = self._store.records()
        if records != self._records or not self.version:
            self._records, self.version = records, self.version + 1
        return JOBS_SECONDS

    def document(self, variant: str) -> dict[str, Any]:
        """A row for each job, the newest first."""
        jobs = [job_row(record, self._places) for record in self._records[::-1][:MOST_JOBS]]
        return {"store": shown(self._store.url), "jobs": jobs}


class JobSource:
    """One job, and the last lines of its nodes where their files are on this machine."""

    def __init__(self, places: Places, job_id: str) -> None:
        self.version = 0
        self._places = places
        self._store = JobStore()
        self._record = self._store.read(job_id)
        # Not the home that the record names: it comes from storage, and would let it name any file here.
        self._log = self._store.home(self._record.id) / "log"
        self._lines: dict[str, list[str]] = {}
        self._seen: dict[Path, tuple[int, float]] = {}
        self._turns = 0

    def turn(self) -> float:
        """Look at the files, and every few seconds at the record."""
        if self._turns % 4 == 0:
            record = self._store.read(self._record.id)
            self.version += record != self._record
            self._record = record
        self._turns += 1
        for path in sorted(self._log.glob("*.log"))[:65]:
            stat = path.stat()
            if self._seen.get(path) != (stat.st_size, stat.st_mtime):
                self._seen[path] = stat.st_size, stat.st_mtime
                lines = self._lines.get(path.stem, [])
                self._lines[path.stem] = _joined(
                    lines, [shown(line, 1_000) for line in last_lines(path, MOST_LINES)]
                )
                self.version += 1
        self.version += self._turns == 1
        return LOG_SECONDS

    def document(self, variant: str) -> dict[str, Any]:
        """The record as facts and starts, and the lines of each node."""
        record = self._record
        host = record.submitted_by.get("host")
        reason = None if self._lines else "There is no log yet."
        if reason and host != platform.node():
            reason = f"The log is not on this machine. On {shown(host, 80)!r}, `cloudtrain job logs -f {record.id}` shows it."
        facts: dict[str, object] = {
            "state": record.state,
            "reason": record.reason,
            "engine": record.engine,
            "nodes": f"{record.nodes}, with {count_text(record.nproc_per_node, 'process')} each",
            "restarts": f"{record.restarts} of {record.max_restarts}",
            "experiment": record.experiment,
            "vm": record.vm,
            "created (UTC)": utc(number(record.created) or 0.0),
            "submitted by": f"{record.submitted_by.get('user')} on {record.submitted_by.get('host')}",
            "run": record.run_url,
        }
        rows = [[(name, ""), (shown(value), "text")] for name, value in facts.items() if value is not None]
        starts = [
            [
                (str(start.number), "number"),
                (utc(number(start.began) or 0.0), ""),
                (_took(start), ""),
                (shown(start.outcome or "running", 40), ""),
                (" ".join("lost" if code is None else str(code) for code in start.exit_codes), ""),
                (shown(start.reason or "", 300), "text"),
            ]
            for start in record.starts[-50:][::-1]
        ]
        heads = ("start", "began (UTC)", "took", "outcome", "exit codes", "reason")
        kinds = ("number", "", "", "", "", "text")
        tables = (
            [Table("Starts, the newest first", starts, list(zip(heads, kinds, strict=True)))]
            if starts
            else []
        )
        return {
            **job_row(record, self._places),
            "tables": [vars(table) for table in (Table("Job", rows), *tables)],
            "logs": dict(self._lines),
            "no_log": reason,
        }


class DatasetsSource:
    """The datasets of the store, each with its newest version."""

    def __init__(self) -> None:
        self.version = 0
        self._store = DatasetStore()
        self._table: dict[str, Any] = {}

    def turn(self) -> float:
        """Read the versions and the manifests of the newest."""
        known = {key_of(name, found[-1]): (name, found) for name, found in self._store.versions().items()}
        rows = []
        for info in read_infos(self._store.catalog, known):
            name, versions = known[info.key]
            manifest = info.manifest
            cells: list[object] = [name, versions[-1], len(versions)]
            cells += (
                [len(manifest.files), size_text(manifest.size), utc(manifest.created)]
                if manifest
                else ["", "damaged", ""]
            )
            kinds = ("mono", "number", "number", "number", "number", "")
            rows.append([(shown(cell, 200), kind) for cell, kind in zip(cells, kinds, strict=True)])
        heads = ("dataset", "version", "versions", "files", "size", "stored (UTC)")
        columns = list(zip(heads, ("", "number", "number", "number", "number", ""), strict=True))
        table = vars(Table(f"Datasets in {shown(self._store.url)}", rows, columns))
        if table != self._table:
            self._table, self.version = table, self.version + 1
        return DATASETS_SECONDS

    def document(self, variant: str) -> dict[str, Any]:
        """One table."""
        return {"tables": [self._table]}


def _took(start: Start) -> str:
    began, ended = number(start.began), number(start.ended)
    return "" if began is None or ended is None else duration_text(ended - began) or ""


def job_row(record: JobRecord, places: Places) -> dict[str, Any]:
    """What the list shows of a job."""
    return {
        "id": shown(record.id, 80),
        "state": shown(record.state, 20),
        "engine": shown(record.engine, 20),
        "experiment": record.experiment and shown(record.experiment, 60),
        "nodes": record.nodes,
        "processes": record.nodes * record.nproc_per_node,
        "starts": len(record.starts),
        "restarts": record.restarts,
        "created": number(record.created),
        "run_url": shown(record.run_url, 300),
        "run": places.id_of(record.run_url),
        "is_over": record.is_over,
    }


def _joined(before: list[str], now: list[str]) -> list[str]:
    """The lines known so far with the new ones, so that only new ones are sent; a window that moved on begins again."""
    for overlap in range(min(len(before), len(now)), 0, -1):
        if before[-overlap:] == now[:overlap]:
            joined = before + now[overlap:]
            return joined if len(joined) <= 4 * MOST_LINES else joined[-MOST_LINES:]
    return now
