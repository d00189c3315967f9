"""Processes of a job: which one is meant."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

from hf_cloudtrain.runtime.process_tree import is_alive, this_process


def test_a_process_is_known_again_whatever_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    known = this_process()
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: 1e9)  # it comes from the clock
    assert is_alive(known)


@pytest.mark.parametrize("other", [{"boot": "another"}, {"began": 1.0}, {"pid": 2**22 + 1}, {"pid": None}])
def test_another_process_or_none_is_not_taken_for_it(other: dict[str, object]) -> None:
    assert is_alive(this_process())
    assert not is_alive({**this_process(), **other})


def test_nobody_is_alive_where_nobody_is_known() -> None:
    assert not is_alive({})


def test_who_started_a_process_that_is_ended_hears_how() -> None:
    """In a process of its own: this one has servers for other tests."""
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
