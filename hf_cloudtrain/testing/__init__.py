"""Fault injection for tests of training scripts, public as `hf_cloudtrain.testing`. docs/testing.md shows examples.

- `storage`: `FaultyStorage`, whose requests fail, hang, are slow or return wrong answers
- `disk`: `FaultyDisk`, which is full or read-only, and `CrashPoint`, which ends the process at a change of a folder

May import every other room; no other room imports this one.
"""

from hf_cloudtrain.testing.disk import CRASH_STATUS, DISK_POINTS, CrashPoint, FaultyDisk, crash_now
from hf_cloudtrain.testing.storage import POINTS, Call, FaultyStorage, Kind, Lie, Point, flip_bit

__all__ = [
    "CRASH_STATUS",
    "DISK_POINTS",
    "POINTS",
    "Call",
    "CrashPoint",
    "FaultyDisk",
    "FaultyStorage",
    "Kind",
    "Lie",
    "Point",
    "crash_now",
    "flip_bit",
]
