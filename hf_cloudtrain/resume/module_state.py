"""What a model keeps outside of its checkpoint: buffers that are not persistent, numbers, containers, random generators.

It is compared from the first step on, at the first, second, fourth … save: a large model has thousands of modules.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch

from hf_cloudtrain.checkpoints.exactness import EXACT, Exactness
from hf_cloudtrain.resume.script_code import functions_of, is_of_the_script
from hf_cloudtrain.resume.state_look import Look, Looker, changed, is_generator

_OF_TORCH = {name for name in vars(torch.nn.Module()) if name != "_buffers"} | {"_buffers", "training"}
_NUMBERS, _CONTAINERS = (int, float, torch.Tensor), (list, tuple, dict, set, deque)
_Key = str | tuple[str, type]
"""What was looked at: its name, or the path and class of a module."""
_TRAINED = "which weights are trained"
"""Beside the names of attributes."""
_COPIED = 1 << 20
"""Values of a buffer that is copied for comparison; larger ones are compared by identity and version."""


class ModuleState:
    """The modules of one model.

    Example:
        >>> modules = ModuleState(model)                 # when the first step begins
        >>> print(modules.look())                        # at a save
        not verified: .mean of the model changes in training, and no checkpoint has it
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._looker = Looker([model, *model.parameters(), *model.modules()])
        self._before = dict(self._values())

    def look(self) -> Exactness:
        """Compare with the first step."""
        now = dict(self._values())
        for key in (*now, *(self._before.keys() - now.keys())):
            before, after = self._before.get(key), now.get(key)
            if not _same(before, after):
                name = _name(key, before, after)
                return Exactness.not_verified(f"{name} changes in training, and no checkpoint has it")
        return EXACT

    def _values(self) -> Iterator[tuple[_Key, Any]]:
        """A large model has thousands of modules, so names are written only for what has changed."""
        kinds: set[type] = set()
        is_adapted = hasattr(self._model, "peft_config")
        for path, module in self._model.named_modules():
            kind = type(module)
            if kind.__module__.startswith("torch.distributed."):
                continue
            # The checkpoint of an adapter has no buffer of the model.
            if names := module._buffers if is_adapted else module._non_persistent_buffers_set:
                yield from self._buffers_of(path, module, names)
            if module._forward_hooks or module._forward_pre_hooks:
                for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                    if is_of_the_script(getattr(hook, "__module__", None) or type(hook).__module__):
                        yield from self._of_hook(hook, module)
            own, values = is_of_the_script(kind.__module__), vars(module)
            seen = {
                name: self._looker.seen(values[name])
                for name in sorted(values.keys() - _OF_TORCH)
                if isinstance(values[name], _NUMBERS)
                or (own and _may_keep(values[name]))
                or is_generator(values[name])
            }
            if module._parameters:
                seen[_TRAINED] = [one.requires_grad for one in module._parameters.values() if one is not None]
            if seen:
                yield (path, kind), seen
            if own and kind not in kinds:
                kinds.add(kind)
                yield from self._used_by(module)

    def _buffers_of(self, path: str, module: Any, names: Iterable[str]) -> Iterator[tuple[_Key, Any]]:
        for name in names:
            if (buffer := module._buffers.get(name)) is not None:
                small = buffer.numel() <= _COPIED
                yield (
                    f"{path}.{name} of the model",
                    buffer.detach().clone() if small else self._looker.seen(buffer),
                )

    def _of_hook(self, hook: Any, module: Any) -> Iterator[tuple[_Key, Any]]:
        for name, value in self._looker.look(hook).items():
            yield f"{name!r} of a hook of {type(module).__name__} of the model", value

    def _used_by(self, module: Any) -> Iterator[tuple[_Key, Any]]:
        """What the code of a module uses from outside."""
        found: Look = {}
        for function in functions_of(getattr(type(module), "forward", None)):
            found.update(self._looker.used_by(function))
        for name, value in found.items():
            yield f"{name!r}, which {type(module).__name__} of the model uses,", value


class OptimizerState:
    """What an optimizer of a class of the script keeps beside its state of each parameter."""

    def __init__(self, optimizer: Any) -> None:
        self._inner = getattr(optimizer, "optimizer", optimizer)  # as Accelerate wraps it
        self._looker = Looker()
        kind = type(self._inner)
        self._is_own = (
            is_of_the_script(kind.__module__) and kind.state_dict is torch.optim.Optimizer.state_dict
        )
        self._before = self._values()

    def look(self) -> Exactness:
        """Compare with the first step."""
        name = changed(self._before, self._values())
        if name is None:
            return EXACT
        return Exactness.not_verified(
            f"{name!r} of the optimizer {type(self._inner).__name__} changes in training, and no checkpoint has it"
        )

    def _values(self) -> Look:
        held = vars(self._inner).items() if self._is_own else ()
        return {
            name: self._looker.seen(value)
            for name, value in held
            if name not in ("state", "param_groups", "defaults") and not name.startswith("_")
            if isinstance(value, (*_NUMBERS, *_CONTAINERS)) or is_generator(value)
        }


def bare_model(accelerator: Any, model: Any) -> Any:
    """As `accelerator.unwrap_model`, which looks at every module of the model: once for each model."""
    kept = _BARE.get(model) if isinstance(model, torch.nn.Module) else None
    bare = None if kept is None else kept()
    if bare is None:
        bare = accelerator.unwrap_model(model)
        if isinstance(model, torch.nn.Module) and isinstance(bare, torch.nn.Module):
            _BARE[model] = weakref.ref(bare)
    return bare


_BARE: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[torch.nn.Module]] = weakref.WeakKeyDictionary()


def tensors_in(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """All parameters and buffers; one that two modules share comes twice. In one pass, and without their names."""
    left, seen = [model], set()
    while left:
        module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        left.extend(child for child in module._modules.values() if child is not None)
        for tensors in (module._parameters, module._buffers):
            yield from (tensor for tensor in tensors.values() if tensor is not None)


def of_adapter(model: Any, names: Collection[str] = ()) -> Exactness:
    """Parameters that are trained and that the checkpoint of an adapter leaves out.

    Args:
        names: of the tensors in the checkpoint, as far as they are known: peft asks the hub whether it adds the embeddings.
    """
    if not hasattr(model, "peft_config") or not hasattr(model, "active_adapters"):
        return EXACT
    from peft import get_peft_model_state_dict

    saved = [
        one
        for adapter in model.peft_config
        for one in get_peft_model_state_dict(
            model, adapter_name=adapter, save_embedding_layers=False
        ).values()
    ]
    pointers = {one.data_ptr() for one in saved}
    left_out = sorted(
        name
        for name, one in model.named_parameters()
        if one.requires_grad and one.data_ptr() not in pointers and name not in names
        if not any(_same(one.detach().cpu(), copy.cpu()) for copy in saved)  # prompts are saved as copies
    )
    if not left_out:
        return EXACT
    more = len(left_out) > 1
    return Exactness.no(
        f"{len(left_out)} trained tensor{'s' * more} outside of the adapter, such as {left_out[0]!r}, {'are' if more else 'is'} "
        "not in its checkpoint"
    )


def schedule_rules(scheduler: Any) -> list[tuple[str, Any]]:
    """The functions of a LambdaLR, whose variables are in no checkpoint; those of an object are."""
    rules = getattr(getattr(scheduler, "scheduler", scheduler), "lr_lambdas", ())
    kinds = (types.FunctionType, types.MethodType, functools.partial)
    return [("lr_lambda", rule) for rule in rules if isinstance(rule, kinds)]


def _may_keep(value: Any) -> bool:
    """Whether an attribute of a module of the script is something that may change in place."""
    kind = type(value)
    return isinstance(value, _CONTAINERS) or kind.__module__ == "numpy" or is_of_the_script(kind.__module__)


def _name(key: _Key, before: Any, after: Any) -> str:
    """What messages call it."""
    if isinstance(key, str):
        return key
    path, kind = key
    attribute = changed(before or {}, after or {})
    if attribute == _TRAINED:
        return f"the choice of trained weights of {path or kind.__name__!r}"
    return f"{attribute!r} of {kind.__name__}{f' ({path})' if path else ''} of the model"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    return type(one) is type(other) and bool(one == other)
