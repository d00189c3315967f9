"""What a model keeps outside of its checkpoint: buffers that are not persistent, numbers, containers, random generators.

It is compared from the first step on, at the first, second, fourth … save: a large model has thousands of modules.
"""

from __future__ import annotations

import functools
import itertools
import types
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from operator import is_, itemgetter
from typing import Any

import torch

from hf_cloudtrain.checkpoints.exactness import EXACT, Exactness
from hf_cloudtrain.resume.script_code import functions_of, is_of_the_script
from hf_cloudtrain.resume.state_look import Look, Looker, changed, is_generator

_OF_TORCH = {name for name in vars(torch.nn.Module()) if name != "_buffers"} | {"_buffers", "training"}
_NUMBERS, _CONTAINERS = (int, float, torch.Tensor), (list, tuple, dict, set, deque)
_Key = str | tuple[str, type]
"""What was looked at: its name, or the path and class of a module."""
_Seen = dict[_Key, Any]
_FIRST, _ABSENT = itemgetter(0), itertools.repeat(object())
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
        self._modules = modules_in(model)
        self._code = _code_of(self._modules)
        # The checkpoint of an adapter has no buffer of the model.
        self._buffers = "_buffers" if hasattr(model, "peft_config") else "_non_persistent_buffers_set"
        self._parts = [_Part(*place, self._seen(*place), self._buffers) for place in self._named()]
        self._used = self._used_by(self._code)

    def look(self) -> Exactness:
        """Compare with the first step. Training waits for this, and most modules are only asked whether they can have changed."""
        modules = modules_in(self._model)
        if len(modules) == len(self._modules) and all(map(is_, modules, self._modules)):
            parts, code = [part for part in self._parts if not part.is_unchanged()], self._code
            places = [(part.path, part.module) for part in parts]
        else:
            parts, code = self._parts, _code_of(modules)
            places = list(self._named())
        before = _united(part.seen for part in parts) | self._used
        now = _united(self._seen(*place) for place in places) | self._used_by(code)
        for key in (*now, *(before.keys() - now.keys())):
            one, other = before.get(key), now.get(key)
            if not _same(one, other):
                name = _name(key, one, other)
                return Exactness.not_verified(f"{name} changes in training, and no checkpoint has it")
        return EXACT

    def _named(self) -> Iterator[tuple[str, Any]]:
        for path, module in self._model.named_modules():
            if not type(module).__module__.startswith("torch.distributed."):
                yield path, module

    def _seen(self, path: str, module: Any) -> _Seen:
        found: _Seen = {}
        for name in getattr(module, self._buffers):
            if (buffer := module._buffers.get(name)) is not None:
                small = buffer.numel() <= _COPIED
                look = buffer.detach().clone() if small else self._looker.seen(buffer)
                found[f"{path}.{name} of the model"] = look
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if is_of_the_script(getattr(hook, "__module__", None) or type(hook).__module__):
                for name, value in self._looker.look(hook).items():
                    found[f"{name!r} of a hook of {type(module).__name__} of the model"] = value
        values = vars(module)
        seen = {name: self._looker.seen(values[name]) for name in _kept_by(module)}
        if module._parameters:
            seen[_TRAINED] = _trained(module)
        if seen:
            found[path, type(module)] = seen
        return found

    def _used_by(self, code: dict[type, list[types.FunctionType]]) -> _Seen:
        """What the code of modules uses from outside."""
        return {
            f"{name!r}, which {kind.__name__} of the model uses,": value
            for kind, functions in code.items()
            for function in functions
            for name, value in self._looker.used_by(function).items()
        }


class _Part:
    """A module as it was when the first step began.

    Args:
        seen: what it looked like.
        buffers: the attribute that has the names of its buffers that no checkpoint holds.
    """

    def __init__(self, path: str, module: Any, seen: _Seen, buffers: str) -> None:
        self.path, self.module, self.seen = path, module, seen
        held = vars(module)
        self._buffers = buffers
        # A hook may remove itself, and keep state that the script's next start has not.
        inside = getattr(module, buffers) or module._forward_hooks or module._forward_pre_hooks
        self._changes_inside = bool(inside) or not all(
            isinstance(held[name], (int, float)) for name in _kept_by(module)
        )
        own = {} if self._changes_inside else {n: value for n, value in held.items() if n not in _OF_TORCH}
        self._names, self._held = [*own], [*own.values()]  # kept alive, so that no id is used again
        self._size, self._trained = len(held), _trained(module)

    def is_unchanged(self) -> bool:
        """Whether nothing was assigned to it, and it holds nothing that changes in place. Takes 1 us, a look ten times as long."""
        module = self.module
        if self._changes_inside or getattr(module, self._buffers):
            return False
        if module._forward_hooks or module._forward_pre_hooks:
            return False
        held = vars(module)
        return (
            len(held) == self._size
            and all(map(is_, map(held.get, self._names, _ABSENT), self._held))
            and _trained(module) == self._trained
        )


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


def modules_in(model: torch.nn.Module) -> list[torch.nn.Module]:
    """All modules, without their names: in a tenth of the time that `model.modules()` takes."""
    found, seen = [model], {model}
    for module in found:  # which grows
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def tensors_in(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """All parameters and buffers; one that two modules share comes twice. In one pass, and without their names."""
    for module in modules_in(model):
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


def _code_of(modules: Iterable[Any]) -> dict[type, list[types.FunctionType]]:
    """The functions that modules of classes of the script run, by class."""
    kinds = {type(module): None for module in modules}
    return {
        kind: list(functions_of(getattr(kind, "forward", None)))
        for kind in kinds
        if is_of_the_script(kind.__module__)
    }


def _kept_by(module: Any) -> list[str]:
    """The attributes of a module that are looked at."""
    own = is_of_the_script(type(module).__module__)
    return [
        name
        for name, value in sorted(vars(module).items(), key=_FIRST)
        if name not in _OF_TORCH
        and (isinstance(value, _NUMBERS) or (own and _may_keep(value)) or is_generator(value))
    ]


def _trained(module: Any) -> list[bool]:
    return [one.requires_grad for one in module._parameters.values() if one is not None]


def _united(looks: Iterable[_Seen]) -> _Seen:
    return {key: value for look in looks for key, value in look.items()}


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
