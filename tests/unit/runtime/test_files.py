"""Files of this machine are replaced whole, and a failed write leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_cloudtrain.runtime.files import write_whole


def test_a_file_is_replaced_and_no_other_file_is_left(tmp_path: Path) -> None:
    for data in (b"old", b"new"):
        write_whole(tmp_path / "log.json", data)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"log.json": b"new"}


def test_a_write_that_fails_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "log.json").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "log.json", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["log.json"]
