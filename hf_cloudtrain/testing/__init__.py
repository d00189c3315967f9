"""Public fault injection: storage and disks that fail on purpose, and crash points.

Reading order: `storage` (a storage that fails, hangs, is slow or lies), `disk` (a disk that fills up or turns read-only, and a
process that dies at a chosen change of its disk). docs/testing.md shows how to try a training script with them.
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
