"""The machine types that a job can use: this machine, Slurm's partitions, the user's own list, and SkyPilot's catalog.

    find(cloud="azure", gpu="v100") -> Found    starts nothing; a source that fails is reported in one sentence
    price_of("azure-16gb-v100-4g-eastus", is_rented=True) -> 12.24

The sources are `nvidia-smi`, `sinfo`, `vms.yml` in the store, and the price files of SkyPilot below `~/.sky/catalogs`.
"""

from __future__ import annotations

import contextlib
import csv
import math
import os
import platform
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hf_cloudtrain import env
from hf_cloudtrain.errors import ConfigurationError, JobFileError, ObjectNotFoundError, StorageError
from hf_cloudtrain.jobs.spec.document import MAX_BYTES
from hf_cloudtrain.jobs.spec.values import Machine
from hf_cloudtrain.jobs.spec.vms_file import FILE, ListedVm, parse_vms
from hf_cloudtrain.runtime.redaction import redact
from hf_cloudtrain.storage.client import Storage

Source = Literal["local", "slurm", "vms.yml", "skypilot"]

TIMEOUT = 20.0
"""Seconds until a command counts as hanging: a driver that has to wake up takes 10."""
MAX_CATALOG_ROWS = 200
"""Rows of SkyPilot's catalog that are listed: the whole catalog has 20,000."""
SINFO = "%R|%G|%F|%M|%a|%c"
"""Partition, gres, nodes (allocated/idle/other/total), preemption mode, availability, cores: man sinfo."""

MEMORY_GB: dict[str, tuple[int, ...]] = {
    "a10": (24,), "a10g": (24,), "a100": (40, 80), "b200": (180,), "gh200": (96, 144), "h100": (80, 94),
    "h200": (141,), "k80": (12,), "l4": (24,), "l40": (48,), "l40s": (48,), "p100": (12, 16), "t4": (16,),
    "v100": (16, 32),
}  # fmt: skip
"""Memory of a GPU by NVIDIA's data sheets, the most common size first: drivers report less than the nominal size."""


@dataclass(frozen=True)
class Vm:
    """A machine type that a source offers."""

    source: Source
    cloud: str
    region: str
    gpu: str | None = None
    """As in the name of a machine type: `v100`; None without GPUs or where it is unknown."""
    gpus: int = 0
    memory_gb: int | None = None
    """Memory of one GPU."""
    cpus: int | None = None
    quota: str | None = None
    """How many machines there are, or are available."""
    is_spot: bool = False
    price: float | None = field(default=None, compare=False)
    """Hourly price of one machine; in US dollars if it comes from SkyPilot's catalog."""

    @property
    def vm(self) -> str | None:
        """Its name in a job file; None where a part of the name is unknown."""
        machine = self.machine
        if machine is None:
            return None
        try:
            return str(machine) if Machine.parse(str(machine)) == machine else None
        except ConfigurationError:
            return None

    @property
    def machine(self) -> Machine | None:
        """The parts of its name; None where one is unknown."""
        if not self.gpu or not self.gpus or not self.memory_gb:
            return None
        return Machine(self.cloud, self.memory_gb, self.gpu, self.gpus, self.region, self.is_spot)

    @property
    def device(self) -> str:
        """GPUs with their memory, or CPU cores."""
        if not self.gpus:
            return f"{self.cpus} CPU cores" if self.cpus else "CPU"
        memory = f" {self.memory_gb} GB" if self.memory_gb else ""
        return f"{self.gpus} x {(self.gpu or 'GPU').upper()}{memory}"


@dataclass
class Found:
    """Machine types, and the sources that failed."""

    vms: list[Vm] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """A sentence for each source that failed."""
    mistakes: list[str] = field(default_factory=list)
    """Problems of `vms.yml`, by line."""
    omitted: int = 0
    """Rows of SkyPilot's catalog beyond the first `MAX_CATALOG_ROWS`."""


def find(cloud: str | None = None, gpu: str | None = None) -> Found:
    """The machine types of all sources; optionally those of one cloud, or with a GPU whose name begins with `gpu`."""
    found = Found()
    for source in (this_machine, slurm, user_list, skypilot):
        try:
            vms = source()
        except JobFileError as error:
            found.mistakes += error.problems
        except (ConfigurationError, StorageError, OSError, subprocess.SubprocessError) as error:
            found.problems.append(redact(str(error)))
        else:
            wanted = [
                vm
                for vm in vms
                if (cloud is None or vm.cloud == cloud.lower())
                and (gpu is None or (vm.gpu or "").startswith(gpu.lower()))
            ]
            if source is skypilot:
                found.omitted = max(0, len(wanted) - MAX_CATALOG_ROWS)
                wanted = wanted[:MAX_CATALOG_ROWS]
            found.vms += wanted
    return found


def price_of(vm: str, *, is_rented: bool, store: str | None = None) -> float | None:
    """Hourly price of one machine of a type: by the `vms.yml` of a store, or if SkyPilot rents it, by SkyPilot's catalog.

    None if neither lists a price or neither can be read; `cloudtrain vm list` shows the reason.
    """
    machine = Machine.parse(vm)
    for is_catalog in (False, True) if is_rented else (False,):
        with contextlib.suppress(ConfigurationError, StorageError, OSError):
            for offer in skypilot(machine.cloud) if is_catalog else user_list(store):
                if offer.price is not None and offer.machine == machine:
                    return offer.price
    return None


# --- This machine ------------------------------------------------------------------------------------------------------


def this_machine() -> list[Vm]:
    """The GPUs of this machine by type, as the driver reports them, or else its cores.

    Raises:
        ConfigurationError, OSError: there is a driver, and it fails.
    """
    host = platform.node() or "localhost"
    without_gpus = [Vm("local", "local", host, cpus=_cores())]
    if shutil.which("nvidia-smi") is None:
        return without_gpus
    try:
        text = _output(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"])
    except ConfigurationError as error:
        if "No devices were found" in str(error):
            return without_gpus
        raise
    kinds: Counter[tuple[str, int | None]] = Counter()
    for name, _, memory in (line.rpartition(",") for line in text.splitlines() if line.strip()):
        gpu = gpu_name(name)
        reported = round(int(memory) / 1024) if memory.strip().isdigit() else None  # "[N/A]": shared memory
        kinds[gpu, _memory(gpu, reported)] += 1
    found = [Vm("local", "local", host, gpu, count, memory_gb) for (gpu, memory_gb), count in kinds.items()]
    return found or without_gpus


def gpu_name(name: str) -> str:
    """A GPU as in the name of a machine type, from the driver's name of it.

    Example:
        >>> gpu_name("NVIDIA A100-SXM4-80GB"), gpu_name("Tesla V100-SXM2-16GB"), gpu_name("NVIDIA RTX A6000")
        ('a100', 'v100', 'rtx-a6000')
    """
    words = re.split(r"[^a-z0-9]+", name.lower())
    noise = re.compile(r"nvidia|tesla|geforce|quadro|sxm\d*|pcie|hbm\d*e?|nvl|\d+gb|graphics|device")
    return "-".join(word for word in words if word and not noise.fullmatch(word))


def _memory(gpu: str, reported: int | None) -> int | None:
    """The nominal memory of a GPU, from what its driver reports: a little less, or nothing."""
    known = MEMORY_GB.get(gpu)
    if known is None:
        return reported
    return known[0] if reported is None else min(known, key=lambda size: abs(size - reported))


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# --- Slurm -------------------------------------------------------------------------------------------------------------


def slurm() -> list[Vm]:
    """A row for each partition and type of node; empty without Slurm. Raises ConfigurationError if `sinfo` fails."""
    if shutil.which("sinfo") is None:
        return []
    text = _output(["sinfo", "--noheader", "-o", SINFO])
    return [vm for line in text.splitlines() if line.strip() for vm in _partition(line)]


def _partition(line: str) -> Iterator[Vm]:
    fields = line.strip().split("|")
    if len(fields) != SINFO.count("|") + 1:
        raise ConfigurationError(f"`sinfo` printed {line[:200]!r}, which is not a list of partitions.")
    name, gres, nodes, preemption, available, cores = fields
    counts = nodes.split("/")
    quota = f"{counts[1]} of {counts[3]} idle" if len(counts) == 4 else None
    if available != "up":
        quota = f"partition {available}"
    # SUSPEND continues a job later on the same nodes; the other modes take its nodes away.
    spot = re.search("REQUEUE|CANCEL", preemption.upper()) is not None
    cpus = int(match[0]) if (match := re.match(r"\d+", cores)) else None  # "16+": the nodes differ
    for gpu, count in list(_gres(gres)) or [("", 0)]:
        short = gpu_name(gpu.replace("_", "-")) or None
        size = re.search(r"(\d+)gb", gpu.lower())  # as in a100_80gb
        memory = _memory(short, int(size[1]) if size else None) if short else None
        yield Vm("slurm", "slurm", name, short, count, memory, cpus, quota, spot)


def _gres(text: str) -> Iterator[tuple[str, int]]:
    """GPUs by type: 'gpu:v100:4(S:0-1),gpu:2,shard:8' has four v100 and two GPUs without a type."""
    for part in re.sub(r"\([^)]*\)", "", text).split(","):
        match = re.fullmatch(r"gpu(?::([^:]+))?(?::(\d+))?", part)
        if match and match[1] and match[1].isdigit() and match[2] is None:
            yield "", int(match[1])
        elif match:
            yield match[1] or "", int(match[2] or 1)


# --- The user's list ---------------------------------------------------------------------------------------------------


def user_list(store: str | None = None) -> list[Vm]:
    """The machine types in `vms.yml`, of a store (default: `HF_CLOUDTRAIN_STORE`) or else of the home folder; empty without it.

    Raises:
        JobFileError: with all problems in it, by line. StorageError: the store fails.
    """
    content, source = _vms_file(store)
    return [_vm(listed) for listed in parse_vms(content, source)] if content is not None else []


def _vm(listed: ListedVm) -> Vm:
    vm, quota = Machine.parse(listed.vm), None if listed.quota is None else str(listed.quota)
    shape = vm.cloud, vm.region, vm.gpu, vm.gpus, vm.memory_gb
    return Vm("vms.yml", *shape, None, quota, vm.is_spot, listed.price)


def _vms_file(store: str | None) -> tuple[bytes | None, str]:
    storage = Storage(env.store(store), env.storage_options(None))
    try:
        return storage.read(FILE), f"{storage.url}/{FILE}"
    except ObjectNotFoundError:
        pass
    path = Path(env.own_folder(), FILE)
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1), str(path)
    except FileNotFoundError:
        return None, str(path)


# --- SkyPilot ----------------------------------------------------------------------------------------------------------


def skypilot(cloud: str | None = None) -> list[Vm]:
    """The machine types with GPUs, of one cloud or all, in the downloaded part of SkyPilot's catalog; empty without SkyPilot.

    Raises:
        ConfigurationError: SkyPilot has not downloaded its catalog yet, or it is damaged. OSError: a file cannot be read.
    """
    versions = Path(os.environ.get("SKY_RUNTIME_DIR") or "~", ".sky", "catalogs").expanduser()
    # A copy such as "v9.2026-01" is not a version.
    numbers = (int(path.name[1:]) for path in versions.glob("v*") if path.name[1:].isdecimal())
    newest = max(numbers, default=None)
    files = [] if newest is None else sorted(versions.glob(f"v{newest}/*/vms.csv"))
    if not files:
        if shutil.which("sky") is None:
            return []
        raise ConfigurationError(
            "SkyPilot has not downloaded its catalog yet. Run `sky show-gpus` to download it."
        )
    found: dict[Vm, Vm] = {}
    for path in files:
        if cloud is not None and path.parent.name != cloud:
            continue
        try:
            with path.open(newline="", encoding="utf-8", errors="replace") as file:
                offers = list(_catalog(path.parent.name, csv.DictReader(file)))
        except csv.Error as error:
            raise ConfigurationError(
                f"{str(path)!r} is not a table: {error}. Delete it: SkyPilot downloads it again."
            ) from None
        for vm in offers:
            known = found.setdefault(vm, vm)
            if known.price is None or (vm.price is not None and vm.price < known.price):
                found[vm] = vm  # of several instances with these GPUs, SkyPilot takes the cheapest
    return sorted(found.values(), key=lambda vm: (vm.cloud, vm.gpu or "", vm.gpus, vm.region, vm.is_spot))


def _catalog(cloud: str, rows: Iterable[dict[str, str]]) -> Iterator[Vm]:
    for row in rows:
        name, region = row.get("AcceleratorName") or "", (row.get("Region") or "").lower()
        try:
            count = float(row.get("AcceleratorCount") or 0)
        except ValueError:
            continue
        if not name or not region or count < 1 or not count.is_integer():
            continue  # without a GPU, or with a part of one
        match = re.fullmatch(r"(.+)-(\d{1,6})GB", name)
        gpu = (match[1] if match else name).lower()
        # JSON, Python or a plain name: it depends on the cloud.
        size = re.search(r"'SizeInMiB'\s*:\s*(\d{1,9})", (row.get("GpuInfo") or "").replace('"', "'"))
        memory = int(match[2]) if match else _memory(gpu, round(int(size[1]) / 1024) if size else None)
        for is_spot, price in ((False, "Price"), (True, "SpotPrice")):
            if row.get(price):
                cost = _price(row[price])
                yield Vm("skypilot", cloud, region, gpu, int(count), memory, is_spot=is_spot, price=cost)


def _price(text: str) -> float | None:
    try:
        price = float(text)
    except ValueError:
        return None
    return price if 0 < price < math.inf else None


def _output(argv: Sequence[str]) -> str:
    """What a command prints. Raises ConfigurationError with its last line of output if it fails."""
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConfigurationError(f"`{argv[0]}` timed out after {TIMEOUT:g} s.") from None
    if done.returncode != 0:
        text = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        raise ConfigurationError(f"`{argv[0]}` failed: {text.splitlines()[-1]}")
    return done.stdout
