"""A loop's checkpoint folder: what Accelerate writes, made loadable by `from_pretrained`, and where training stands.

model.safetensors, config.json, tokenizer.json …    the unwrapped model and its processing class
optimizer.bin, scheduler.bin, random_states_0.pkl, custom_checkpoint_0.pkl …    as `accelerator.save_state` names them
training_state.json     epoch, step, best metric, script arguments, seed, and the log of the epochs so far
loop_state_0.pt         one per process: its place in the data and its random states
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_cloudtrain.checkpoints.manifest import decode_record
from hf_cloudtrain.errors import ManifestError
from hf_cloudtrain.runtime.files import is_left_over, temp_suffix
from hf_cloudtrain.runtime.redaction import SECRET_NAME, redact
from hf_cloudtrain.storage.names import META

TRAINING_STATE = "training_state.json"
_FORMAT = "hf_cloudtrain.loop/1"
_RESUME_ONLY = re.compile(
    r"(optimizer|scheduler|sampler|dl_state_dict)(_\d+)?\.bin|scaler\.pt|random_states_\d+\.pkl"
    r"|custom_checkpoint_\d+\.pkl|loop_state_\d+\.pt"
)
_OF_A_RANK = re.compile(r"(?:random_states_(\d+)\.pkl|loop_state_(\d+)\.pt)")
_SMALL_FILE = 2**20
"""Bytes below which a file is copied rather than linked, because people edit such files in place."""


@dataclass
class LoopState:
    """Where training stands, as `training_state.json` says it to people and to the next attempt."""

    epoch: int = 0
    """Epochs that are complete: the number of the one to go on with."""
    step: int = 0
    """Optimizer steps so far."""
    batches: int = 0
    """Batches of this epoch that each process has trained on; 0 between epochs."""
    nonce: str = ""
    """Of this save; its manifest has the same."""
    best_metric: float | None = None
    best_step: int | None = None
    best_nonce: str = ""
    seed: int = 0
    """What torch was seeded with."""
    script_args: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    """One record an epoch, as in `log.json`."""
    sums: dict[str, Any] = field(default_factory=dict)
    """What was logged since the last report and in this epoch."""

    def encode(self) -> str:
        """The JSON of `training_state.json`."""
        return (
            json.dumps({"format": _FORMAT, **asdict(self)}, indent=2, ensure_ascii=False, default=str) + "\n"
        )

    def write_log(self, output_dir: Path) -> None:
        """Write `log.json`, so that a reader sees the old one or the new one."""
        path = output_dir / "log.json"
        beside = path.with_name(f".{path.name}.tmp")
        beside.write_text(json.dumps(self.log, indent=2, ensure_ascii=False) + "\n")
        os.replace(beside, path)

    @classmethod
    def read(cls, folder: Path) -> LoopState:
        """The state in a checkpoint folder.

        Raises:
            ManifestError: there is none, or it is damaged.
        """
        what = f"training state in {str(folder)!r}"
        try:
            record = decode_record((folder / TRAINING_STATE).read_bytes(), what)
        except FileNotFoundError:
            raise ManifestError(
                f"{str(folder)!r} holds no {TRAINING_STATE!r}: it was not saved by a TrainLoop. Resume this run with what "
                "saved it, or give the loop a run URL of its own."
            ) from None
        if record.get("format") != _FORMAT:
            raise ManifestError(
                f"The {what} has the format {str(record.get('format'))[:50]!r}, not {_FORMAT!r}."
            )
        counts = {name: record.get(name) for name in ("epoch", "step", "batches")}
        if not all(type(count) is int and 0 <= count < 2**53 for count in counts.values()):
            raise ManifestError(f"The {what} is damaged: {counts} are not counts.")
        best, best_step, log = record.get("best_metric"), record.get("best_step"), record.get("log")
        seed = record.get("seed")
        return cls(
            **counts,  # type: ignore[arg-type]
            best_metric=float(best) if isinstance(best, (int, float)) and math.isfinite(best) else None,
            best_step=best_step if type(best_step) is int else None,
            nonce=str(record.get("nonce"))[:200],
            best_nonce=str(record.get("best_nonce"))[:200],
            seed=seed if type(seed) is int else 0,
            log=[item for item in log if isinstance(item, dict)] if isinstance(log, list) else [],
            sums=record.get("sums") or {},
        )


def write_state(accelerator: Any, folder: Path) -> None:
    """Write everything that Accelerate knows, on every rank."""
    with (
        _plain_naming(accelerator),
        _hooked(accelerator.register_save_state_pre_hook(_unwrap_weights(accelerator))),
    ):
        accelerator.save_state(str(folder))


def repair_state(accelerator: Any, folder: Path, processing_class: Any) -> None:
    """What all ranks have written to one name, and what `from_pretrained` needs; on one rank, when all have written."""
    import torch

    for path in folder.glob("dl_state_dict*.bin"):
        path.unlink()  # the last writer's; ours are in loop_state_<rank>.pt
    if accelerator.scaler is not None:
        torch.save(accelerator.scaler.state_dict(), folder / "scaler.pt")
    model = accelerator.unwrap_model(accelerator._models[0])
    for part in (getattr(model, "config", None), getattr(model, "generation_config", None), processing_class):
        if part is not None and hasattr(part, "save_pretrained"):
            part.save_pretrained(str(folder))


def read_state(accelerator: Any, folder: Path) -> None:
    """Set everything that `write_state` wrote, on every rank."""
    with _hooked(accelerator.register_load_state_pre_hook(_unwrap_models(accelerator))):
        accelerator.load_state(str(folder))


def wanted_by(ranks: list[int]) -> Any:
    """Which files a disk needs: everything but what belongs to ranks elsewhere."""

    def wanted(path: str) -> bool:
        match = _OF_A_RANK.fullmatch(path)
        return match is None or int(match[1] or match[2]) in ranks

    return wanted


def is_for_people(path: str) -> bool:
    """Whether a file of a checkpoint belongs into `best/` and `last/`: the model, not what only a resume needs."""
    return _RESUME_ONLY.fullmatch(path) is None and not path.startswith("optimizer")


def publish(folder: Path, target: Path) -> None:
    """Make `target` (`best` or `last`) the model of a checkpoint. The one before goes when the new one is whole.

    Links, not copies, where the disk can: it costs no space and no time.
    """
    beside = target.parent / META / f"{target.name}-{temp_suffix()}"
    beside.mkdir(parents=True)
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    # The state last: a folder that holds it is whole.
    for path in sorted(paths, key=lambda path: path.name == TRAINING_STATE):
        if is_for_people(path.as_posix()):
            (beside / path).parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(folder / path, beside / path)
    gone = target.parent / META / f"{target.name}-{temp_suffix()}"
    with contextlib.suppress(FileNotFoundError):
        os.rename(target, gone)
    os.rename(beside, target)
    remove_later(gone)


def remove_later(folder: Path) -> None:
    """Give the space back in a thread: gigabytes take the disk longer than a save may."""
    threading.Thread(target=shutil.rmtree, args=(folder, True), name="cloudtrain-rm", daemon=True).start()


def repair(output_dir: Path) -> None:
    """Give `best` and `last` back what a killed process had moved away, and remove what it left half-made."""
    for name in ("best", "last"):
        left = [path for path in (output_dir / META).glob(f"{name}-*") if is_left_over(path.name)]
        whole = [path for path in left if (path / TRAINING_STATE).is_file()]
        if whole and not (output_dir / name).exists():
            os.rename(max(whole, key=lambda path: path.stat().st_mtime_ns), output_dir / name)
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
    for path in (*(output_dir / META).glob("saving-*"), *(output_dir / META).glob("gone-*")):
        if is_left_over(path.name):
            shutil.rmtree(path, ignore_errors=True)


def storable_args(script_args: dict[str, Any] | None) -> dict[str, Any]:
    """Script arguments as JSON can hold them, without secrets."""
    kept: dict[str, Any] = {}
    for name, value in (script_args or {}).items():
        if SECRET_NAME.search(str(name)) and isinstance(value, (str, dict)):
            kept[str(name)] = "***"
        elif (
            value is None
            or isinstance(value, (bool, int))
            or (isinstance(value, float) and math.isfinite(value))
        ):
            kept[str(name)] = value
        else:
            kept[str(name)] = redact(str(value))[:2000]
    return kept


@contextlib.contextmanager
def _plain_naming(accelerator: Any) -> Iterator[None]:
    """With automatic naming, `save_state` writes to a folder of its own choice, and deletes before it writes."""
    configuration = accelerator.project_configuration
    automatic, configuration.automatic_checkpoint_naming = configuration.automatic_checkpoint_naming, False
    try:
        yield
    finally:
        configuration.automatic_checkpoint_naming = automatic


@contextlib.contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _unwrap_weights(accelerator: Any) -> Any:
    """A hook that gives the weights the names of the bare model, which `from_pretrained` knows."""

    def hook(models: list[Any], weights: list[Any], folder: str) -> None:
        if len(weights) != len(models):
            return  # sharded, or written by a hook of the user
        for index, wrapped in enumerate(models):
            model = accelerator.unwrap_model(wrapped)
            if _is_adapter(model) and len(models) == 1:
                if accelerator.is_main_process:
                    model.save_pretrained(folder)  # the adapter alone: the base model is where it came from
                weights.clear()
                return
            tied = getattr(model, "all_tied_weights_keys", None) or {}
            state = model.state_dict()
            # Of weights that are one tensor, the name that from_pretrained ties the others to. Accelerate takes care of
            # other shared and of non-contiguous tensors, in an OrderedDict only.
            weights[index] = OrderedDict(
                (name, value) for name, value in state.items() if name not in tied or tied[name] not in state
            )

    return hook


def _unwrap_models(accelerator: Any) -> Any:
    def hook(models: list[Any], folder: str) -> None:
        for index, wrapped in enumerate(models):
            model = accelerator.unwrap_model(wrapped)
            if _is_adapter(model) and len(models) == 1:
                model.load_adapter(folder, adapter_name=model.active_adapter, is_trainable=True)
                models.clear()
                return
            models[index] = model

    return hook


def _is_adapter(model: Any) -> bool:
    return (
        hasattr(model, "peft_config") and hasattr(model, "load_adapter") and hasattr(model, "active_adapter")
    )


def _link_or_copy(source: Path, target: Path) -> None:
    if source.stat().st_size >= _SMALL_FILE:
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)
