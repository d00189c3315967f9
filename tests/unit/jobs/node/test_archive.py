"""The archive of a workspace: modes, links and empty folders stay, and nothing leads out of it."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from hf_cloudtrain.jobs.node.archive import pack, unpack


def test_a_folder_comes_back_without_links_that_lead_out_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = tmp_path / "code", tmp_path / "copy"
    (source / "empty").mkdir(parents=True)
    (source / "run.sh").write_text("true\n")
    (source / "run.sh").chmod(0o755)
    (source / "same").symlink_to("run.sh")
    (source / "out").symlink_to("/etc/hosts")
    pack(source, tmp_path / "a.tar.gz")
    unpack(tmp_path / "a.tar.gz", target)
    assert os.access(target / "run.sh", os.X_OK)
    assert (target / "same").readlink() == Path("run.sh")
    assert (target / "empty").is_dir()
    assert not os.path.lexists(target / "out")
    assert "Leaving out './out'" in caplog.text


def test_an_archive_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../out"))
    with pytest.raises(tarfile.OutsideDestinationError):
        unpack(tmp_path / "a.tar.gz", tmp_path / "in")
    assert not (tmp_path / "out").exists()
