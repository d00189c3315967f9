"""The code of the script: which functions the use of an object may run, and what their code names.

Python code is read, not run: a name in it that draws random numbers tells that it may draw them.
"""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

FETCHES = ("__getitem__", "__getitems__", "__iter__", "__call__", "forward")
"""What a fetch calls of a dataset, a collate function, a transform; and a loss."""
_DRAWS = frozenset(
    "random rand randn randint randperm rand_like randn_like bernoulli multinomial random_ uniform_ normal_".split()
)
"""Of Python, numpy and torch."""
_SEEDS = frozenset("seed manual_seed set_seed seed_everything".split())
_OWN_GENERATORS = frozenset("default_rng Generator RandomState Random manual_seed".split())
_MOST, _DEPTH, _ITEMS = 300, 4, 16
_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_LIBRARIES = tuple(
    os.path.realpath(path) + os.sep
    for path in {*map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), *sys.path}
    if path.rstrip(os.sep).endswith(("site-packages", "dist-packages"))
    or path == sysconfig.get_path("stdlib")
)


@functools.cache
def is_library(file: str) -> bool:
    """Whether a file of code is not part of the script."""
    path = os.path.realpath(file)
    return path.startswith((_PACKAGE, *_LIBRARIES)) or file.startswith("<frozen")


@functools.cache
def is_of_the_script(module: str) -> bool:
    """Whether a module is the script, or one that it brings along."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return module == "__main__" or (file is not None and not is_library(file))


def functions_of(thing: Any, methods: Iterable[str] = FETCHES) -> Iterator[types.FunctionType]:
    """The functions of the script that a use of an object may run.

    They are its `methods`, those of the objects that it holds, and what they call by a name of their class or module.

    Example:
        >>> [function.__name__ for function in functions_of(dataset)]
        ['__getitem__', 'augment']
    """
    methods = tuple(methods)
    met: dict[int, Any] = {}  # keeps them alive, so that no id is used again
    waiting = deque([(thing, 0)])
    while waiting and len(met) < _MOST:
        one, depth = waiting.popleft()
        if id(one) in met or one is None or isinstance(one, (str, bytes, int, float, types.ModuleType)):
            continue
        met[id(one)] = one
        if isinstance(one, types.FunctionType):
            if not is_library(one.__code__.co_filename):
                yield one
                waiting.extend((used, depth) for used in _used_by(one))
        elif isinstance(one, types.MethodType):
            waiting.extend((method, depth) for method in _methods(type(one.__self__), [one.__name__]))
        elif isinstance(one, functools.partial):
            waiting.extend((item, depth) for item in (one.func, *one.args, *one.keywords.values()))
        elif isinstance(one, (list, tuple, dict)):
            items = list(one.values()) if isinstance(one, dict) else one
            waiting.extend((item, depth + 1) for item in items[:_ITEMS] if depth < _DEPTH)
        elif not isinstance(one, type) and depth < _DEPTH:
            waiting.extend((method, depth) for method in _methods(type(one), methods))
            waiting.extend((value, depth + 1) for value in list(getattr(one, "__dict__", {}).values()))


def may_draw(thing: Any, methods: Iterable[str] = FETCHES) -> bool:
    """Whether the code that an object runs names the random numbers that a whole process shares."""
    named = (_names(code) for function in functions_of(thing, methods) for code in _codes(function.__code__))
    return any(_DRAWS & names and not _OWN_GENERATORS & names for names in named)


def may_seed(thing: Any) -> bool:
    """Whether the code that an object runs names the seed of random numbers."""
    return any(_SEEDS & names_in(function.__code__) for function in functions_of(thing))


@functools.cache
def names_in(code: types.CodeType) -> frozenset[str]:
    """The names of modules, classes and attributes in a code, and in the functions within it."""
    return frozenset().union(*map(_names, _codes(code)))


def content_of(cell: types.CellType) -> Any:
    """The variable in a closure; None if it has no value yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def methods_of(kind: type) -> list[types.FunctionType]:
    """All functions of a class of the script, and of its bases."""
    found = []
    for base in kind.__mro__:
        for value in list(vars(base).values()) if is_of_the_script(base.__module__) else ():
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(function, types.FunctionType):
                found.append(function)
    return found


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for item in code.co_consts:
        if isinstance(item, types.CodeType):
            yield from _codes(item)


def _names(code: types.CodeType) -> frozenset[str]:
    return frozenset(code.co_names)


def _used_by(function: types.FunctionType) -> Iterator[Any]:
    yield from map(content_of, function.__closure__ or ())
    for name in names_in(function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, (types.FunctionType, functools.partial)) or (
            not isinstance(value, type) and is_of_the_script(type(value).__module__)
        ):
            yield value


def _methods(kind: type, names: Iterable[str]) -> list[types.FunctionType]:
    """Methods of a class of the script, and those that they call by name, in all its bases."""
    own: dict[str, list[types.FunctionType]] = {}
    for function in methods_of(kind):
        own.setdefault(function.__name__, []).append(function)
    found: list[types.FunctionType] = []
    waiting = [name for name in names if name in own]
    met = set(waiting)
    while waiting:
        for function in own[waiting.pop()]:
            found.append(function)
            called = {name for name in names_in(function.__code__) if name in own} - met
            met |= called
            waiting += called
    return found
