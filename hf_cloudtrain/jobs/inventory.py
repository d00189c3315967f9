"""Machines that a job can have: this one, those of Slurm, those that the user has written down, and SkyPilot's catalog.

    find(cloud="azure", gpu="v100") -> Found    nothing is started, and a source that does not answer is a sentence

Each source is asked by its own means: `nvidia-smi`, `sinfo`, `vms.yml` in the store, and the files of prices that
SkyPilot keeps below `~/.sky/catalogs`.
"""

from __future__ import annotations

import ast
import csv
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from hf_cloudtrain import env
from hf_cloudtrain.errors import ConfigurationError, JobFileError, ObjectNotFoundError, StorageError
from hf_cloudtrain.jobs.spec.diagnostics import MAX_BYTES, Document, Problem, read_document
from hf_cloudtrain.jobs.spec.explainer import Explainer, quoted
from hf_cloudtrain.jobs.spec.machine import Machine
from hf_cloudtrain.jobs.spec.values import check_vm
from hf_cloudtrain.runtime.redaction import redact, visible
from hf_cloudtrain.storage.client import Storage

Source = Literal["local", "slurm", "vms.yml", "skypilot"]

FILE = "vms.yml"
ANSWER = 20.0
"""Seconds for a command to answer: a driver that sleeps takes 10."""
MOST = 200
"""Machines of SkyPilot's catalog that are listed: all of it are 20,000."""
SINFO = "%R|%G|%F|%M|%a|%c"
"""Partition, gres, nodes (allocated/idle/other/total), preemption mode, availability, cores: man sinfo."""

MEMORY_GB: dict[str, tuple[int, ...]] = {
    "a10": (24,),
    "a10g": (24,),
    "a100": (40, 80),
    "b200": (180,),
    "gh200": (96, 144),
    "h100": (80, 94),
    "h200": (141,),
    "k80": (12,),
    "l4": (24,),
    "l40": (48,),
    "l40s": (48,),
    "p100": (12, 16),
    "t4": (16,),
    "v100": (16, 32),
}
"""Memory of a GPU by NVIDIA's data sheets, the usual one first: drivers tell less than what is in the name."""


@dataclass(frozen=True)
class Vm:
    """A kind of machine that a source offers."""

    source: Source
    cloud: str
    region: str
    gpu: str | None = None
    """As in the name of a machine: `v100`; None without GPUs."""
    gpus: int = 0
    memory_gb: int | None = None
    """Memory of one GPU."""
    cpus: int | None = None
    quota: str | None = None
    """How many of them there are, or may be had."""
    is_spot: bool = False

    @property
    def vm(self) -> str | None:
        """What a job file calls it; None where that has no word for it."""
        if not self.gpu or not self.gpus or not self.memory_gb:
            return None
        machine = Machine(self.cloud, self.memory_gb, self.gpu, self.gpus, self.region, self.is_spot)
        try:
            return str(machine) if Machine.parse(str(machine)) == machine else None
        except ConfigurationError:
            return None

    @property
    def device(self) -> str:
        """What it computes with."""
        if not self.gpus:
            return f"{self.cpus} CPU cores" if self.cpus else "CPU"
        memory = f" {self.memory_gb} GB" if self.memory_gb else ""
        return f"{self.gpus} x {(self.gpu or 'GPU').upper()}{memory}"


@dataclass
class Found:
    """Machines, and what could not be asked."""

    vms: list[Vm] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """A sentence for each source that did not answer."""
    mistakes: list[str] = field(default_factory=list)
    """What is wrong with `vms.yml`, by line."""
    left_out: int = 0
    """Machines of SkyPilot's catalog beyond the first `MOST`."""


def find(cloud: str | None = None, gpu: str | None = None) -> Found:
    """The machines of all sources, or those of a cloud, or with a GPU whose name begins so."""
    found = Found()
    for source in (this_machine, slurm, own, skypilot):
        try:
            vms = source()
        except JobFileError as error:
            found.mistakes += error.problems
        except (ConfigurationError, StorageError, OSError, subprocess.SubprocessError) as error:
            found.problems.append(redact(str(error)))
        else:
            wanted = [vm for vm in vms if _is_wanted(vm, cloud, gpu)]
            if source is skypilot:
                found.left_out = max(0, len(wanted) - MOST)
                wanted = wanted[:MOST]
            found.vms += wanted
    return found


def _is_wanted(vm: Vm, cloud: str | None, gpu: str | None) -> bool:
    right_cloud = cloud is None or vm.cloud == cloud.lower()
    return right_cloud and (gpu is None or (vm.gpu or "").startswith(gpu.lower()))


# --- This machine ------------------------------------------------------------------------------------------------------


def this_machine() -> list[Vm]:
    """Its GPUs by kind, as the driver tells them, or else its cores.

    Raises:
        OSError, subprocess.SubprocessError: there is a driver, and it does not answer.
    """
    host = platform.node() or "localhost"
    alone = [Vm("local", "local", host, cpus=_cores())]
    if shutil.which("nvidia-smi") is None:
        return alone
    try:
        text = _answer(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"])
    except ConfigurationError as error:
        if "No devices were found" in str(error):
            return alone
        raise
    kinds: dict[tuple[str, int | None], int] = {}
    for name, _, memory in (line.rpartition(",") for line in text.splitlines() if line.strip()):
        word = gpu_word(name)
        size = round(int(memory) / 1024) if memory.strip().isdigit() else None  # "[N/A]" of a shared memory
        kind = (word, _memory(word, size))
        kinds[kind] = kinds.get(kind, 0) + 1
    found = [
        Vm("local", "local", host, gpu=gpu, gpus=count, memory_gb=memory_gb)
        for (gpu, memory_gb), count in kinds.items()
    ]
    return found or alone


def gpu_word(name: str) -> str:
    """A driver's name of a GPU as in the name of a machine.

    Example:
        >>> gpu_word("NVIDIA A100-SXM4-80GB"), gpu_word("Tesla V100-SXM2-16GB"), gpu_word("NVIDIA RTX A6000")
        ('a100', 'v100', 'rtx-a6000')
    """
    words = re.split(r"[^a-z0-9]+", name.lower())
    noise = re.compile(r"nvidia|tesla|geforce|quadro|sxm\d*|pcie|hbm\d*e?|nvl|\d+gb|graphics|device")
    return "-".join(word for word in words if word and not noise.fullmatch(word))


def _memory(gpu: str, said: int | None) -> int | None:
    """What people call the memory of a GPU that says a little less of it, or nothing."""
    known = MEMORY_GB.get(gpu)
    if known is None:
        return said
    return known[0] if said is None else min(known, key=lambda size: abs(size - said))


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# --- Slurm -------------------------------------------------------------------------------------------------------------


def slurm() -> list[Vm]:
    """A row for each partition and kind of node; none without Slurm.

    Raises:
        ConfigurationError: it does not answer.
    """
    if shutil.which("sinfo") is None:
        return []
    text = _answer(["sinfo", "--noheader", "-o", SINFO])
    return [vm for line in text.splitlines() if line.strip() for vm in _partition(line)]


def _partition(line: str) -> Iterator[Vm]:
    fields = line.strip().split("|")
    if len(fields) != SINFO.count("|") + 1:
        raise ConfigurationError(f"`sinfo` says {line[:200]!r}, which is no list of partitions.")
    name, gres, nodes, preemption, available, cores = fields
    counts = nodes.split("/")
    quota = f"{counts[1]} of {counts[3]} nodes idle" if len(counts) == 4 else None
    if available != "up":
        quota = f"partition {available}"
    # SUSPEND lets a job go on later, where it is; the others take its nodes away.
    spot = re.search("REQUEUE|CANCEL", preemption.upper()) is not None
    cpus = int(match[0]) if (match := re.match(r"\d+", cores)) else None  # "16+": nodes differ
    gpus = list(_gres(gres))
    for gpu, count in gpus:
        word = gpu_word(gpu.replace("_", "-")) if gpu else None
        memory = _memory(word, _size_in(gpu)) if word else None
        yield Vm("slurm", "slurm", name, word, count, memory, cpus, quota, spot)
    if not gpus:
        yield Vm("slurm", "slurm", name, cpus=cpus, quota=quota, is_spot=spot)


def _gres(text: str) -> Iterator[tuple[str, int]]:
    """GPUs by type: 'gpu:v100:4(S:0-1),gpu:2,shard:8' gives v100 4 times and one without a type twice."""
    for part in re.sub(r"\([^)]*\)", "", text).split(","):
        match = re.fullmatch(r"gpu(?::([^:]+))?(?::(\d+))?", part)
        if match and match[1] and match[1].isdigit() and match[2] is None:
            yield "", int(match[1])
        elif match:
            yield match[1] or "", int(match[2] or 1)


def _size_in(name: str) -> int | None:
    """The memory in a name such as a100_80gb."""
    match = re.search(r"(\d+)gb", name.lower())
    return int(match[1]) if match else None


# --- The user's own ----------------------------------------------------------------------------------------------------


class _Own(BaseModel):
    """A machine that somebody has written down."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    vm: Annotated[str, AfterValidator(check_vm)]
    quota: Annotated[int, Field(ge=0, le=1_000_000)] | None = None


class _OwnFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    vms: list[_Own]


def own() -> list[Vm]:
    """What `vms.yml` says, in the store, or else in the home folder; none where there is no such file.

    Raises:
        JobFileError: with everything that is wrong in it, by line.
        StorageError: the store does not answer.
    """
    content, source = _own_file()
    return [] if content is None else parse_own(content, source)


def parse_own(content: bytes, source: str = FILE) -> list[Vm]:
    r"""The machines in the content of a `vms.yml`. Raises JobFileError.

    Example:
        >>> parse_own(b"vms:\n- vm: rack-80gb-h100-8g-berlin\n  quota: 4\n")[0].quota
        '4'
    """
    document = read_document(content)
    problems = list(document.problems)
    listed: list[_Own] = []
    if document.data is not None:
        try:
            listed = _OwnFile.model_validate(document.data).vms
        except ValidationError as error:
            problems += Explainer(_OwnFile, {}, frozenset(), limit=50).explain(error, document)
        problems += _twice(document)
    if problems:
        problems.sort(key=lambda problem: problem.line)
        raise JobFileError("\n".join(visible(f"{source}:{problem}") for problem in problems))
    return [_own_vm(Machine.parse(given.vm), given.quota) for given in listed]


def _twice(document: Document) -> Iterator[Problem]:
    """On what was written, so that all that is wrong is told in one go."""
    rows = (document.data or {}).get("vms")
    seen: set[str] = set()
    for index, row in enumerate(rows if isinstance(rows, list) else ()):
        name = row.get("vm") if isinstance(row, dict) else None
        if isinstance(name, str) and name in seen:
            place = ("vms", index, "vm")
            yield Problem(document.line(place), f"{quoted(name)} is here a second time.", place)
        elif isinstance(name, str):
            seen.add(name)


def _own_vm(machine: Machine, quota: int | None) -> Vm:
    return Vm(
        "vms.yml",
        machine.cloud,
        machine.region,
        machine.gpu,
        machine.gpus,
        machine.memory_gb,
        quota=None if quota is None else str(quota),
        is_spot=machine.is_spot,
    )


def _own_file() -> tuple[bytes | None, str]:
    store = Storage(env.store(None), env.storage_options(None))
    try:
        return store.read(FILE), f"{store.url}/{FILE}"
    except ObjectNotFoundError:
        pass
    path = Path(env.own_folder(), FILE)
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1), str(path)
    except FileNotFoundError:
        return None, str(path)


# --- SkyPilot ----------------------------------------------------------------------------------------------------------


def skypilot() -> list[Vm]:
    """The machines with GPUs in SkyPilot's catalog, as far as it has been downloaded; none without SkyPilot.

    Raises:
        ConfigurationError: SkyPilot has no catalog here yet.
        OSError: a file of it cannot be read.
    """
    versions = Path(os.environ.get("SKY_RUNTIME_DIR") or "~", ".sky", "catalogs").expanduser()
    newest = max(versions.glob("v*"), key=_version, default=None)
    files = sorted(newest.glob("*/vms.csv")) if newest else []
    if not files:
        if shutil.which("sky") is None:
            return []
        raise ConfigurationError("SkyPilot has no catalog here yet. `sky show-gpus` downloads it.")
    found: dict[Vm, None] = {}
    for path in files:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            found.update(dict.fromkeys(_catalog(path.parent.name, csv.DictReader(file))))
    return sorted(found, key=lambda vm: (vm.cloud, vm.gpu or "", vm.gpus, vm.region, vm.is_spot))


def _version(path: Path) -> int:
    return int(path.name[1:]) if path.name[1:].isdigit() else -1


def _catalog(cloud: str, rows: Iterable[dict[str, str]]) -> Iterator[Vm]:
    for row in rows:
        name, region = row.get("AcceleratorName") or "", (row.get("Region") or "").lower()
        try:
            count = float(row.get("AcceleratorCount") or 0)
        except ValueError:
            continue
        if not name or not region or count < 1 or count != int(count):
            continue  # without a GPU, or with a part of one
        match = re.fullmatch(r"(.+)-(\d+)GB", name)
        gpu = (match[1] if match else name).lower()
        memory = int(match[2]) if match else _memory(gpu, _memory_in(row.get("GpuInfo") or ""))
        for is_spot, price in ((False, "Price"), (True, "SpotPrice")):
            if row.get(price):
                yield Vm("skypilot", cloud, region, gpu, int(count), memory, is_spot=is_spot)


def _memory_in(info: str) -> int | None:
    """Memory of one GPU in GB; clouds write it as JSON, as Python, or not at all."""
    if not info.startswith("{") or len(info) > 10_000:
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            size: float = read(info)["Gpus"][0]["MemoryInfo"]["SizeInMiB"] / 1024
            return round(size)
        except (ValueError, SyntaxError, KeyError, IndexError, TypeError, OverflowError, RecursionError):
            continue
    return None


def _answer(words: Sequence[str]) -> str:
    """What a command prints. Raises ConfigurationError with what it complains of."""
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=ANSWER,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConfigurationError(f"`{words[0]}` gives no answer within {ANSWER:g} s.") from None
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ConfigurationError(f"`{words[0]}` does not answer: {said}")
    return done.stdout
