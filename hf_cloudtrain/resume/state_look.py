"""A shallow look at objects that no checkpoint holds: whether what they keep changes while it trains.

Values are compared, not copied: tensors by identity and version, random generators by their state, containers by their
length, first and last items. To an object belong its attributes, and what the functions that it calls use from their modules:
`script_code` finds those. It takes some 10 us for a small object, so it is done at a save, never at a step.
"""

from __future__ import annotations

import ctypes
import functools
import io
import itertools
import random
import sys
import types
import weakref
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
        kind = _kind_of(value.__class__)
        if kind in _NO_STATE or id(value) in self._ids:
            return False
        if kind in (_TENSOR, _MODULE, _GENERATOR, _ITERATOR, _CLOSED_ITERATOR):
            return True
        if depth == 0:
            return False
        return any(self._holds(item, depth - 1) for item in _inside(value, kind))

    def _seen(self, value: Any, depth: int) -> Any:
        if id(value) in self._ids:
            return "known"
        kind = _kind_of(value.__class__)
        if kind == _TENSOR:
            return (_identity(value), "inference" if value.is_inference() else value._version)
        if kind == _TEXT:
            return value
        if kind == _NUMBER:
            return repr(value)  # NaN does not equal itself
        if kind in (_DICT, _ITEMS_ONLY):
            names = tuple(map(str, _ends(value.keys()))) if kind == _DICT else ()
            items = _inside(value, kind) if depth > 0 else ()
            return (len(value), names, tuple([self._seen(item, depth - 1) for item in items]))
        if kind in (_CLOSED, _CLOSED_ITERATOR) or (kind == _OBJECT and depth == 0):
            return _identity(value)
        if kind == _OBJECT:
            return (
                _identity(value),
                tuple([(name, self._seen(item, depth - 1)) for name, item in self._parts(value)]),
            )
        return self._seen_state(value, kind)

    def _seen_state(self, value: Any, kind: str) -> Any:
        if kind == _GENERATOR:
            return state_of(value)
        if kind == _MEMORY:
            return bytes(memoryview(value).cast("B")[:4096])
        if kind == _MODULE:
            return tuple(self._seen(tensor, 0) for tensor in (*value.parameters(), *value.buffers()))
        if kind == _ARRAY:
            return (_identity(value), xxhash.xxh3_64_hexdigest(value.reshape(-1)[:4096].tobytes()))
        return object()  # where an iterator stands cannot be seen, so it never looks the same


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


_numbers: dict[int, tuple[weakref.ref[Any], int]] = {}
"""Of the objects that were looked at and still exist, by their id."""
_next_number = itertools.count(-1, -1)


def _identity(value: Any) -> int:
    """A number of this object alone. Its id would be that of a new object, too, once this one is freed."""
    key = id(value)
    known = _numbers.get(key)
    if known is None or known[0]() is not value:
        try:
            reference = weakref.ref(value, lambda _: _numbers.pop(key, None))
        except TypeError:
            return key
        known = _numbers[key] = (reference, next(_next_number))
    return known[1]


def _ends(items: Collection[Any]) -> list[Any]:
    if len(items) <= 2 * _ITEMS:
        return list(items)
    last: Iterable[Any] = () if isinstance(items, (set, frozenset)) else reversed(items)  # type: ignore[call-overload]
    return [*islice(items, _ITEMS), *islice(last, _ITEMS)]


def is_generator(value: Any) -> bool:
    """Whether it draws random numbers from a state of its own."""
    return _is_kind_of_generator(value.__class__)


@functools.lru_cache(maxsize=4096)
def _is_kind_of_generator(kind: type) -> bool:
    numpy = sys.modules.get("numpy")
    of_numpy = () if numpy is None else (numpy.random.Generator, numpy.random.RandomState)
    return issubclass(kind, (torch.Generator, random.Random, *of_numpy))


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
    return _is_kind_of_iterator(type(value))


def _is_kind_of_iterator(kind: type) -> bool:
    return hasattr(kind, "__next__") and not issubclass(kind, io.IOBase)


_TEXT, _NUMBER, _TENSOR, _GENERATOR, _MEMORY, _MODULE = (
    "text",
    "number",
    "tensor",
    "generator",
    "memory",
    "module",
)
_ARRAY, _ITERATOR, _DICT, _ITEMS_ONLY, _CLOSED, _OBJECT = (
    "array",
    "iterator",
    "dict",
    "items",
    "closed",
    "object",
)
_CLOSED_ITERATOR = "iterator of a library"
_NO_STATE = (_TEXT, _NUMBER)


@functools.lru_cache(maxsize=4096)
def _kind_of(kind: type) -> str:
    """How objects of a class are looked at. A save looks at hundreds of objects of a few classes."""
    closed = issubclass(kind, (type, types.ModuleType, types.BuiltinFunctionType))
    closed = closed or f"{kind.__module__}.".startswith(_FOREIGN)
    kinds = (
        (_TEXT, issubclass(kind, (str, bytes, Enum))),
        (_NUMBER, issubclass(kind, (int, float, complex, type(None)))),
        (_TENSOR, issubclass(kind, torch.Tensor)),
        (_GENERATOR, _is_kind_of_generator(kind)),
        (
            _MEMORY,
            issubclass(kind, (ctypes._SimpleCData, ctypes.Array)),
        ),  # of multiprocessing.Value and Array
        (_MODULE, issubclass(kind, torch.nn.Module)),
        (_ARRAY, kind.__module__ == "numpy" and hasattr(kind, "tobytes")),
        (_ITERATOR, _is_kind_of_iterator(kind) and not closed),
        (_DICT, issubclass(kind, dict)),
        (_ITEMS_ONLY, issubclass(kind, (list, tuple, deque, set, frozenset))),
        (_CLOSED_ITERATOR, _is_kind_of_iterator(kind)),
        (_CLOSED, closed),
    )
    return next((name for name, fits in kinds if fits), _OBJECT)


def _inside(value: Any, kind: str) -> Iterable[Any]:
    if kind == _DICT:
        return _ends(value.values())
    if kind == _ITEMS_ONLY:
        return _ends(value)
    return [] if kind == _CLOSED else list(getattr(value, "__dict__", {}).values())
