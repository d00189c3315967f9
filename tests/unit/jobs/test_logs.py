"""Logs of a job: growing files, line by line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hf_cloudtrain.jobs import logs
from hf_cloudtrain.jobs.logs import MAX_LENGTH, follow_files, last_lines

if TYPE_CHECKING:
    import pytest


def test_lines_of_several_files_have_a_label_and_those_of_one_file_have_none(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"{name} 1\n{name} 2\n")
    files = {"node 0": tmp_path / "a", "node 1": tmp_path / "b"}
    assert list(follow_files(files, False, lambda: True)) == [
        "[node 0] a 1",
        "[node 0] a 2",
        "[node 1] b 1",
        "[node 1] b 2",
    ]
    assert list(follow_files({"node 1": tmp_path / "b"}, False, lambda: True)) == ["b 1", "b 2"]


def test_following_shows_all_lines_until_the_job_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "node-0.log"
    steps: Iterator[str] = iter(("first\nhal", "f\n", "last, without an end"))

    def is_over() -> bool:
        text = next(steps, None)
        if text is None:
            return True
        with path.open("a") as file:
            file.write(text)
        return False

    monkeypatch.setattr(logs, "POLL", 0.0)
    assert list(follow_files({"node 0": path}, True, is_over)) == ["first", "half", "last, without an end"]


def test_a_progress_bar_is_shown_in_its_last_state(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"0%\r50%\r100%\r\ndone \xff\n")
    assert list(follow_files({"x": path}, False, lambda: True)) == ["100%", "done \ufffd"]


def test_a_line_without_an_end_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x" * (5 * MAX_LENGTH) + b"\nend\n")
    lines = list(follow_files({"x": path}, False, lambda: True))
    assert max(map(len, lines)) <= MAX_LENGTH
    assert lines[-1] == "end"


def test_the_last_lines_of_a_large_file_and_of_a_missing_one(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"line {number}\n\n" for number in range(50_000)))
    assert last_lines(path, 2) == ["line 49998", "line 49999"]
    assert last_lines(tmp_path / "nothing", 2) == []


def test_a_node_shows_our_messages_and_not_those_of_the_clients() -> None:
    code = (
        "import logging; from hf_cloudtrain.jobs.logs import show_messages; show_messages('cloudtrain: %(message)s')\n"
        "logging.getLogger('botocore.credentials').info('Found credentials in environment variables.')\n"
        "logging.getLogger('hf_cloudtrain.jobs.node.restore').info('ours')\n"
        "logging.getLogger('__main__').info('of the module that runs')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "cloudtrain: ours\ncloudtrain: of the module that runs\n"
