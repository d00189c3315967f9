"""A shallow look at objects that no checkpoint holds: whether what they keep changes while it trains.

Values are compared, not copied: tensors by identity and version, random generators by their state, containers by their
length, first and last items. To an object belong its attributes, and what the functions that it calls use from their modules:
`script_code` finds those. It takes some 10 us for a small object, so it is done at a save, never at a step.
"""

from __future__ import annotations

import ctypes
import functools
import io
import random
import sys
import types
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from enum import Enum
from itertools import islice
from typing import Any

import torch
import xxhash

from hf_cloudtrain.checkpoints.exactness import EXACT, Exactness
from hf_cloudtrain.resume.script_code import FETCHES, content_of, functions_of, is_of_the_script, names_in

Look = dict[str, Any]
"""Names of attributes, and what their values looked like."""

_DEPTH = 3
_ITEMS = 16
"""First and last items of a container that are looked at."""
_FOREIGN = (
    "transformers.",
    "tokenizers.",
    "datasets.",
    "accelerate.",
    "pyarrow.",
    "logging",
    "threading",
    "hf_cloudtrain.",
    "tqdm.",
    "wandb.",
)
"""Objects of these libraries are not looked into, where another object holds them."""
_PLAIN = (int, float, list, dict, set, deque, torch.Tensor)
_NO_OBJECTS = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, functools.partial)


class Looker:
    """Looks at objects, leaving out those that a checkpoint or the script accounts for.

    Args:
        known: such as model, trainer, arguments and tokenizer, with the parameters of the model.

    Example:
        >>> looker = Looker([model, trainer])
        >>> before = looker.look(callback)
        >>> changed(before, looker.look(callback))        # the name of an attribute, or None
    """

    def __init__(self, known: Iterable[Any] = ()) -> None:
        self._known = list(known)  # keeps them alive, so that no id is used again
        self._ids = {id(thing) for thing in self._known if thing is not None}
        self._functions: dict[int, list[types.FunctionType]] = {}
        """Of what was looked at: code does not change."""

    def look(self, thing: Any, methods: Iterable[str] = FETCHES) -> Look:
        """What the attributes of an object look like now, and what its functions use from outside.

        Args:
            methods: that are called on it.
        """
        found = {name: self._seen(value, _DEPTH) for name, value in self._parts(thing)}
        for kind in type(thing).__mro__:
            if is_of_the_script(kind.__module__):
                for name, value in vars(kind).items():
                    if not name.startswith("__") and isinstance(value, _PLAIN):
                        found[name] = found.get(name, self._seen(value, 1))
        if id(thing) not in self._functions:
            self._functions[id(thing)] = list(functions_of(thing, methods))
            self._known.append(thing)
        for function in self._functions[id(thing)]:
            found.update(self.used_by(function))
        return found

    def used_by(self, function: types.FunctionType) -> Look:
        """What a function uses from its module: random generators, numbers, containers, objects of the script."""
        found: Look = {}
        for name, value in _outside(function):
            if isinstance(value, _PLAIN) or is_generator(value):
                found[name] = self._seen(value, 1)
            elif hasattr(value, "__dict__") and not isinstance(value, _NO_OBJECTS):
                found[name] = self._seen(value, _DEPTH)
        return found

    def seen(self, value: Any) -> Any:
        """What one value looks like now."""
        return self._seen(value, 1)

    def held(self, thing: Any) -> str | None:
        """The first attribute that holds a tensor, a module, an iterator or a random generator; None without one."""
        return next((name for name, value in self._parts(thing) if self._holds(value, _DEPTH)), None)

    def _parts(self, thing: Any) -> Iterator[tuple[str, Any]]:
        yield from getattr(thing, "__dict__", {}).items()
        for kind in type(thing).__mro__:
            slots = vars(kind).get("__slots__", ())
            for name in [slots] if isinstance(slots, str) else slots:
                yield name, getattr(thing, name, None)
        if isinstance(thing, functools.partial):
            yield from (*enumerate_names("args", thing.args), *thing.keywords.items())
            yield from self._parts(thing.func)
        elif isinstance(thing, types.FunctionType):
            for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=False):
                yield name, content_of(cell)
        elif isinstance(thing, types.MethodType):
            # Of what may be a large object, such as a trainer of the script, only what the method uses.
            used = {name for one in functions_of(thing) for name in names_in(one.__code__)}
            yield from ((name, value) for name, value in self._parts(thing.__self__) if name in used)
        elif isinstance(thing, (list, tuple)):
            yield from enumerate_names("item", thing[:_ITEMS])

    def _holds(self, value: Any, depth: int) -> bool:
        if id(value) in self._ids or isinstance(value, (str, bytes, int, float, type(None))):
            return False
        if isinstance(value, (torch.Tensor, torch.nn.Module)) or is_generator(value) or is_iterator(value):
            return True
        if depth == 0:
            return False
        return any(self._holds(item, depth - 1) for item in self._inside(value))

    def _inside(self, value: Any) -> Iterable[Any]:
        if isinstance(value, dict):
            return _ends(value.values())
        if isinstance(value, (list, tuple, deque, set, frozenset)):
            return _ends(value)
        return [] if _is_closed(value) else list(getattr(value, "__dict__", {}).values())

    def _seen(self, value: Any, depth: int) -> Any:
        if id(value) in self._ids:
            return "known"
        if isinstance(value, (str, bytes, Enum)):
            return value
        if isinstance(value, (int, float, complex, type(None))):
            return repr(value)  # NaN does not equal itself
        if isinstance(value, torch.Tensor):
            return (id(value), "inference" if value.is_inference() else value._version)
        if is_generator(value):
            return state_of(value)
        if isinstance(value, (ctypes._SimpleCData, ctypes.Array)):  # of multiprocessing.Value and Array
            return bytes(memoryview(value).cast("B")[:4096])
        return self._seen_inside(value, depth)

    def _seen_inside(self, value: Any, depth: int) -> Any:
        if isinstance(value, torch.nn.Module):
            return tuple(self._seen(tensor, 0) for tensor in (*value.parameters(), *value.buffers()))
        if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
            return (id(value), xxhash.xxh3_64_hexdigest(value.reshape(-1)[:4096].tobytes()))
        if is_iterator(value) and not _is_closed(value):
            return object()  # where it stands cannot be seen, so it never looks the same
        if isinstance(value, (dict, list, tuple, deque, set, frozenset)):
            names = tuple(map(str, _ends(value.keys()))) if isinstance(value, dict) else ()
            items = self._inside(value) if depth > 0 else ()
            return (len(value), names, tuple(self._seen(item, depth - 1) for item in items))
        if _is_closed(value) or depth == 0:
            return id(value)
        return (id(value), tuple((name, self._seen(item, depth - 1)) for name, item in self._parts(value)))


class StateLook:
    """Whether some objects keep state that changes, as seen from now on.

    Args:
        parts: what they are called, and the objects.

    Example:
        >>> data = StateLook(Looker(), [("train_dataset", dataset)])
        >>> print(data.look())
        not verified: Curriculum (train_dataset) keeps state ('reads') that changes in training, and no checkpoint has it
    """

    def __init__(self, looker: Looker, parts: Iterable[tuple[str, Any]]) -> None:
        self._looker, self._parts = looker, list(parts)
        self._before = [looker.look(part) for _, part in self._parts]
        self._found, self._is_first = EXACT, True

    def look(self) -> Exactness:
        """What was seen once stays seen."""
        for (name, part), before in zip(self._parts, self._before, strict=True):
            now = self._looker.look(part)
            if self._is_first:
                accept_opened(before, now)
            if self._found.exact and (attribute := changed(before, now)):
                self._found = Exactness.not_verified(keeps_state(part, name, attribute))
        self._is_first = False
        return self._found


def script_parts(part: Any) -> list[Any]:
    """What the script has given to a dataset of `datasets`; any other object itself."""
    if f"{type(part).__module__}.".startswith("datasets."):
        part = (getattr(part, "_format_kwargs", None) or {}).get("transform")
    return [] if part is None else [part]


def keeps_state(part: Any, name: str, attribute: str) -> str:
    """The reason, for what changes in training."""
    return f"{name_of(part)} ({name}) keeps state ({attribute!r}) that changes in training, and no checkpoint has it"


def name_of(part: Any) -> str:
    """Of a function, or of the class of an object."""
    return getattr(part, "__name__", None) or type(part).__name__


def accept_opened(before: Look, now: Look) -> None:
    """Take an object that was made where there was none, such as an open file, as if it had always been there."""
    for name, value in now.items():
        is_object = isinstance(value, int) or (isinstance(value, tuple) and isinstance(value[-1], tuple))
        if is_object and before.get(name) == repr(None):
            before[name] = value


def changed(before: Look, now: Look) -> str | None:
    """The first attribute that looks different."""
    for name in (*now, *before):
        if name not in now or name not in before or now[name] != before[name]:
            return name
    return None


def _outside(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The variables that a function keeps, or uses from its module and the functions around it."""
    for name in names_in(function.__code__):
        yield name, function.__globals__.get(name)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        yield name, content_of(cell)
    kept = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    yield from enumerate_names(f"a default of {function.__name__}()", kept)
    yield from ((f"{function.__name__}.{name}", value) for name, value in list(vars(function).items()))


def enumerate_names(name: str, items: Iterable[Any]) -> list[tuple[str, Any]]:
    """Names for items that have none."""
    return [(f"{name}[{number}]", item) for number, item in enumerate(items)]


def _ends(items: Collection[Any]) -> list[Any]:
    if len(items) <= 2 * _ITEMS:
        return list(items)
    last: Iterable[Any] = () if isinstance(items, (set, frozenset)) else reversed(items)  # type: ignore[call-overload]
    return [*islice(items, _ITEMS), *islice(last, _ITEMS)]


def is_generator(value: Any) -> bool:
    """Whether it draws random numbers from a state of its own."""
    if isinstance(value, (torch.Generator, random.Random)):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState))


def state_of(generator: Any) -> str:
    """The state of a random generator, or a digest of it."""
    if isinstance(generator, torch.Generator):
        return xxhash.xxh3_64_hexdigest(bytes(generator.get_state().tolist()))
    if isinstance(generator, random.Random):
        return str(hash(generator.getstate()))
    bits = getattr(generator, "bit_generator", None) or generator._bit_generator
    return repr(bits.state)


def is_iterator(value: Any) -> bool:
    """Whether it has a position that cannot be seen, and that may matter."""
    return hasattr(type(value), "__next__") and not isinstance(value, io.IOBase)


def _is_closed(value: Any) -> bool:
    """Whether its attributes are no concern: a class, a module, an object of a library."""
    if isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
        return True
    return f"{type(value).__module__}.".startswith(_FOREIGN)
