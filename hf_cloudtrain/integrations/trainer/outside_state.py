"""State that trains, draws or counts outside of what a Trainer's checkpoint holds: in callbacks, data, modules, a loss.

The objects are looked at when the first step begins and at saves, never on the path of a step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hf_cloudtrain.checkpoints.exactness import EXACT, Exactness
from hf_cloudtrain.integrations.trainer.known_trainers import class_name
from hf_cloudtrain.resume.state_look import Look, Looker, changed, may_draw

_STATELESS = ("transformers.", "hf_cloudtrain.")
"""Callbacks of these packages keep nothing that training depends on, or say so as an ExportableState."""
_OF_TORCH = {name for name in vars(torch.nn.Module()) if name != "_buffers"} | {"_buffers", "training"}
_FETCHES = ("__getitem__", "__getitems__", "__iter__", "__call__")
"""What a fetch calls."""
_MOST_HEADER = 100_000_000
"""Bytes of a header of safetensors, by its specification."""
_LOOKED_UP = 1 << 20
"""Values of a buffer that is copied for comparison; larger ones are compared by version."""


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
            *live.values(),
        ]
        self._looker = Looker([*known, *model.parameters(), *model.modules()])
        self._callbacks = {callback: self._looker.look(callback) for callback in self._users_callbacks()}
        self._data = {name: self._looker.look(part) for name, part in self._parts_of_data()}
        self._modules = dict(_module_values(model))
        self._saves = 0
        self._found = EXACT

    def at_save(self, folder: Path) -> Exactness:
        """The findings now. The modules, of which there are many, are looked at in the first, second, fourth … save.

        Args:
            folder: the checkpoint that was just written.
        """
        self._saves += 1
        found = self._of_callbacks() & self._of_data()
        if self._saves & (self._saves - 1) == 0:
            found = found & self._of_modules() & _of_optimizer(self._trainer) & self._of_checkpoint(folder)
        self._found = self._found & found  # what was once seen stays true
        return self._found

    def of_code(self, *, at_epoch_end: bool) -> Exactness:
        """What the code of the data may draw, and has not drawn yet; at the end of an epoch, what callbacks may draw there."""
        if at_epoch_end:
            for callback in self._users_callbacks():
                kind = type(callback)
                if may_draw(kind.on_epoch_begin) or may_draw(kind.on_epoch_end):
                    return Exactness.not_verified(
                        f"the callback {kind.__name__} may draw random numbers between epochs, after this save"
                    )
            return EXACT
        for name, part in self._parts_of_data():
            kind = type(part)
            own = not class_name(part).startswith(("torch.", "transformers.", "datasets.", "builtins."))
            functions = [getattr(kind, method, None) for method in _FETCHES] if own else [part]
            if any(map(may_draw, functions)):
                return Exactness.not_verified(
                    f"{_name_of(part)} ({name}) may draw random numbers, and has not drawn any yet"
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
            if before is not None and (name := changed(before, self._looker.look(callback))):
                return Exactness.not_verified(
                    f"the callback {kind} keeps state ({name!r}) that changes in training, and no checkpoint has it"
                )
        return EXACT

    def _parts_of_data(self) -> Iterator[tuple[str, Any]]:
        trainer = self._trainer
        for name in ("train_dataset", "data_collator", "compute_loss_func"):
            part = getattr(trainer, name, None)
            if part is None or class_name(part).startswith("datasets.iterable_dataset"):
                continue
            if class_name(part).startswith("datasets."):
                part = (getattr(part, "_format_kwargs", None) or {}).get("transform")
            yield name, part

    def _of_data(self) -> Exactness:
        for name, part in self._parts_of_data():
            if name in self._data and (found := changed(self._data[name], self._looker.look(part))):
                return Exactness.not_verified(
                    f"{_name_of(part)} ({name}) keeps state ({found!r}) that changes in training, and no checkpoint has it"
                )
        return EXACT

    def _of_modules(self) -> Exactness:
        now = dict(_module_values(self._trainer.model))
        for name in {**self._modules, **now}:
            if not _same(self._modules.get(name), now.get(name)):
                return Exactness.not_verified(
                    f"{name} of the model changes in training, and no checkpoint has it"
                )
        return EXACT

    def _of_checkpoint(self, folder: Path) -> Exactness:
        trainer = self._trainer
        if hasattr(trainer.model, "peft_config"):
            return _of_adapter(trainer.model)
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            return EXACT
        saved = _names_in(folder)
        missing = sorted(_names_of(trainer.model, saved)) if saved else []
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
    held = {id(one) for model in (trainer.model, trainer.model_wrapped) for one in model.parameters()}
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


def _of_adapter(model: Any) -> Exactness:
    """Parameters that are trained and that the checkpoint of an adapter leaves out."""
    if not hasattr(model, "peft_config") or not hasattr(model, "active_adapters"):
        return EXACT
    from peft import get_peft_model_state_dict

    names = {name for name, one in model.named_parameters() if one.requires_grad}
    pointers = {
        one.data_ptr()
        for adapter in model.peft_config
        for one in get_peft_model_state_dict(model, adapter_name=adapter).values()
    }
    left_out = sorted(name for name in names if model.get_parameter(name).data_ptr() not in pointers)
    if not left_out:
        return EXACT
    return Exactness.no(
        f"{len(left_out)} trained tensor{'s' * (len(left_out) > 1)} outside of the adapter, such as {left_out[0]!r}, are not "
        "in its checkpoint"
    )


def _names_in(folder: Path) -> set[str]:
    """Names of the tensors in the safetensors files of a checkpoint, by its index or header; empty without one."""
    try:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            return set(json.loads(index.read_text())["weight_map"])
        with open(folder / "model.safetensors", "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return set(json.loads(file.read(size))) if size < _MOST_HEADER else set()
    except (OSError, ValueError, KeyError):
        return set()


def _names_of(model: Any, saved: set[str]) -> set[str]:
    """Names of the model's tensors that are not in `saved`, under any of the names that share a tensor."""
    by_memory: dict[Any, list[str]] = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            key = (tensor.device, tensor.data_ptr()) if tensor.numel() else name
            by_memory.setdefault(key, []).append(name)
    return {names[0] for names in by_memory.values() if not saved.intersection(names)}


def _module_values(model: Any) -> Iterator[tuple[str, Any]]:
    """Numbers and tensors of modules that are in no state dict; under an adapter, all buffers of the model."""
    looker, partly = Looker(), hasattr(model, "peft_config")
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.distributed."):
            continue
        left_out = module._buffers if partly else module._non_persistent_buffers_set
        for name in left_out:
            if (buffer := module._buffers.get(name)) is not None:
                yield (
                    f"{path}.{name}",
                    buffer.detach().clone() if buffer.numel() <= _LOOKED_UP else buffer._version,
                )
        plain = {
            name: value
            for name, value in vars(module).items()
            if name not in _OF_TORCH and isinstance(value, (int, float, torch.Tensor, torch.Generator))
        }
        seen: Look = {name: looker._seen(value, 0) for name, value in plain.items()}
        for name, value in seen.items():
            yield f"{name!r} of {type(module).__name__}{_at(path)}", value


def _at(path: str) -> str:
    return f" ({path})" if path else ""


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    return type(one) is type(other) and bool(one == other)


def _name_of(part: Any) -> str:
    return getattr(part, "__name__", None) or type(part).__name__
