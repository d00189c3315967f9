"""How busy the machine of a training is. The thread of the heartbeat reads it, so no step waits for it."""

from __future__ import annotations

import contextlib
import statistics
import sys
from typing import Any

HOST_METRICS = {
    "cpu_percent": "CPU",
    "memory_percent": "memory",
    "gpu_percent": "GPU",
    "gpu_memory_percent": "GPU memory",
}
"""The names in a heartbeat, and in words."""


class HostMetrics:
    """Reads how busy the machine is.

    Example:
        >>> host = HostMetrics()
        >>> host.read()             # the first time without the CPU, whose share is that since the last call
        {'memory_percent': 41.0}
    """

    def __init__(self) -> None:
        self._is_first = True

    def read(self) -> dict[str, float]:
        """Shares of CPU and memory of this machine, and of the GPUs that this process uses; what is not known is left out."""
        found: dict[str, float] = {}
        with contextlib.suppress(Exception):  # a container may hide /proc
            import psutil

            found = {"cpu_percent": psutil.cpu_percent(), "memory_percent": psutil.virtual_memory().percent}
            if self._is_first:
                del found["cpu_percent"]
            self._is_first = False
        torch = sys.modules.get("torch")
        with contextlib.suppress(Exception):  # a driver that fails; nvidia-ml-py is not installed
            if torch is not None and torch.cuda.is_initialized():
                _add_gpus(torch.cuda, found)
        return {name: round(float(value), 1) for name, value in found.items()}


def _add_gpus(cuda: Any, found: dict[str, float]) -> None:
    """By torch's own books and by NVML. A question to the CUDA runtime could break the capture of a CUDA graph."""
    mine = {device: cuda.memory_reserved(device) for device in range(cuda.device_count())}
    mine = {device: size for device, size in mine.items() if size}
    if mine:
        total = sum(cuda.get_device_properties(device).total_memory for device in mine)
        found["gpu_memory_percent"] = 100 * sum(mine.values()) / total
        found["gpu_percent"] = statistics.fmean(cuda.utilization(device) for device in mine)
