"""Files of this machine are replaced whole, and a failed write leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_cloudtrain.runtime.files import is_left_over, locked, temp_suffix, write_whole


def test_a_file_is_replaced_and_no_other_file_is_left(tmp_path: Path) -> None:
    for data in (b"old", b"new"):
        write_whole(tmp_path / "log.json", data)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"log.json": b"new"}


def test_a_write_that_fails_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "log.json").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "log.json", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["log.json"]


def test_a_process_that_ended_and_still_has_its_number_has_left_its_folders_over() -> None:
    """The first process of a container may never take note of the end of an orphan."""
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    ) as child:
        name = f".000001-0000000005-{child.pid}-0123abcd"
        assert not is_left_over(name)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert is_left_over(name)
    assert is_left_over(name)
    assert not is_left_over(f"out-{temp_suffix()}")


def test_a_lock_keeps_what_is_in_its_file(tmp_path: Path) -> None:
    """The lock of a writer names the training that has started it."""
    (tmp_path / "writer.lock").write_bytes(b"who")
    with locked(tmp_path / "writer.lock"):
        assert (tmp_path / "writer.lock").read_bytes() == b"who"
    assert (tmp_path / "writer.lock").read_bytes() == b"who"
