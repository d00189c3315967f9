"""How busy the machine is: read by the thread of the heartbeat, and whatever fails there does not reach the training."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from hf_cloudtrain.tracking.host import HostMetrics
from hf_cloudtrain.tracking.status import run_state
from hf_cloudtrain.tracking.tracker import StepTracker
from tests.faults.runs import Machines, wait_until


def cuda(**more: Any) -> SimpleNamespace:
    """torch.cuda of a machine with three GPUs, of which the training uses the second and the third."""
    sizes = (0, 30 * 2**30, 10 * 2**30)
    known: dict[str, Any] = {
        "is_initialized": lambda: True,
        "device_count": lambda: 3,
        "memory_reserved": lambda device: sizes[device],
        "get_device_properties": lambda device: SimpleNamespace(total_memory=80 * 2**30),
        "utilization": lambda device: (0, 97, 83)[device],
    }
    return SimpleNamespace(cuda=SimpleNamespace(**{**known, **more}))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda: 38.04)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(percent=61.0))
    monkeypatch.setitem(sys.modules, "torch", cuda(is_initialized=lambda: False))


def test_the_share_of_the_cpu_is_that_since_the_last_look(machine: None) -> None:
    host = HostMetrics()
    assert host.read() == {"memory_percent": 61.0}
    assert host.read() == {"cpu_percent": 38.0, "memory_percent": 61.0}


def test_the_gpus_are_those_that_the_training_uses(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", cuda())
    assert HostMetrics().read() == {"memory_percent": 61.0, "gpu_memory_percent": 25.0, "gpu_percent": 90.0}


def test_what_fails_is_left_out(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any) -> float:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setitem(sys.modules, "torch", cuda(utilization=fails))
    assert HostMetrics().read() == {"memory_percent": 61.0, "gpu_memory_percent": 25.0}
    monkeypatch.setattr(psutil, "virtual_memory", fails)
    monkeypatch.delitem(sys.modules, "torch")
    assert HostMetrics().read() == {}


def test_only_the_thread_of_the_heartbeat_reads_it_and_a_reader_sees_it(
    machine: None, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()

    def cpu_percent() -> float:
        threads.add(threading.current_thread().name)
        return 38.0

    monkeypatch.setattr(psutil, "cpu_percent", cpu_percent)
    monkeypatch.setenv("HF_CLOUDTRAIN_HEARTBEAT", "0.02")
    number = machines.catalog.attempts.begin(0.0, 0, None, {}).number
    tracker = StepTracker(machines.catalog, number, first_step=0, total_steps=10)
    tracker.start()
    tracker.begin_step()
    tracker.end_step(1)
    tracker.log(1, {"loss": 0.5})
    tracker.heartbeat()
    wait_until(lambda: "cpu_percent" in run_state(machines.catalog).host, "a second heartbeat")
    tracker.close("finished")
    assert threads == {"cloudtrain-heartbeat"}
    assert run_state(machines.catalog).host == {"cpu_percent": 38.0, "memory_percent": 61.0}
