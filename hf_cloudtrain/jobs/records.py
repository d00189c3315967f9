"""The record of each job on the user's store, which stays when an engine forgets the job.

    <store>/jobs/records/mnli-2.json    the record of the second job with the name mnli
    <store>/jobs/cancelled/mnli-2       the user has cancelled it
    <store>/jobs/deleted/mnli-2         the user has deleted it: no other job gets its id, and with it its run

and on the machine that submits the job its home: `<store>/jobs/mnli-2/` in a local store, or else a folder below
`~/.hf_cloudtrain/jobs/`:

    job.json      what its nodes run (submission.py)
    workspace/    a copy of the folder given with -d
    log/          node-0.log, node-1.log, … and supervisor.log
    nodes/0/      exit files and node files of node 0, one of each for a start
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.manifest import decode_record, encode_record
from hf_cloudtrain.errors import ManifestError, NoJobError
from hf_cloudtrain.runtime.provenance import person
from hf_cloudtrain.runtime.text import duration_text
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.urls import is_local, local_path, normal_url
from hf_cloudtrain.tracking.mirror import Mirror

State = Literal[
    "queued", "starting", "running", "stopping", "preempted", "lost", "finished", "failed", "cancelled"
]
"""`preempted`: saved and stopped, and not restarted automatically. `lost`: its supervisor has disappeared."""

OVER: frozenset[State] = frozenset(("preempted", "lost", "finished", "failed", "cancelled"))
"""States in which no process of a job runs or is queued."""
READERS = 16
"""Records that are read in parallel: a request to a cloud takes 30 ms or more, and a store may have hundreds."""

_ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}"
_Kinds = Mapping[str, type | tuple[type, ...]]
_KINDS: _Kinds = {
    **dict.fromkeys(("engine", "run_url", "home", "state"), str),
    **dict.fromkeys(("nodes", "nproc_per_node", "max_restarts", "restarts"), int),
    **dict.fromkeys(("submitted_by", "submitter", "handle"), dict),
    **dict.fromkeys(("experiment", "vm", "reason"), (str, type(None))),
    "created": (int, float),
}
"""Types of fields on which every list of jobs relies."""
_START_KINDS: _Kinds = {
    "number": int,
    "began": (int, float),
    "ended": (int, float, type(None)),
    **dict.fromkeys(("outcome", "reason"), (str, type(None))),
}
"""The same of each start."""


@dataclasses.dataclass(frozen=True)
class Start:
    """One start of a job's nodes."""

    number: int
    began: float
    """Seconds since 1970, like all times here."""
    ended: float | None = None
    outcome: str | None = None
    """As in the exit file: `finished`, `preempted`, `stopped`, `overtaken` or `failed`; None while it runs."""
    reason: str | None = None
    exit_codes: tuple[int | None, ...] = ()
    """Of the nodes: 0 finished, 75 saved and stopped, 1 failed, None lost. The reason has the exit code of the command."""


@dataclasses.dataclass(frozen=True)
class JobRecord:
    """One job, in its last known state."""

    id: str
    """Name and number, such as `mnli-2`."""
    name: str
    engine: str
    run_url: str
    home: str
    """Folder on the machine that submitted it."""
    nodes: int
    nproc_per_node: int
    max_restarts: int
    created: float
    experiment: str | None = None
    vm: str | None = None
    submitted_by: dict[str, str] = dataclasses.field(default_factory=dict)
    """User and host."""
    submitter: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The process that submits it (see `this_process`). If it dies before there is a handle, the job never starts."""
    state: State = "queued"
    reason: str | None = None
    updated: float = 0.0
    restarts: int = 0
    """Starts after a crash."""
    starts: tuple[Start, ...] = ()
    handle: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What identifies it to its engine, such as the number of a Slurm job."""

    @property
    def is_over(self) -> bool:
        """Whether no process of it runs or is queued."""
        return self.state in OVER

    @property
    def resume_hint(self) -> str:
        """A sentence with the command that resumes the job."""
        return f"Resume it with `cloudtrain job run --resume {self.id}`."


class JobStore:
    """The jobs of one store.

    Args:
        store: any URL or folder; None: `HF_CLOUDTRAIN_STORE`, or else a folder in the home folder.
    """

    def __init__(self, store: str | None = None) -> None:
        self.url = normal_url(env.store(store))
        self.storage = Storage(self.below("jobs"), env.storage_options(None))

    def below(self, *names: str) -> str:
        """URL of a path in the store."""
        return "/".join((self.url.removesuffix("/"), *names))

    def create(self, name: str, **facts: Any) -> JobRecord:
        """Make a record with the next number of a name.

        Args:
            facts: fields of `JobRecord`; the default of `run_url` is a URL below the store.
        """
        while True:
            job_id = self.next_id(name)
            facts["home"] = str(self.home(job_id))
            own = {**facts, "run_url": facts.get("run_url") or self.below("runs", job_id)}
            record = JobRecord(id=job_id, name=name, created=time.time(), submitted_by=person(), **own)
            if self.storage.create(_path(job_id), _encode(record)):
                return record

    def next_id(self, name: str) -> str:
        """The id of the next job with a name."""
        taken = (*self.ids(), *self.deleted_ids())
        numbers = [number for other, number in map(_split, taken) if other == name]
        return f"{name}-{max(numbers, default=0) + 1}"

    def ids(self) -> list[str]:
        """The ids of all jobs, by name and number."""
        paths = [info.path for info in self.storage.list("records")]
        return sorted((path[8:-5] for path in paths if path.endswith(".json")), key=_split)

    def deleted_ids(self) -> list[str]:
        """The ids of deleted jobs."""
        return [info.path.removeprefix("deleted/") for info in self.storage.list("deleted")]

    def records(self) -> list[JobRecord]:
        """All jobs whose record can be read, oldest first."""
        (found,) = in_threads(self._read_or_none, (self.ids(), READERS))
        return sorted((record for record in found if record is not None), key=lambda record: record.created)

    def _read_or_none(self, job_id: str) -> JobRecord | None:
        try:
            return _decode(self.storage.read(_path(job_id)), job_id)
        except (FileNotFoundError, ManifestError):
            return None

    def read(self, job_id: str) -> JobRecord:
        """The record of a job by its id, or of the newest job with a name. Raises NoJobError, ManifestError."""
        if re.fullmatch(_ID, job_id):
            try:
                return _decode(self.storage.read(_path(job_id)), job_id)
            except FileNotFoundError:
                pass
        ids = self.ids()
        same = [other for other in ids if _split(other)[0] == job_id]
        if not same:
            near = difflib.get_close_matches(job_id, ids, n=1)
            hint = f" The nearest is {near[0]!r}." if near else ""
            raise NoJobError(
                f"No job {job_id[:100]!r} in {self.storage.url!r}.{hint} List the jobs with `cloudtrain job list`."
            )
        return _decode(self.storage.read(_path(same[-1])), same[-1])

    def write(self, record: JobRecord, **changes: Any) -> JobRecord:
        """Write the record of a job with changes. Only one process at a time does: the submitter, then the supervisor."""
        record = dataclasses.replace(record, updated=time.time(), **changes)
        self.storage.write(_path(record.id), _encode(record))
        return record

    def ask_to_cancel(self, job_id: str) -> bool:
        """Mark a job as cancelled; False if it is already."""
        return self.storage.create(f"cancelled/{job_id}", encode_record({"asked": time.time(), **person()}))

    def is_cancelled(self, job_id: str) -> bool:
        """Whether the user has cancelled a job."""
        try:
            self.storage.read(f"cancelled/{job_id}")
        except FileNotFoundError:
            return False
        return True

    def forget_cancel(self, job_id: str) -> None:
        """Remove the cancel mark of a job."""
        self.storage.delete([f"cancelled/{job_id}"])

    def delete(self, job_id: str) -> None:
        """Delete the record and the cancel mark of a job; its id stays taken."""
        self.storage.create(f"deleted/{job_id}", encode_record({"time": time.time(), **person()}))
        self.storage.delete([_path(job_id)])
        self.forget_cancel(job_id)

    def home(self, job_id: str) -> Path:
        """The home folder of a job on this machine."""
        if is_local(self.url):
            return Path(local_path(self.url), "jobs", job_id)
        # Other stores have jobs with the same ids, and so has this folder itself, which is the default store.
        digest = hashlib.sha256(self.url.rstrip("/").encode()).hexdigest()
        return Path(env.own_folder(), "jobs", digest[:12], job_id)


class KnownJobs(JobStore):
    """The jobs of the store, for reading: each record is read once, and again when a listing shows a different size."""

    def __init__(self) -> None:
        super().__init__()
        self.storage = self.mirror = Mirror(self.storage, top="records")

    def read(self, job_id: str) -> JobRecord:
        """As it is on the store now."""
        self.mirror.fetch(_path(job_id))
        return super().read(job_id)


def _path(job_id: str) -> str:
    return f"records/{job_id}.json"


def _split(job_id: str) -> tuple[str, int]:
    name, _, number = job_id.rpartition("-")
    return (name, int(number)) if re.fullmatch(r"\d{1,9}", number) else (job_id, 0)


def _encode(record: JobRecord) -> bytes:
    return encode_record(dataclasses.asdict(record))


def _decode(data: bytes, job_id: str) -> JobRecord:
    what = f"record of the job {job_id!r}"
    facts = decode_record(data, what)
    known = {field.name for field in dataclasses.fields(JobRecord)}
    try:
        starts = [
            {**start, "exit_codes": tuple(start.get("exit_codes", ()))} for start in facts.get("starts", ())
        ]
        facts["starts"] = tuple(Start(**start) for start in starts)
        record = JobRecord(**{key: value for key, value in facts.items() if key in known})
    except (TypeError, AttributeError, ValueError) as error:
        raise ManifestError(f"The {what} is damaged: {error}") from error
    if record.id != job_id:
        raise ManifestError(f"The {what} belongs to {record.id!r}.")
    if not re.fullmatch(_ID, job_id):  # '..' would lead out of the folder of jobs
        raise ManifestError(f"{job_id[:100]!r} is not the id of a job.")
    parts: list[tuple[object, _Kinds]] = [
        (record, _KINDS),
        *((start, _START_KINDS) for start in record.starts),
    ]
    wrong = [
        name
        for part, kinds in parts
        for name, kind in kinds.items()
        if not isinstance(getattr(part, name), kind)
    ]
    if wrong:
        raise ManifestError(f"The {what} is damaged: the type of {wrong[0]!r} is wrong.")
    return record


def job_columns(when: Callable[[float], object]) -> Mapping[str, Callable[[JobRecord], object]]:
    """What a list of jobs shows: each heading, with `>` in front if it is right-aligned, and the function that takes its cell.

    Args:
        when: shows a time.
    """
    return {
        "job": lambda job: job.id,
        "experiment": lambda job: job.experiment,
        "state": lambda job: job.state,
        "engine": lambda job: job.engine,
        ">nodes": lambda job: job.nodes,
        ">processes": lambda job: job.nodes * job.nproc_per_node,
        ">starts": lambda job: len(job.starts),
        ">restarts": lambda job: job.restarts,
        "created": lambda job: when(job.created),
    }


def start_columns(when: Callable[[float], object]) -> Mapping[str, Callable[[Start], object]]:
    """The same of the starts of a job."""
    return {
        ">start": lambda start: start.number,
        "began": lambda start: when(start.began),
        "took": lambda start: duration_text(start.ended - start.began) if start.ended else None,
        "outcome": lambda start: start.outcome or "running",
        "exit codes": lambda start: " ".join(
            "lost" if code is None else str(code) for code in start.exit_codes
        ),
        "reason": lambda start: start.reason,
    }
