"""A shallow look at objects that no checkpoint holds: whether what they keep changes while it trains.

Values are compared, not copied: tensors by identity and version, random generators by their state, containers by their
length, first and last items. It takes some 10 us for a small object, so it is done at a save, never at a step.
"""

from __future__ import annotations

import functools
import io
import random
import sys
import types
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any

import torch
import xxhash

Look = dict[str, Any]
"""Names of attributes, and what their values looked like."""

_DRAWS = frozenset(
    "random rand randn randint randperm rand_like randn_like bernoulli multinomial".split()  # of Python, numpy and torch
)
_OWN_GENERATORS = frozenset("default_rng Generator RandomState Random manual_seed".split())
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
)
"""Objects of these libraries are not looked into, where another object holds them."""


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

    def look(self, thing: Any) -> Look:
        """What the attributes of an object look like now, and what its functions use from outside."""
        found = {name: self._seen(value, _DEPTH) for name, value in self._parts(thing)}
        for kind in type(thing).__mro__:
            if kind.__module__.split(".")[0] not in ("builtins", "torch", "transformers", "datasets"):
                for name, value in vars(kind).items():
                    if isinstance(value, types.FunctionType):
                        found.update(self._used_by(value))
                    elif not name.startswith("__") and isinstance(value, (int, float, list, dict)):
                        found[name] = found.get(name, self._seen(value, 1))
        return found

    def held(self, thing: Any) -> str | None:
        """The first attribute that holds a tensor, a module, an iterator or a random generator; None without one."""
        return next((name for name, value in self._parts(thing) if self._holds(value, _DEPTH)), None)

    def _parts(self, thing: Any) -> Iterator[tuple[str, Any]]:
        yield from getattr(thing, "__dict__", {}).items()
        if isinstance(thing, functools.partial):
            yield from (*enumerate_names("args", thing.args), *thing.keywords.items())
            yield from self._parts(thing.func)
        elif isinstance(thing, types.FunctionType):
            for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=False):
                yield name, _content(cell)
            yield from self._globals(thing)
        elif isinstance(thing, types.MethodType):
            yield from self._parts(thing.__self__)
        elif isinstance(thing, (list, tuple)):
            yield from enumerate_names("item", thing[:_ITEMS])

    def _used_by(self, function: types.FunctionType) -> Look:
        return {name: self._seen(value, 1) for name, value in self._globals(function)}

    @staticmethod
    def _globals(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
        """Names of the script that a function uses: random generators, numbers, lists."""
        outside = function.__globals__
        for name in function.__code__.co_names:
            value = outside.get(name)
            if isinstance(value, (int, float, list, dict, torch.Tensor)) or _is_generator(value):
                yield name, value

    def _holds(self, value: Any, depth: int) -> bool:
        if id(value) in self._ids or isinstance(value, (str, bytes, int, float, type(None))):
            return False
        if isinstance(value, (torch.Tensor, torch.nn.Module)) or _is_generator(value) or _is_iterator(value):
            return True
        if depth == 0:
            return False
        return any(self._holds(item, depth - 1) for item in self._inside(value))

    def _inside(self, value: Any) -> Iterable[Any]:
        if isinstance(value, dict):
            return _ends(list(value.values()))
        if isinstance(value, (list, tuple)):
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
        if _is_generator(value):
            return _state_of(value)
        return self._seen_inside(value, depth)

    def _seen_inside(self, value: Any, depth: int) -> Any:
        if isinstance(value, torch.nn.Module):
            return tuple(self._seen(tensor, 0) for tensor in (*value.parameters(), *value.buffers()))
        if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
            return (id(value), xxhash.xxh3_64_hexdigest(value.reshape(-1)[:4096].tobytes()))
        if isinstance(value, (dict, list, tuple, set, frozenset)):
            names = tuple(map(str, _ends(list(value)))) if isinstance(value, dict) else ()
            items = self._inside(value) if depth > 0 else ()
            return (len(value), names, tuple(self._seen(item, depth - 1) for item in items))
        if _is_closed(value) or depth == 0:
            return id(value)
        return (id(value), tuple((name, self._seen(item, depth - 1)) for name, item in self._parts(value)))


def changed(before: Look, now: Look) -> str | None:
    """The first attribute that looks different."""
    for name in (*now, *before):
        if name not in now or name not in before or now[name] != before[name]:
            return name
    return None


def may_draw(function: Any) -> bool:
    """Whether the code of a function names the random numbers that a whole process shares."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    waiting = [] if code is None else [code]
    while waiting:
        one = waiting.pop()
        if _DRAWS.intersection(one.co_names) and not _OWN_GENERATORS.intersection(one.co_names):
            return True
        waiting += [item for item in one.co_consts if isinstance(item, types.CodeType)]
    return False


def enumerate_names(name: str, items: Iterable[Any]) -> list[tuple[str, Any]]:
    """Names for items that have none."""
    return [(f"{name}[{number}]", item) for number, item in enumerate(items)]


def _ends(items: Any) -> list[Any]:
    return list(items) if len(items) <= 2 * _ITEMS else [*items[:_ITEMS], *items[-_ITEMS:]]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _is_generator(value: Any) -> bool:
    """Whether it draws random numbers."""
    if isinstance(value, (torch.Generator, random.Random)):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState))


def _state_of(generator: Any) -> str:
    if isinstance(generator, torch.Generator):
        return xxhash.xxh3_64_hexdigest(bytes(generator.get_state().tolist()))
    if isinstance(generator, random.Random):
        return str(hash(generator.getstate()))
    bits = getattr(generator, "bit_generator", None) or generator._bit_generator
    return repr(bits.state)


def _is_iterator(value: Any) -> bool:
    return hasattr(type(value), "__next__") and not isinstance(value, io.IOBase)


def _is_closed(value: Any) -> bool:
    """Whether its attributes are no concern: a class, a module, an object of a library."""
    if isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
        return True
    return f"{type(value).__module__}.".startswith(_FOREIGN)
