"""State that trains, draws or counts outside of what a Trainer's checkpoint holds: in callbacks, data, modules, a loss.

The objects are looked at when the first step begins and at saves, never on the path of a step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_cloudtrain.checkpoints.exactness import EXACT, Exactness
from hf_cloudtrain.integrations.trainer.known_trainers import class_name
from hf_cloudtrain.resume.module_state import (
    ModuleState,
    OptimizerState,
    of_adapter,
    schedule_rules,
    tensors_in,
)
from hf_cloudtrain.resume.script_code import may_draw, may_seed
from hf_cloudtrain.resume.state_look import Looker, StateLook, changed, name_of, script_parts

_STATELESS = ("transformers.", "hf_cloudtrain.")
"""Callbacks of these packages keep nothing that training depends on, or say so as an ExportableState."""
_EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]
_MOST_HEADER = 100_000_000
"""Bytes of a header of safetensors, by its specification."""


class OutsideState:
    """What was seen outside of the checkpoint, from the first step on.

    Args:
        trainer: a transformers.Trainer.
        live: what Trainer passes to callbacks.
    """

    def __init__(self, trainer: Any, live: dict[str, Any]) -> None:
        self._trainer = trainer
        model = trainer.model
        names = (
            "model",
            "model_wrapped",
            "args",
            "optimizer",
            "lr_scheduler",
            "train_dataset",
            "eval_dataset",
        )
        known = [getattr(trainer, name, None) for name in (*names, "processing_class", "state", "control")]
        known += [
            trainer,
            trainer.callback_handler,
            trainer.accelerator,
            trainer.data_collator,
            getattr(trainer.optimizer, "optimizer", None),
            *live.values(),
        ]
        self._looker = Looker([*known, *model.parameters(), *model.modules()])
        self._callbacks = {
            callback: self._looker.look(callback, _EVENTS) for callback in self._users_callbacks()
        }
        self._data = StateLook(self._looker, self._parts_of_data())
        self._code = self._of_code()
        self._modules, self._optimizer = ModuleState(model), OptimizerState(trainer.optimizer)
        self._weights = [] if _finds_its_weights(trainer) else _names_of(model)
        """Names of each tensor that Trainer loads by the names of the model."""
        self._saves = 0
        self._found = EXACT

    def at_save(self, folder: Path, staged: dict[str, set[str]]) -> Exactness:
        """The findings now. The modules, of which there are many, are looked at in the first, second, fourth … save.

        Args:
            folder: the checkpoint that was just written.
            staged: names of the tensors in those of its files that are not written yet.
        """
        self._saves += 1
        found = self._of_callbacks() & self._data.look()
        if self._saves & (self._saves - 1) == 0:
            found = (
                found
                & self._modules.look()
                & self._optimizer.look()
                & _of_optimizer(self._trainer)
                & self._of_checkpoint(folder, staged)
            )
        self._found = self._found & found  # what was once seen stays true
        return self._found

    def of_code(self, *, at_epoch_end: bool) -> Exactness:
        """What the code of the data may draw, and has not drawn yet; at the end of an epoch, what callbacks may draw there."""
        if at_epoch_end:
            args, events = self._trainer.args, ["on_epoch_begin", "on_epoch_end"]
            if args.logging_strategy == IntervalStrategy.EPOCH and args.save_strategy == SaveStrategy.STEPS:
                events.append("on_log")  # after the save of the epoch's last step
            for callback in self._users_callbacks():
                if may_draw(callback, events):
                    return Exactness.not_verified(
                        f"the callback {type(callback).__name__} may draw random numbers between epochs, after this save"
                    )
            return EXACT
        return self._code

    def _of_code(self) -> Exactness:
        for name, part in self._parts_of_data():
            if may_draw(part):
                return Exactness.not_verified(
                    f"{name_of(part)} ({name}) may draw random numbers, and has not drawn any yet"
                )
        return EXACT

    def _users_callbacks(self) -> list[Any]:
        from transformers.trainer_callback import ExportableState

        found = self._trainer.callback_handler.callbacks
        return [
            one
            for one in found
            if not isinstance(one, ExportableState) and not class_name(one).startswith(_STATELESS)
        ]

    def _of_callbacks(self) -> Exactness:
        for callback in self._users_callbacks():
            kind = type(callback).__name__
            if name := self._looker.held(callback):
                return Exactness.not_verified(
                    f"the callback {kind} holds tensors, modules or generators ({name!r}), which no checkpoint has"
                )
            before = self._callbacks.get(callback)
            if before is not None and (name := changed(before, self._looker.look(callback, _EVENTS))):
                return Exactness.not_verified(
                    f"the callback {kind} keeps state ({name!r}) that changes in training, and no checkpoint has it"
                )
        return EXACT

    def _parts_of_data(self) -> Iterator[tuple[str, Any]]:
        trainer = self._trainer
        for name in ("train_dataset", "data_collator", "compute_loss_func"):
            for part in script_parts(getattr(trainer, name, None)):
                yield name, part
        yield from schedule_rules(trainer.lr_scheduler)

    def seeds(self) -> str | None:
        """The part of the data whose code seeds random numbers as batches are fetched."""
        return next((name_of(part) for _, part in self._parts_of_data() if may_seed(part)), None)

    def _of_checkpoint(self, folder: Path, staged: dict[str, set[str]]) -> Exactness:
        trainer = self._trainer
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:  # asking for names there is a collective
            if hasattr(trainer.model, "peft_config"):
                return Exactness.not_verified(
                    "which weights the checkpoint of a sharded model with an adapter holds is not looked at"
                )
            return EXACT
        if hasattr(trainer.model, "peft_config"):
            return of_adapter(trainer.model, _names_in(folder, staged, "adapter_model"))
        saved = _names_in(folder, staged) if self._weights else set()
        missing = sorted(names[0] for names in self._weights if saved.isdisjoint(names)) if saved else []
        if not missing:
            return EXACT
        return Exactness.no(
            f"the checkpoint has other names for {len(missing)} weights, such as {missing[0]!r}, and Trainer loads them by the "
            "names of the model, so they start over"
        )


def _of_optimizer(trainer: Any) -> Exactness:
    """Parameters that the optimizer trains and no checkpoint holds, such as those of a loss."""
    if trainer.is_deepspeed_enabled or trainer.optimizer is None:
        return EXACT
    models = {id(model): model for model in (trainer.model, trainer.model_wrapped)}.values()
    held = {id(one) for model in models for one in tensors_in(model)}
    foreign = [
        one for group in trainer.optimizer.param_groups for one in group["params"] if id(one) not in held
    ]
    if not foreign:
        return EXACT
    shapes = ", ".join(str(tuple(one.shape)) for one in foreign[:3])
    return Exactness.no(
        f"the optimizer trains {len(foreign)} tensor{'s' * (len(foreign) > 1)} outside of the model, which no checkpoint "
        f"holds (of shape {shapes}{', …' * (len(foreign) > 3)})"
    )


def _names_in(folder: Path, staged: dict[str, set[str]], name: str = "model") -> set[str]:
    """Names of the tensors in the safetensors files of a checkpoint, by its index or header; empty without one."""
    if (path := f"{name}.safetensors") in staged:
        return staged[path]
    try:
        index = folder / f"{name}.safetensors.index.json"
        if index.is_file():
            return set(json.loads(index.read_text())["weight_map"])
        with open(folder / path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return set(json.loads(file.read(size))) if size < _MOST_HEADER else set()
    except (OSError, ValueError, KeyError):
        return set()


def _names_of(model: Any) -> list[list[str]]:
    """Of each tensor in the state of a model, all names that it has."""
    by_memory: dict[Any, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():  # detached copies take longer than the rest
        if isinstance(tensor, torch.Tensor):
            key = (tensor.device, tensor.data_ptr()) if tensor.numel() else name
            by_memory.setdefault(key, []).append(name)
    return list(by_memory.values())


def _finds_its_weights(trainer: Any) -> bool:
    """Whether a trainer loads its weights in another way than by the names of its model.

    Its class is in the table of those that were tested then, or not verified. Of a sharded model, asking for names is a
    collective.
    """
    own = type(trainer)._load_from_checkpoint is not Trainer._load_from_checkpoint
    return bool(
        own
        or trainer.is_deepspeed_enabled
        or trainer.is_fsdp_enabled
        or hasattr(trainer.model, "peft_config")
    )
