"""The files of a loop's checkpoint: what Accelerate writes, made loadable by `from_pretrained`, and where training stands.

model.safetensors, config.json, tokenizer.json …    the unwrapped model and its processing class
optimizer.bin, scheduler.bin, random_states_0.pkl, custom_checkpoint_0.pkl …    as `accelerator.save_state` names them
training_state.json     epoch, step, best metric, script arguments, seed, and the log of the epochs so far
loop_state_0.pt         one per process: its position in the data and its random states
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
import logging
import math
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from hf_cloudtrain.checkpoints.manifest import decode_record
from hf_cloudtrain.errors import ConfigurationError, ManifestError
from hf_cloudtrain.resume.module_state import bare_model
from hf_cloudtrain.runtime.files import is_left_over, temp_suffix, write_whole
from hf_cloudtrain.runtime.redaction import SECRET_NAME, redact
from hf_cloudtrain.runtime.values import finite, utf8
from hf_cloudtrain.storage.names import LOCAL

logger = logging.getLogger(__name__)

TRAINING_STATE = "training_state.json"
_FORMAT = "hf_cloudtrain.loop/1"
_RESUME_ONLY = re.compile(
    r"(optimizer|scheduler|sampler|dl_state_dict)(_\d+)?\.bin|scaler\.pt|random_states_\d+\.pkl"
    r"|custom_checkpoint_\d+\.pkl|loop_state_\d+\.pt"
)
_OF_A_RANK = re.compile(r"(?:random_states_(\d+)\.pkl|loop_state_(\d+)\.pt)")
LogFormat = Literal["records", "epochs"]
_SMALL_FILE = 2**20
"""Bytes below which a file is copied rather than linked, because people edit such files in place."""


@dataclass
class LoopState:
    """Where training stands, as `training_state.json` records it for people and for the next attempt."""

    epoch: int = 0
    """Complete epochs, which is the number of the next one."""
    step: int = 0
    """Optimizer steps so far."""
    batches: int = 0
    """Batches of this epoch that each process has trained on; 0 between epochs."""
    nonce: str = ""
    """Of this save; its manifest has the same one."""
    best_metric: float | None = None
    best_step: int | None = None
    best_nonce: str = ""
    seed: int = 0
    """The seed of torch."""
    script_args: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    """One record an epoch."""
    log_format: LogFormat = "records"
    """How `log.json` shows them: a run keeps the form that it began with."""
    sums: dict[str, Any] = field(default_factory=dict)
    """Sums of what was logged since the last report and in this epoch."""

    def encode(self) -> str:
        """The JSON of `training_state.json`."""
        return (
            utf8(json.dumps({"format": _FORMAT, **asdict(self)}, indent=2, ensure_ascii=False, default=str))
            + "\n"
        )

    def write_log(self, output_dir: Path) -> None:
        """Write `log.json`, so that a reader sees either the old one or the new one."""
        log = _by_epoch(self.log) if self.log_format == "epochs" else self.log
        text = utf8(json.dumps(finite(log), indent=2, ensure_ascii=False, allow_nan=False)) + "\n"
        write_whole(output_dir / "log.json", text.encode())

    @classmethod
    def read(cls, folder: Path) -> LoopState:
        """The state in a checkpoint folder.

        Raises:
            ManifestError: it is missing or damaged.
        """
        what = f"training state in {str(folder)!r}"
        try:
            record = decode_record((folder / TRAINING_STATE).read_bytes(), what)
        except FileNotFoundError:
            raise ManifestError(
                f"{str(folder)!r} holds no {TRAINING_STATE!r}: it was not saved by a TrainLoop. Resume this run with the API "
                "that saved it, or give the loop a different run URL."
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
            log_format="epochs" if record.get("log_format") == "epochs" else "records",
            sums=record.get("sums") or {},
        )


@dataclass(frozen=True)
class BestMetric:
    """The metric that decides which checkpoint is the best."""

    name: str | None
    greater_is_better: bool

    @classmethod
    def of(cls, name: str | None, *, greater_is_better: bool | None) -> BestMetric:
        """Less is better for a metric whose name ends in `loss`, where the user does not say."""
        return cls(
            name, not (name or "").endswith("loss") if greater_is_better is None else greater_is_better
        )

    def judge(self, metrics: dict[str, float], state: LoopState) -> tuple[bool, str | None]:
        """Whether these metrics are the best so far, and what is wrong with them."""
        if self.name is None:
            return False, None
        name = self._found_in(metrics)
        if name is None:
            near = difflib.get_close_matches(self.name, metrics, n=1, cutoff=0.0)
            hint = f"; the nearest is {near[0]!r}." if near else ", which are empty."
            return (
                False,
                f"metric_for_best_model={self.name!r} is not among the metrics given to end_epoch{hint}",
            )
        value = metrics[name]
        if not math.isfinite(value):
            logger.warning("%s is %s in epoch %d, so it cannot be the best.", name, value, state.epoch)
            return False, None
        if state.best_metric is None:
            return True, None
        return value > state.best_metric if self.greater_is_better else value < state.best_metric, None

    def value_in(self, metrics: dict[str, float]) -> float:
        """Its value among metrics that hold it."""
        return metrics[self._found_in(metrics) or ""]

    def _found_in(self, metrics: dict[str, float]) -> str | None:
        wanted = str(self.name)
        names = (wanted, f"eval_{wanted}", wanted.removeprefix("eval_"))
        return next((name for name in names if name in metrics), None)


def write_state(accelerator: Any, folder: Path) -> None:
    """Write the whole state of Accelerate, on every rank."""
    with (
        _plain_naming(accelerator),
        _without_loaders(accelerator),
        _hooked(accelerator.register_save_state_pre_hook(_unwrap_weights(accelerator))),
    ):
        accelerator.save_state(str(folder))


def repair_state(accelerator: Any, folder: Path, processing_class: Any) -> None:
    """Fix the files that all ranks wrote under one name, and add those that `from_pretrained` needs; on one rank, when all have written."""
    import torch

    if accelerator.scaler is not None:
        torch.save(accelerator.scaler.state_dict(), folder / "scaler.pt")
    model = bare_model(accelerator, accelerator._models[0])
    config: Any = getattr(model, "config", None)
    if getattr(config, "architectures", "") is None and not _is_adapter(model):
        # As save_pretrained writes it; from it a server knows the task of a model that was made from a configuration.
        config = copy.copy(config)
        config.architectures = [type(model).__name__]
    for part in (config, getattr(model, "generation_config", None), processing_class):
        if part is not None and hasattr(part, "save_pretrained"):
            part.save_pretrained(str(folder))


def read_state(accelerator: Any, folder: Path) -> None:
    """Set everything that `write_state` wrote, on every rank."""
    with (
        _without_loaders(accelerator),
        _hooked(accelerator.register_load_state_pre_hook(_unwrap_models(accelerator))),
    ):
        accelerator.load_state(str(folder))


def wanted_by(ranks: list[int]) -> Any:
    """Which files a disk needs: all but those of ranks on other disks."""

    def wanted(path: str) -> bool:
        match = _OF_A_RANK.fullmatch(path)
        return match is None or int(match[1] or match[2]) in ranks

    return wanted


def is_for_people(path: str) -> bool:
    """Whether a file of a checkpoint belongs into `best/` and `last/`: the model, but not what only a resume needs."""
    return _RESUME_ONLY.fullmatch(path) is None and not path.startswith("optimizer")


def publish(folder: Path, target: Path) -> Path:
    """Make `target` (`best` or `last`) the model of a checkpoint; returns where the previous one is now, to be deleted.

    It links rather than copies where the disk can, which takes no space and no time.
    """
    beside = target.parent / LOCAL / f"{target.name}-{temp_suffix()}"
    beside.mkdir(parents=True)
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    # The state last: a folder that has it is whole.
    for path in sorted(paths, key=lambda path: path.name == TRAINING_STATE):
        if is_for_people(path.as_posix()):
            (beside / path).parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(folder / path, beside / path)
    gone = target.parent / LOCAL / f"{target.name}-{temp_suffix()}"
    with contextlib.suppress(FileNotFoundError):
        os.rename(target, gone)
    os.rename(beside, target)
    return gone


def repair(output_dir: Path) -> None:
    """Restore `best` and `last` where a killed process had moved them away, and remove what it left unfinished."""
    for name in ("best", "last"):
        left = [path for path in (output_dir / LOCAL).glob(f"{name}-*") if is_left_over(path.name)]
        whole = [path for path in left if (path / TRAINING_STATE).is_file()]
        if whole and not (output_dir / name).exists():
            os.rename(max(whole, key=lambda path: path.stat().st_mtime_ns), output_dir / name)
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
    for path in (*(output_dir / LOCAL).glob("saving-*"), *(output_dir / LOCAL).glob("gone-*")):
        if is_left_over(path.name):
            shutil.rmtree(path, ignore_errors=True)


def storable_args(script_args: dict[str, Any] | None) -> dict[str, Any]:
    """Script arguments as JSON can store them, without secrets."""
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


def check_log_format(name: str) -> None:
    """Refuse a form of `log.json` that is not known."""
    if name not in get_args(LogFormat):
        known = " or ".join(repr(one) for one in get_args(LogFormat))
        raise ConfigurationError(f"log_format={name!r} must be {known}.")


def _by_epoch(log: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        f"Epoch {record.get('epoch')}": {
            "train_log": record.get("train", {}),
            "valid_log": record.get("valid", {}),
        }
        for record in log
    }


@contextlib.contextmanager
def _plain_naming(accelerator: Any) -> Iterator[None]:
    """With automatic naming, `save_state` would choose the folder itself, and delete before it writes."""
    configuration = accelerator.project_configuration
    automatic, configuration.automatic_checkpoint_naming = configuration.automatic_checkpoint_naming, False
    try:
        yield
    finally:
        configuration.automatic_checkpoint_naming = automatic


@contextlib.contextmanager
def _without_loaders(accelerator: Any) -> Iterator[None]:
    """A stateful loader that is asked for its state begins its next iteration, and draws random numbers for it.

    The position in the training data is in `loop_state_<rank>.pt`; no other loader is in the middle of an iteration.
    """
    loaders, accelerator._dataloaders = accelerator._dataloaders, []
    try:
        yield
    finally:
        accelerator._dataloaders = loaders


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
            model = bare_model(accelerator, wrapped)
            if _is_adapter(model) and len(models) == 1:
                if accelerator.is_main_process:
                    model.save_pretrained(folder)  # the adapter alone: the base model is where it came from
                weights.clear()
                return
            tied = getattr(model, "all_tied_weights_keys", None) or {}
            state = model.state_dict()
            # Of tied weights, keep the name that from_pretrained ties the others to. Accelerate handles other shared and
            # non-contiguous tensors, but only in an OrderedDict.
            weights[index] = OrderedDict(
                (name, value) for name, value in state.items() if name not in tied or tied[name] not in state
            )

    return hook


def _unwrap_models(accelerator: Any) -> Any:
    def hook(models: list[Any], folder: str) -> None:
        for index, wrapped in enumerate(models):
            model = bare_model(accelerator, wrapped)
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
