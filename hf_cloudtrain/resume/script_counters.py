"""What code of the script counts up: `calls += 1`, `weight *= 0.9`. A resume starts it over.

The code is read, not run. A sum that begins again with each epoch, or a printed mean of losses, is not counted.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterator
from types import CodeType
from typing import Any, NamedTuple

from hf_cloudtrain.resume.script_code import methods_of

_IN_PLACE = {"INPLACE_ADD": "+", "INPLACE_SUBTRACT": "-", "INPLACE_MULTIPLY": "*", "INPLACE_TRUE_DIVIDE": "/"}
"""Of Python 3.10; later ones have them as an argument."""
_COMPUTES = frozenset(name.replace("INPLACE", "BINARY") for name in _IN_PLACE)
_BETWEEN = ("SWAP", "COPY", "ROT_TWO", "ROT_THREE")
"""Between a sum and its store in an attribute."""


class Counted(NamedTuple):
    """Names that code counts up and does not set again."""

    numbers: frozenset[str] = frozenset()
    """As in `calls += 1`."""
    factors: frozenset[str] = frozenset()
    """As in `weight *= 0.9`; sums of losses are for a printout."""
    set_again: frozenset[str] = frozenset()


@functools.cache
def counted_in(code: CodeType, *, everywhere: bool = False) -> Counted:
    """Variables that are counted in a loop; a sum that begins again with each epoch is set in the loop too.

    Args:
        everywhere: in a function that is called in a loop, or a method: except for variables of its own.
    """
    numbers: set[str] = set()
    factors: set[str] = set()
    set_again: set[str] = set()
    counts, sign = everywhere, ""
    lines = list(_lines(code))
    stored = {
        name for line in lines for one in line if one.opname.startswith("STORE_") for name in _names_of(one)
    }
    for line in lines:
        reads = {name for one in line if one.opname.startswith("LOAD_") for name in _names_of(one)}
        computes = any(one.opname in _COMPUTES or one.argrepr in ("+", "-", "*", "/") for one in line)
        for one in line:
            counts |= one.opname == "FOR_ITER"
            if one.opname.startswith("STORE_") and counts and not (everywhere and "FAST" in one.opname):
                for name in _names_of(one)[: 1 if "LOAD" in one.opname else None]:
                    by_itself = (
                        name in reads and computes and not (reads - {name}) & stored
                    )  # calls = calls + 1
                    known = {"+": [numbers], "-": [numbers], "*": [factors], "/": [factors]}.get(sign)
                    for found in known or ([numbers, factors] if by_itself else [set_again]):
                        found.add(name)
            if one.opname not in _BETWEEN:
                sign = _IN_PLACE.get(
                    one.opname, one.argrepr[0] if one.argrepr in ("+=", "-=", "*=", "/=") else ""
                )
    return Counted(*map(frozenset, (numbers - set_again, factors - set_again, set_again)))


def _lines(code: CodeType) -> Iterator[list[dis.Instruction]]:
    """The instructions of a code, line by line."""
    starts, found = {offset for offset, _ in dis.findlinestarts(code)}, list[dis.Instruction]()
    for one in dis.get_instructions(code):
        if one.offset in starts and found:
            yield found
            found = []
        found.append(one)
    yield found


def _names_of(instruction: dis.Instruction) -> list[str]:
    """Of variables and attributes; Python 3.13 has instructions for two at once."""
    found = instruction.argval
    names = found if isinstance(found, tuple) else (found,)
    return [name for name in names if isinstance(name, str)] if "CONST" not in instruction.opname else []


@functools.cache
def counted_by(kind: Any) -> Counted:
    """Attributes that the methods of a class count; what `__init__` sets is where they begin."""
    each = [
        counted_in(function.__code__, everywhere=True)
        for function in methods_of(kind)
        if function.__name__ != "__init__"
    ]
    numbers, factors, set_again = (
        (frozenset[str]().union(*found) for found in zip(*each, strict=True)) if each else Counted()
    )
    return Counted(numbers - set_again, factors - set_again)
