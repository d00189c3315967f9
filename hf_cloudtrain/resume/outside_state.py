"""State that a script keeps in its own variables: an average of the weights, or an optimizer that is not prepared.

Accelerate saves what `prepare` and `register_for_checkpointing` have received. Before its first batch and at each save, the
variables of the functions that iterate are compared: a module, an optimizer, a schedule, a gradient scaler or a tensor that has
changed and that Accelerate does not save is named. A frozen teacher, a loss without parameters, or a metric does not change.
"""

from __future__ import annotations

import dis
import functools
import os
import sys
import sysconfig
from collections.abc import Iterator
from itertools import islice
from types import CodeType, FrameType
from typing import Any

import torch
import xxhash
from torch.utils.data import DataLoader, Dataset, Sampler

from hf_cloudtrain.checkpoints.exactness import EXACT, Exactness
from hf_cloudtrain.resume.random_state import RandomState

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_LIBRARIES = tuple(
    os.path.realpath(path) + os.sep
    for path in {*map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), *sys.path}
    if path.rstrip(os.sep).endswith(("site-packages", "dist-packages"))
    or path == sysconfig.get_path("stdlib")
)
_HOLD_NO_STATE = frozenset(
    ("accelerate", "datasets", "hf_cloudtrain", "tokenizers", "torchdata", "torcheval", "torchmetrics")
)
"""Packages whose objects are saved by other means, or do not affect the weights."""
_MOST_FRAMES, _MOST_DEPTH, _MOST_ITEMS, _MOST_OBJECTS = 8, 3, 256, 4000
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
        self._seen: dict[tuple[Any, str], tuple[Any, bytes]] | None = None
        self._found = EXACT

    def begin(self) -> None:
        """Remember the variables of the callers; once."""
        if self._seen is None:
            self._seen = {}
            self._compare(sys._getframe(1), is_first=True)

    def look(self) -> Exactness:
        """Compare the variables of the callers with what was remembered. What was found once stays found."""
        self._found &= self._trained_elsewhere()
        if self._found.exact:
            self._found &= self._compare(sys._getframe(1), is_first=False)
        return self._found

    def _compare(self, caller: FrameType, *, is_first: bool) -> Exactness:
        assert self._seen is not None
        before, held, found = RandomState.capture(), self._held(), EXACT
        variables = _Variables(held)
        for frame in _user_frames(caller):
            for name, value, owner in variables.of(frame):
                key, digest = (frame.f_code, name), _digest(value, held)
                if digest is None:
                    continue
                last_owner, last = self._seen.get(key, (owner, None))
                if last not in (None, digest) and last_owner is owner:
                    found &= Exactness.not_verified(_advice(name, value))
                elif last is None and (owner is None or is_first):  # later tensors are those of a batch
                    self._seen[key] = (owner, digest)
        before.restore()  # an object of the script may have drawn
        return found

    def _trained_elsewhere(self) -> Exactness:
        """Whether a prepared optimizer trains parameters that no prepared model holds."""
        accelerator = self._accelerator
        if str(accelerator.distributed_type).rpartition(".")[2] in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
            return EXACT  # their parameters are pieces of the model's
        held = {id(tensor) for tensor in self._tensors()}
        for prepared in accelerator._optimizers:
            state = getattr(prepared, "state", {})
            for group in prepared.param_groups:
                for parameter in group["params"]:
                    is_trained = parameter.requires_grad and (not state or parameter in state)
                    if is_trained and id(parameter) not in held:
                        return Exactness.no(
                            f"an optimizer trains a parameter of shape {list(parameter.shape)} that no prepared model holds: "
                            "give its module to accelerator.prepare or accelerator.register_for_checkpointing"
                        )
        return EXACT

    def _tensors(self) -> Iterator[Any]:
        """The parameters and buffers that Accelerate saves."""
        for saved in (*self._accelerator._models, *self._accelerator._custom_objects):
            if isinstance(saved, torch.nn.Module):
                yield from saved.parameters()
                yield from saved.buffers()

    def _held(self) -> set[int]:
        """What Accelerate saves, by identity."""
        accelerator = self._accelerator
        found = {id(tensor) for tensor in self._tensors()}
        for one in (*accelerator._optimizers, *accelerator._schedulers, *accelerator._custom_objects):
            found |= {id(one), id(getattr(one, "optimizer", one)), id(getattr(one, "scheduler", one))}
        found.add(id(accelerator.scaler))
        return found


class _Variables:
    """The variables of a function that may hold state, and what is inside objects of the script's own classes."""

    def __init__(self, held: set[int]) -> None:
        self._held = held
        self._known: set[int] = set()
        self._code: CodeType | None = None

    def of(self, frame: FrameType) -> Iterator[tuple[str, Any, Any]]:
        """Name, value, and the object that must be the same one for a comparison; None where the name is enough."""
        self._code = frame.f_code
        values = {name: frame.f_globals[name] for name in frame.f_code.co_names if name in frame.f_globals}
        for name, value in {**values, **frame.f_locals}.items():
            yield from self._inside(name, value, None, _MOST_DEPTH)

    def _inside(self, name: str, value: Any, owner: Any, depth: int) -> Iterator[tuple[str, Any, Any]]:
        if type(value) is int:
            if name in _counters(self._code):
                yield name, value, owner
        elif isinstance(value, torch.Tensor):
            yield name, value, value if owner is None else owner
        elif isinstance(value, (dict, list, tuple)) or _is_of_the_script(value):
            if id(value) in self._held or id(value) in self._known or depth == 0:
                return
            if len(self._known) < _MOST_OBJECTS:
                self._known.add(id(value))
                for inner, item in islice(_items(name, value), _MOST_ITEMS):
                    yield from self._inside(inner, item, value, depth - 1)
        elif _keeps_state(value):
            yield name, value, owner


def _items(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        return ((f"{name}[{key!r}]", item) for key, item in list(value.items()))
    if isinstance(value, (list, tuple)):
        return ((f"{name}[{number}]", item) for number, item in enumerate(value))
    return ((f"{name}.{key}", item) for key, item in list(vars(value).items()))


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
    module = sys.modules.get(type(value).__module__)
    file = getattr(module, "__file__", None)
    return type(value).__module__ == "__main__" or (file is not None and not _is_library(file))


@functools.cache
def _counters(code: CodeType | None) -> frozenset[str]:
    """Variables that a function counts up and does not set again in a loop: `calls += 1`, but not a sum of each epoch."""
    counted: set[str] = set()
    set_again: set[str] = set()
    loops = False
    before: Any = None
    for instruction in dis.get_instructions(code) if code else ():
        loops |= instruction.opname == "FOR_ITER"
        if instruction.opname.startswith("STORE_") and loops:
            in_place = before.opname.startswith("INPLACE_") or before.argrepr in ("+=", "-=")
            (counted if in_place else set_again).add(instruction.argval)
        before = instruction
    return frozenset(counted - set_again)


def _digest(value: Any, held: set[int]) -> bytes | None:
    """Of the state in it; None where it has none, or Accelerate saves it."""
    if id(value) in held:
        return None
    tensors: list[Any] = []
    digest = xxhash.xxh3_128()
    try:
        if isinstance(value, int):
            digest.update(str(value).encode())
        elif isinstance(value, torch.Tensor):
            tensors = [value]
        elif isinstance(value, torch.nn.Module):
            tensors = [*value.parameters(), *value.buffers()]
        else:
            digest.update(repr(list(_flat(value.state_dict(), tensors))).encode())
        own = [tensor for tensor in tensors if id(tensor) not in held]
        if tensors and not own:
            return None
        for tensor in own:
            digest.update(_sample(tensor))
    except Exception:  # noqa: BLE001 - an object of the script that cannot be read must not end its training
        return None
    return digest.digest()


def _flat(state: Any, tensors: list[Any]) -> Iterator[Any]:
    """The numbers and texts of a state; its tensors are put into the list."""
    if isinstance(state, torch.Tensor):
        tensors.append(state)
    elif isinstance(state, dict):
        for key, item in state.items():
            yield str(key)
            yield from _flat(item, tensors)
    elif isinstance(state, (list, tuple)):
        for item in state:
            yield from _flat(item, tensors)
    elif isinstance(state, (bool, int, float, str)):
        yield state


def _sample(tensor: Any) -> bytes:
    flat = tensor.detach().reshape(-1)
    few = flat[:: max(1, len(flat) // _SAMPLE)][: _SAMPLE + 1]
    return bytes(few.cpu().contiguous().view(torch.uint8).numpy())


def _advice(name: str, value: Any) -> str:
    if type(value) is int:
        return f"the counter {name!r} starts over after a resume: use loop.global_step or loop.batch_index"
    if isinstance(value, torch.Tensor):
        return f"no checkpoint holds the tensor {name!r}, which changes: {_SAVE_IT} that contains it"
    prepares = isinstance(value, (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler))
    call = "prepare" if prepares else "register_for_checkpointing"
    kind = type(value).__name__
    return f"no checkpoint holds {name!r} ({kind}), which changes: call accelerator.{call}({name})"


def _user_frames(frame: FrameType | None) -> Iterator[FrameType]:
    """The functions of the script, from the one that iterates to the one that was started."""
    while frame is not None and _is_library(frame.f_code.co_filename):
        frame = frame.f_back
    for _ in range(_MOST_FRAMES):
        if frame is None or _is_library(frame.f_code.co_filename):
            return
        yield frame
        if frame.f_code.co_name == "<module>":
            return
        frame = frame.f_back


@functools.cache
def _is_library(file: str) -> bool:
    path = os.path.realpath(file)
    return path.startswith((_PACKAGE, *_LIBRARIES)) or file.startswith("<frozen")
