"""Values as they are recorded in JSON: finite numbers, and texts that UTF-8 can encode.

JSON knows no NaN and no infinity. A metric that is not finite is recorded as one of the texts `nan`, `inf` and `-inf`, so
that a reader can tell it from one that was not reported.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

NOT_FINITE = ("nan", "inf", "-inf")
LARGEST = 1e300
"""Above it, sums overflow."""


def finite(value: Any) -> Any:
    """The value with null in place of each NaN and infinity, and with texts for keys."""
    if isinstance(value, dict):
        return {utf8(str(key)): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def utf8(text: str) -> str:
    r"""The text with what UTF-8 cannot encode escaped: a file name `caf\xe9` of Latin-1, which Python reads as `caf\udce9`."""
    return text.encode("utf-8", "backslashreplace").decode()


def recordable(value: Any) -> bool | int | float | str:
    """A metric as it is recorded.

    Raises:
        TypeError: it is neither a number nor a text.
        ValueError: the number is too large.

    Example:
        >>> recordable(numpy.float32(0.5)), recordable(math.nan)
        (0.5, 'nan')
    """
    if isinstance(value, str):
        return utf8(str(value))
    if isinstance(value, bool):
        return value
    if not isinstance(value, Real):
        raise TypeError(f"a value of type {type(value).__name__}")
    number = int(value) if isinstance(value, Integral) else float(value)
    if isinstance(number, float) and not math.isfinite(number):
        return str(number)
    if not -LARGEST < number < LARGEST:
        raise ValueError("a number of over 300 digits")
    return number


def number(value: Any) -> float | None:
    """A number in an untrusted record; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < 1e15 else None  # NaN is not below


def metric(value: Any) -> float | None:
    """A metric in an untrusted record, which may be NaN or infinite; None for anything else."""
    if isinstance(value, str):
        return float(value) if value in NOT_FINITE else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < LARGEST else None
