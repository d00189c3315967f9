"""State that a script keeps in its own variables: an average of the weights, or an optimizer that is not prepared.

Accelerate saves what `prepare` and `register_for_checkpointing` have received. Before its first batch and at each save, the
variables of the functions that iterate are compared: a module, an optimizer, a schedule, a gradient scaler or a tensor that has
changed and that Accelerate does not save is named. A frozen teacher, a loss without parameters, or a metric does not change.
To the variables belong those that functions of the script use, and what the prepared models keep beside their weights.
"""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Iterator
from itertools import islice
from types import FrameType, FunctionType, MethodType
from typing import Any

import torch
import xxhash
from torch.utils.data import DataLoader, Dataset, Sampler

from hf_cloudtrain.checkpoints.exactness import EXACT, Exactness
from hf_cloudtrain.resume.dataloaders import generators_of
from hf_cloudtrain.resume.module_state import (
    ModuleState,
    OptimizerState,
    bare_model,
    of_adapter,
    schedule_rules,
    tensors_in,
)
from hf_cloudtrain.resume.random_state import RandomState
from hf_cloudtrain.resume.script_code import (
    content_of,
    functions_of,
    is_library,
    is_of_the_script,
    names_in,
)
from hf_cloudtrain.resume.script_counters import Counted, counted_by, counted_in
from hf_cloudtrain.resume.state_look import Looker, StateLook, is_generator, is_iterator, state_of
from hf_cloudtrain.resume.watched_sampler import WatchedSampler

_HOLD_NO_STATE = frozenset(
    ("accelerate", "datasets", "hf_cloudtrain", "tokenizers", "torchdata", "torcheval", "torchmetrics")
)
"""Packages whose objects are saved by other means, or do not affect the weights."""
_MOST_FRAMES, _MOST_DEPTH, _MOST_ITEMS, _MOST_OBJECTS = 8, 3, 256, 4000
_PLAIN = (int, float, str, bytes, bool, type(None))
_FUNCTIONS = (FunctionType, MethodType, functools.partial)
_SAMPLE = 64
"""Elements of a tensor that are compared, evenly spaced: training changes all of them."""
_SAVE_IT = "call accelerator.register_for_checkpointing(object) for an object with a state_dict"


class OutsideState:
    """What the variables of the script hold besides the state that Accelerate saves.

    Example:
        >>> outside = OutsideState(accelerator)
        >>> outside.begin()                               # before the first batch
        >>> print(outside.look())                         # at a save
        not verified: no checkpoint holds the variable 'ema', which changes: call …
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._seen: dict[tuple[Any, str, type], tuple[Any, bytes]] | None = None
        self._dicts: dict[int, Any] = {}
        """That were there from the first: what comes into them later is kept."""
        self._states: list[ModuleState | OptimizerState | StateLook] = []
        self._saves = 0
        self._tensors: set[int] = set()
        """The parameters and buffers that Accelerate saves, by identity, when they were looked up last."""
        self._found = EXACT

    def begin(self) -> None:
        """Remember the variables of the callers and the models; once."""
        if self._seen is None:
            self._seen = {}
            self._look_up_tensors()
            self._found &= self._compare(sys._getframe(1), is_first=True)
            self._states = [
                *map(ModuleState, self._bare_models()),
                *map(OptimizerState, self._accelerator._optimizers),
                *(StateLook(Looker(), schedule_rules(one)) for one in self._accelerator._schedulers),
            ]

    def look(self) -> Exactness:
        """Compare with what was remembered. What was found once stays found."""
        self._saves += 1
        seldom = self._saves & (self._saves - 1) == 0
        if seldom or self._found.exact:
            self._look_up_tensors()
        self._found &= self._trained_elsewhere()
        if seldom:
            for state in self._states:
                self._found &= state.look()
        if self._found.exact:
            self._found &= self._compare(sys._getframe(1), is_first=False)
        return self._found

    def _compare(self, caller: FrameType, *, is_first: bool) -> Exactness:
        assert self._seen is not None
        before, held, found = RandomState.capture(), self._held(), EXACT
        variables = _Variables(held)
        met = [(frame.f_code, *one) for frame in _user_frames(caller) for one in variables.of(frame)]
        prepared = self._accelerator._dataloaders
        for name, loader in variables.loaders.items():
            if not any(loader is one for one in prepared) and _draws_a_seed_once(loader):
                found &= Exactness.not_verified(
                    f"the processes of {name!r} stay, and a resume draws their seed once more: read it by loop.eval_batches"
                )
        for loader in (*variables.loaders.values(), *prepared):
            held |= {id(generator) for generator in generators_of(getattr(loader, "base_dataloader", loader))}
        for code, name, value, owner in met:
            key, digest = (code, name, type(value)), _digest(value, held)
            if is_iterator(value) and is_first:
                found &= Exactness.not_verified(_advice(name, value))
            if digest is None:
                continue
            last_owner, last = self._seen.get(key, (owner, None))
            if last not in (None, digest) and last_owner is owner:
                found &= Exactness.not_verified(_advice(name, value))
            elif last is None and (owner is None or is_first or id(owner) in self._dicts):
                self._seen[key] = (owner, digest)  # else it is a tensor of a batch
        if is_first:
            self._dicts = variables.dicts
        before.restore()  # an object of the script may have drawn
        return found

    def _trained_elsewhere(self) -> Exactness:
        """Whether a prepared optimizer trains parameters that no prepared model holds."""
        accelerator = self._accelerator
        if str(accelerator.distributed_type).rpartition(".")[2] in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
            return EXACT  # their parameters are pieces of the model's
        models = self._bare_models()
        if len(models) == 1 and not (found := of_adapter(models[0])).exact:
            return found  # of a single adapter, the checkpoint holds nothing else
        for prepared in accelerator._optimizers:
            state = getattr(prepared, "state", {})
            for group in prepared.param_groups:
                for parameter in group["params"]:
                    is_trained = parameter.requires_grad and (not state or parameter in state)
                    if is_trained and not self._is_held(parameter):
                        return Exactness.no(
                            f"an optimizer trains a parameter of shape {list(parameter.shape)} that no prepared model holds: "
                            "give its module to accelerator.prepare or accelerator.register_for_checkpointing"
                        )
        return EXACT

    def _bare_models(self) -> list[Any]:
        return [bare_model(self._accelerator, model) for model in self._accelerator._models]

    def _is_held(self, parameter: Any) -> bool:
        if id(parameter) not in self._tensors:
            self._look_up_tensors()
        return id(parameter) in self._tensors

    def _look_up_tensors(self) -> None:
        saved = (*self._accelerator._models, *self._accelerator._custom_objects)
        modules = [one for one in saved if isinstance(one, torch.nn.Module)]
        self._tensors = {id(tensor) for module in modules for tensor in tensors_in(module)}

    def _held(self) -> set[int]:
        """What Accelerate saves, by identity."""
        accelerator = self._accelerator
        found = set(self._tensors)
        for one in (*accelerator._optimizers, *accelerator._schedulers, *accelerator._custom_objects):
            found |= {id(one), id(getattr(one, "optimizer", one)), id(getattr(one, "scheduler", one))}
        found.add(id(accelerator.scaler))
        return found


class _Variables:
    """The variables of a function that may hold state, and what is inside objects of the script's own classes."""

    def __init__(self, held: set[int]) -> None:
        self._held = held
        self._known: set[int] = set()
        self.dicts: dict[int, Any] = {}
        """All that were met, by identity."""
        self.loaders: dict[str, Any] = {}
        self._counted = Counted()

    def of(self, frame: FrameType) -> Iterator[tuple[str, Any, Any]]:
        """Name, value, and the object that must be the same one for a comparison; None where the name is enough."""
        self._counted = counted_in(frame.f_code)
        values = {name: frame.f_globals[name] for name in frame.f_code.co_names if name in frame.f_globals}
        for name, value in {**values, **frame.f_locals}.items():
            yield from self._inside(name, value, None, _MOST_DEPTH)

    def _inside(self, name: str, value: Any, owner: Any, depth: int) -> Iterator[tuple[str, Any, Any]]:
        if type(value) in (int, float):
            if self._is_counted(name.rpartition(".")[2], value, owner):
                yield name, value, owner
        elif isinstance(value, (torch.Tensor, deque)):
            yield name, value, value if owner is None else owner
        elif is_generator(value) or is_iterator(value):
            yield name, value, value
        elif isinstance(value, DataLoader):
            self.loaders[name] = value
        elif isinstance(value, _FUNCTIONS):
            yield from self._used_by(value, depth)
        elif isinstance(value, (dict, list, tuple)) or _is_of_the_script(value):
            yield from self._items(name, value, depth)
        elif _keeps_state(value):
            yield name, value, owner

    def _items(self, name: str, value: Any, depth: int) -> Iterator[tuple[str, Any, Any]]:
        if (
            id(value) in self._held
            or id(value) in self._known
            or depth == 0
            or len(self._known) >= _MOST_OBJECTS
        ):
            return
        self._known.add(id(value))
        if isinstance(value, dict):
            self.dicts[id(value)] = value
        for inner, item in islice(_items(name, value), _MOST_ITEMS):
            yield from self._inside(inner, item, value, depth - 1)

    def _is_counted(self, name: str, value: Any, owner: Any) -> bool:
        counted = self._counted
        if owner is not None:
            kind: Any = type(owner)
            counted = counted_by(kind)
        return name in (counted.numbers if type(value) is int else counted.factors)

    def _used_by(self, function: Any, depth: int) -> Iterator[tuple[str, Any, Any]]:
        """The variables of modules and closures that a function of the script uses."""
        for one in functions_of(function):
            if depth == 0 or id(one) in self._known:
                continue
            self._known.add(id(one))
            before, self._counted = self._counted, counted_in(one.__code__, everywhere=True)
            used = {name: one.__globals__[name] for name in names_in(one.__code__) if name in one.__globals__}
            cells = zip(one.__code__.co_freevars, map(content_of, one.__closure__ or ()), strict=False)
            for name, value in {**used, **dict(cells)}.items():
                if not isinstance(value, _FUNCTIONS):  # of one by one
                    yield from self._inside(name, value, None, depth - 1)
            self._counted = before


def _items(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What is inside; numbers and texts of a container have no name that code could count."""
    if isinstance(value, dict):
        return (
            (f"{name}[{key!r}]", item)
            for key, item in list(islice(value.items(), _MOST_ITEMS))
            if type(item) not in _PLAIN
        )
    if isinstance(value, (list, tuple)):
        return (
            (f"{name}[{number}]", item)
            for number, item in enumerate(islice(value, _MOST_ITEMS))
            if type(item) not in _PLAIN
        )
    return ((f"{name}.{key}", item) for key, item in list(vars(value).items()))


def _draws_a_seed_once(loader: Any) -> bool:
    """Whether it is one of persistent processes that has begun. Of the training's, the position has the seed."""
    is_trained = any(isinstance(one, WatchedSampler) for one in (loader.batch_sampler, loader.sampler))
    has_begun = loader._iterator is not None and loader.generator is None
    return bool(loader.persistent_workers and has_begun and not is_trained)


def _keeps_state(value: Any) -> bool:
    if isinstance(value, (type, DataLoader, Dataset, Sampler)):
        return False
    if type(value).__module__.partition(".")[0] in _HOLD_NO_STATE:
        return False
    return isinstance(value, torch.nn.Module) or all(
        callable(getattr(type(value), name, None)) for name in ("state_dict", "load_state_dict")
    )


def _is_of_the_script(value: Any) -> bool:
    """Whether it is an object of a class that the script defines, without a way to save itself."""
    if isinstance(value, (type, Dataset, Sampler)) or not hasattr(value, "__dict__") or _keeps_state(value):
        return False
    return is_of_the_script(type(value).__module__)


def _digest(value: Any, held: set[int]) -> bytes | None:
    """Of the state in it; None where it has none, or Accelerate saves it."""
    if id(value) in held or is_iterator(value):
        return None
    tensors: list[Any] = []
    digest = xxhash.xxh3_128()
    try:
        digest.update(_text_of(value, tensors).encode())
        own = [tensor for tensor in tensors if id(tensor) not in held]
        is_printed = (
            isinstance(value, deque) and value and not tensors
        )  # numbers for a mean of the latest losses
        if (tensors and not own) or is_printed:
            return None
        for tensor in own:
            digest.update(_sample(tensor))
    except Exception:  # noqa: BLE001 - an object of the script that cannot be read must not end its training
        return None
    return digest.digest()


def _text_of(value: Any, tensors: list[Any]) -> str:
    """What is in a variable besides its tensors, which are put into the list."""
    if isinstance(value, (int, float)):
        return str(value)
    if is_generator(value):
        return state_of(value)
    if isinstance(value, torch.nn.Module):
        tensors += [*value.parameters(), *value.buffers()]
        return ""
    state = value if isinstance(value, (torch.Tensor, deque)) else value.state_dict()
    return repr(list(_flat(state, tensors)))


def _flat(state: Any, tensors: list[Any]) -> Iterator[Any]:
    """The numbers and texts of a state; its tensors are put into the list."""
    if isinstance(state, torch.Tensor):
        tensors.append(state)
    elif isinstance(state, dict):
        for key, item in state.items():
            yield str(key)
            yield from _flat(item, tensors)
    elif isinstance(state, (list, tuple, deque)):
        for item in list(state):
            yield from _flat(item, tensors)
    elif type(state).__module__ == "numpy" and hasattr(state, "tobytes"):
        yield state.reshape(-1)[:4096].tobytes()
    elif isinstance(state, (bool, int, float, str)):
        yield state


def _sample(tensor: Any) -> bytes:
    flat = tensor.detach().reshape(-1)
    few = flat[:: max(1, len(flat) // _SAMPLE)][: _SAMPLE + 1]
    return bytes(few.cpu().contiguous().view(torch.uint8).numpy())


def _advice(name: str, value: Any) -> str:
    if type(value) in (int, float):
        return f"the counter {name!r} starts over after a resume: use loop.global_step or loop.batch_index"
    if isinstance(value, torch.Tensor):
        return f"no checkpoint holds the tensor {name!r}, which changes: {_SAVE_IT} that contains it"
    if is_generator(value):
        return f"the generator {name!r} starts over after a resume: draw from the random numbers of torch, numpy or Python"
    if is_iterator(value):
        return f"the iterator {name!r} starts over after a resume, and no checkpoint has its position"
    if isinstance(value, deque):
        return f"no checkpoint holds the tensors in {name!r}, which change: {_SAVE_IT} that contains them"
    prepares = isinstance(value, (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler))
    call = "prepare" if prepares else "register_for_checkpointing"
    kind = type(value).__name__
    return f"no checkpoint holds {name!r} ({kind}), which changes: call accelerator.{call}({name})"


def _user_frames(frame: FrameType | None) -> Iterator[FrameType]:
    """The functions of the script, from the one that iterates to the one that was started."""
    while frame is not None and is_library(frame.f_code.co_filename):
        frame = frame.f_back
    for _ in range(_MOST_FRAMES):
        if frame is None or is_library(frame.f_code.co_filename):
            return
        yield frame
        if frame.f_code.co_name == "<module>":
            return
        frame = frame.f_back
