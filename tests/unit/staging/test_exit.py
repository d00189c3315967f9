"""The process that started the writer ends in its own ways, right after a save was staged: the save is committed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.local_home import wait_for_writer
from hf_cloudtrain.storage.client import Storage
from tests.faults.runs import contents
from tests.faults.staged import staged_bytes, wait_for_no_writer
from tests.integration._zygote import REPOSITORY

ENDS = {
    "the end of the script": ("pass", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "an error": ("raise RuntimeError('a bug')", 1),
    "os._exit": ("os._exit(4)", 4),
    "a fork that ends": ("os.fork() or sys.exit(5)", 0),
    "a thread that goes on": (
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
        0,
    ),
    "a signal": ("signal.signal(signal.SIGTERM, signal.SIG_DFL); os.kill(os.getpid(), signal.SIGTERM)", -15),
}


@pytest.mark.parametrize("way", ENDS)
@pytest.mark.parametrize("stands_still", [False, True])
def test_what_was_staged_is_committed(way: str, stands_still: bool, tmp_path: Path) -> None:
    """Also by a writer that begins its work after the end. The script has no `__main__` guard, as a notebook has none."""
    end, code = ENDS[way]
    out, url = tmp_path / "out", f"file://{tmp_path}/run"
    # It goes on by itself: an orderly end waits for it.
    later = "subprocess.Popen(['sh', '-c', f'sleep 1; kill -CONT {machine.saves.writer_pid}'])"
    stop = f"os.kill(machine.saves.writer_pid, signal.SIGSTOP); {later}" if stands_still else "pass"
    program = f"""\
import os, signal, subprocess, sys, threading, time
from pathlib import Path
from tests.faults.staged import StagedMachine
machine = StagedMachine(Path({str(out)!r}), {url!r})
machine.start()
{stop}
machine.save(5)
{end}
"""
    script = tmp_path / "script.py"
    script.write_text(program)
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(
        [sys.executable, script], env=variables, capture_output=True, text=True, check=False
    )
    assert ended.returncode == code, ended.stderr
    wait_for_no_writer(out)
    wait_for_writer(out)
    assert [key.step for key in Catalog(Storage(url)).checkpoints()] == [5], ended.stderr
    assert contents(out / "checkpoint-5") == staged_bytes(5)
    assert not list(out.glob("_cloudtrain/saving/*"))
