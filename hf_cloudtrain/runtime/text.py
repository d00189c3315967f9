"""Counts, sizes, times and durations as text for people."""

from __future__ import annotations

import datetime
import math

from hf_cloudtrain.runtime.redaction import visible


def clean(text: object) -> str:
    """The text as it may be printed on a terminal: see `redaction.visible`."""
    return visible(str(text))


def count_text(count: int, noun: str) -> str:
    """A number of things: '1 step', '1,200 steps', '2 processes'."""
    plural = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{plural}"


def size_text(count: int) -> str:
    """A number of bytes in powers of ten: '1.3 GB'."""
    if count < 1000:
        return f"{count} B"
    power = min(5, int(math.log10(count)) // 3)
    return f"{count / 1000**power:.1f} {' kMGTP'[power]}B"


def time_text(seconds: float | None) -> str | None:
    """A time in seconds since 1970, in the time zone of this machine: '2026-11-20 14:03:11'."""
    if not seconds:
        return None
    try:
        return f"{datetime.datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M:%S}"
    except (OverflowError, ValueError, OSError):
        return f"{seconds:.3g} s"  # outside of the calendar's years


def duration_text(seconds: float | None) -> str | None:
    """A duration in its two largest units: '2 h 5 min'."""
    if seconds is None or not math.isfinite(seconds):
        return None
    if seconds < 1:
        return f"{max(0.0, seconds) * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    left = int(seconds)
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if left >= length and len(parts) < 2:
            parts.append(f"{left // length} {unit}")
            left %= length
        elif parts:
            break  # '2 h', not '2 h 1 s'
    return " ".join(parts)
