"""What differs between a whole run and one that was killed and resumed: files, positions and logged values.

Nothing is unpickled: torch files are read with `weights_only=True`, and files that torch refuses are compared by digest.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest
from hf_cloudtrain.errors import NoCheckpointError
from hf_cloudtrain.tracking.history import history_of

KINDS = (
    ("weights", r".*\.safetensors|.*model.*\.(bin|pt|pth)"),
    ("optimizer", r".*optimizer.*\.(bin|pt|pth)"),
    ("schedule", r".*scheduler.*\.(bin|pt|pth)"),
    ("random state", r".*(rng_state|random_state).*"),
)
"""What a file is, by its name; any other file is `state`."""
LEFT_OUT = re.compile(r".*\.(json|jsonl|txt|md|model|log)|.*training_args\.bin|.*/?events\.out\.tfevents.*")
"""Files with times and paths. Their training state is compared by the logged values."""
OF_THE_CLOCK = re.compile(r".*(_runtime|_per_second|time|_memory.*)|train_loss|total_flos|step|attempt|kind")
"""Logged values that differ from run to run, and keys that are not values. (`train_loss` covers one attempt only.)"""


@dataclass(frozen=True)
class FileDifference:
    """One file of the last checkpoint of both runs."""

    path: str
    kind: str
    max_difference: float | None
    """Over all its numbers; None if they cannot be compared."""
    note: str | None = None
    """Why they cannot."""

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return self.max_difference == 0.0


@dataclass(frozen=True)
class FirstDifference:
    """The first step at which the runs differ."""

    step: int
    name: str
    whole: Any
    resumed: Any


@dataclass
class Comparison:
    """Two runs side by side."""

    steps: tuple[int, int]
    """Last step of the whole run, and of the resumed one."""
    resumed_at: int
    files: list[FileDifference] = field(default_factory=list)
    values: int = 0
    """Logged values that were compared."""
    value: FirstDifference | None = None
    positions: int = 0
    """Checkpoints whose position in the data was compared."""
    position: FirstDifference | None = None
    weights: int | None = None
    """Step of the first checkpoint whose weights differ."""
    left_out: list[str] = field(default_factory=list)
    """Files of the last checkpoint that may differ and do: they hold times and paths."""

    @property
    def exact(self) -> bool:
        """Whether nothing differs."""
        return self.steps[0] == self.steps[1] and self.first is None and all(file.same for file in self.files)

    @property
    def first(self) -> int | None:
        """The first step at which a value, a position or weights differ; None if none do."""
        steps = [found.step for found in (self.value, self.position) if found]
        return min(steps if self.weights is None else [*steps, self.weights], default=None)

    @property
    def before_resume(self) -> int | None:
        """The first step that differs if it is before the kill, where the resume cannot be the cause; else None."""
        return self.first if self.first is not None and self.first <= self.resumed_at else None

    def record(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "exact": self.exact,
            "deterministic": self.before_resume is None,
            "steps": self.steps[0],
            "resumed_steps": self.steps[1],
            "resumed_at": self.resumed_at,
            "files": [{**asdict(one), "same": one.same} for one in self.files],
            "values_compared": self.values,
            "first_value": asdict(self.value) if self.value else None,
            "positions_compared": self.positions,
            "first_position": asdict(self.position) if self.position else None,
            "first_weights": self.weights,
            "left_out": self.left_out,
        }


def compare(
    whole: Catalog,
    resumed: Catalog,
    seen: dict[CheckpointKey, Manifest],
    seen_resumed: dict[CheckpointKey, Manifest],
    resumed_at: CheckpointKey,
) -> Comparison:
    """Compare two finished runs whose run URLs are local folders.

    Args:
        seen, seen_resumed: all checkpoints that each of them committed, deleted ones included.
        resumed_at: the checkpoint from which the second one resumed.
    """
    ours = by_step(seen, resumed_at=None)
    theirs = by_step(seen_resumed, resumed_at)
    last, last_resumed = ours[max(ours)], theirs[max(theirs)]
    found = Comparison((last.step, last_resumed.step), resumed_at.step)
    found.files = list(file_differences(whole, last, resumed, last_resumed))
    digests = {entry.path: entry.digest for entry in last.files}
    found.left_out = [
        entry.path
        for entry in last_resumed.files
        if LEFT_OUT.fullmatch(entry.path) and digests.get(entry.path) != entry.digest
    ]
    common = sorted(ours.keys() & theirs.keys())
    for step in common:
        found.positions += 1
        found.position = found.position or _position_difference(ours[step], theirs[step])
        if found.weights is None and not _same_weights(whole, ours[step], resumed, theirs[step]):
            found.weights = step
    found.values, found.value = logged_difference(
        history_of(whole).logs, history_of(resumed).logs, resumed_at.step
    )
    return found


def by_step(seen: dict[CheckpointKey, Manifest], resumed_at: CheckpointKey | None) -> dict[int, Manifest]:
    """The checkpoints that count, by step: without those that the killed start saved after the one resumed from."""
    return {
        key.step: manifest
        for key, manifest in sorted(seen.items())
        if resumed_at is None or key.attempt > resumed_at.attempt or key <= resumed_at
    }


def kind_of(path: str) -> str:
    """What a file of a checkpoint is, by its name."""
    name = path.lower()
    return next((kind for kind, pattern in KINDS if re.fullmatch(pattern, name)), "state")


def file_differences(
    whole: Catalog, ours: Manifest, resumed: Catalog, theirs: Manifest
) -> Iterator[FileDifference]:
    """Every file of two checkpoints that holds training state."""
    digests = {entry.path: entry.digest for entry in theirs.files}
    paths = sorted({entry.path for entry in ours.files} | digests.keys())
    before = {entry.path: entry.digest for entry in ours.files}
    for path in paths:
        if LEFT_OUT.fullmatch(path):
            continue
        kind = kind_of(path)
        if path not in before or path not in digests:
            which = "resumed" if path in digests else "whole"
            yield FileDifference(path, kind, None, f"only the {which} run has it")
        elif before[path] == digests[path]:
            yield FileDifference(path, kind, 0.0)
        else:
            yield FileDifference(
                path, kind, *_file_difference(_local(whole, ours, path), _local(resumed, theirs, path))
            )


def logged_difference(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]], resumed_at: int
) -> tuple[int, FirstDifference | None]:
    """How many logged values were compared, and the first that differs.

    A value may be a mean since it was last reported. It is left out if that was before the resume and it comes after
    it: the resumed run averages only its own part.
    """
    before, after = _values(ours), _values(theirs)
    reported: dict[str, int] = {}
    count = 0
    for step, name in sorted(before.keys() | after.keys()):
        since = reported.get(name, 0)
        reported[name] = step
        if since < resumed_at < step:
            continue
        if step <= resumed_at and (step, name) not in after:
            continue  # not yet on storage when the process was killed
        count += 1
        one, other = before.get((step, name)), after.get((step, name))
        if one != other and not (_is_nan(one) and _is_nan(other)):
            return count, FirstDifference(step, name, one, other)
    return count, None


def _values(logs: list[dict[str, Any]]) -> dict[tuple[int, str], Any]:
    return {
        (log["step"], name): value
        for log in logs
        for name, value in log.items()
        if not OF_THE_CLOCK.fullmatch(name)
    }


def _position_difference(ours: Manifest, theirs: Manifest) -> FirstDifference | None:
    for name in ("samples_seen", "epoch", "fingerprint"):
        one, other = getattr(ours.position, name), getattr(theirs.position, name)
        if one != other:
            return FirstDifference(ours.step, name, one, other)
    return None


def _same_weights(whole: Catalog, ours: Manifest, resumed: Catalog, theirs: Manifest) -> bool:
    with contextlib.suppress(NoCheckpointError, FileNotFoundError):  # deleted by retention since
        return all(
            one.same
            for one in file_differences(whole, ours, resumed, theirs)
            if one.kind in ("weights", "state")
        )
    return True


def _local(catalog: Catalog, manifest: Manifest, path: str) -> Path:
    """A file of a run that is a folder."""
    return Path(catalog.storage.url.removeprefix("file://"), manifest.folder, path)


def _file_difference(one: Path, other: Path) -> tuple[float | None, str | None]:
    try:
        if one.suffix == ".safetensors":
            return _tensor_files_difference(one, other)
        return _difference(_load(one), _load(other))
    except FileNotFoundError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a parser raises for bytes that it does not know
        reason = str(error).partition("\n")[0][:100]
        return None, f"the bytes differ; the content cannot be compared without unpickling ({reason})"


def _tensor_files_difference(one: Path, other: Path) -> tuple[float | None, str | None]:
    from safetensors import safe_open

    with safe_open(one, "pt") as ours, safe_open(other, "pt") as theirs:
        if set(ours.keys()) != set(theirs.keys()):
            return None, "the tensor names differ"
        worst = 0.0
        for name in ours.keys():  # noqa: SIM118 - not a dict
            found, note = _difference(ours.get_tensor(name), theirs.get_tensor(name))
            if found is None:
                return None, f"{name}: {note}"
            worst = max(worst, found)
        return worst, None


def _load(path: Path) -> Any:
    import numpy as np
    import torch

    # What random states consist of: these build an array from bytes and call nothing else.
    core = np._core if hasattr(np, "_core") else np.core
    known = [core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    with torch.serialization.safe_globals(known):
        return torch.load(path, map_location="cpu", weights_only=True)


def _difference(one: Any, other: Any) -> tuple[float | None, str | None]:
    """Max |difference| over all numbers of two nested values; None and the reason if their structures differ."""
    import numpy as np
    import torch

    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        one, other = torch.from_numpy(one.astype("float64")), torch.from_numpy(other.astype("float64"))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return _tensor_difference(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return None, "the keys differ"
        return _worst((key, one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return None, "the lengths differ"
        return _worst((at, *pair) for at, pair in enumerate(zip(one, other, strict=True)))
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return (
            0.0 if one == other or (_is_nan(one) and _is_nan(other)) else abs(float(one) - float(other))
        ), None
    return (0.0, None) if one == other else (None, f"{str(one)[:40]!r} is not {str(other)[:40]!r}")


def _worst(pairs: Any) -> tuple[float | None, str | None]:
    worst = 0.0
    for name, one, other in pairs:
        found, note = _difference(one, other)
        if found is None:
            return None, f"{str(name)[:100]}: {note}"
        worst = max(worst, found)
    return worst, None


def _tensor_difference(one: Any, other: Any) -> tuple[float | None, str | None]:
    import torch

    if one.shape != other.shape or one.dtype != other.dtype:
        return None, f"{tuple(one.shape)} {one.dtype} is not {tuple(other.shape)} {other.dtype}"
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    if not one.numel():
        return 0.0, None
    ours, theirs = one.double(), other.double()
    equal = (ours == theirs) | (ours.isnan() & theirs.isnan())
    distance = torch.where(equal, 0.0, (ours - theirs).abs())
    # A NaN or an infinity on one side only is an infinite difference.
    return float(torch.nan_to_num(distance, nan=math.inf, posinf=math.inf).max()), None


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
