"""Identity of processes, and the end of a process tree."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

from hf_cloudtrain.runtime.process_tree import is_alive, this_process


def test_a_process_is_recognised_after_the_clock_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    known = this_process()
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: 1e9)  # psutil computes it from the clock
    assert is_alive(known)


@pytest.mark.parametrize("other", [{"boot": "another"}, {"began": 1.0}, {"pid": 2**22 + 1}, {"pid": None}])
def test_a_different_or_missing_process_is_not_recognised(other: dict[str, object]) -> None:
    assert is_alive(this_process())
    assert not is_alive({**this_process(), **other})


def test_an_empty_identity_is_not_alive() -> None:
    assert not is_alive({})


def test_the_parent_of_a_killed_process_gets_its_exit_code() -> None:
    """In a process of its own, because this one has started servers for other tests."""
    code = (
        "import subprocess\n"
        "from hf_cloudtrain.runtime.process_tree import kill_children\n"
        "process = subprocess.Popen(['sleep', '60'])\n"
        "kill_children()\n"
        "print(process.wait(5))\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(said.stdout) == -signal.SIGKILL
