"""Workspace, checkpoint folder and dataset at the paths of the job."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

from hf_cloudtrain.jobs.engines.sagemaker.container_main import main
from hf_cloudtrain.jobs.node.folders import real_checkpoint_dir
from hf_cloudtrain.jobs.submission import Submission
from tests.unit.jobs.engines.sagemaker._container import FakeNode, Image, job

if TYPE_CHECKING:
    import pytest


def test_the_job_finds_everything_at_its_paths(image: Image) -> None:
    assert main(image.root) == 0
    assert os.access(image.mounts / "workspace/run.sh", os.X_OK)
    assert (image.mounts / "data/a.txt").read_text() == "1 2 3\n"
    assert (image.mounts / "workspace/ckpt").resolve() == (image.root / "checkpoints").resolve()
    assert not os.path.lexists(image.mounts / "workspace/out")  # it links to a file of a different machine
    assert FakeNode.starts == [(0, 1)]
    submission = Submission.load(image.root / "cloudtrain")
    assert submission.plan.grace == 105.0
    found = real_checkpoint_dir(submission)
    assert found is not None
    assert found.resolve() == (image.root / "checkpoints").resolve()
    kept = image.root / "output/data/cloudtrain/algo-1/0/exit-1.json"
    assert json.loads(kept.read_text())["outcome"] == "finished"
    assert image.failure() is None


def test_the_outbox_that_sagemaker_has_synced_is_deleted(image: Image) -> None:
    """Files from S3 have new inodes and times, so the records of an old outbox no longer describe them."""
    for path in (
        "checkpoints/.cloudtrain/outbox/x",
        "checkpoints/out/.cloudtrain/y",
        "checkpoints/out/model",
    ):
        (image.root / path).parent.mkdir(parents=True, exist_ok=True)
        (image.root / path).write_text("z")
    assert main(image.root) == 0
    assert [path.name for path in (image.root / "checkpoints").rglob("*") if path.is_file()] == ["model"]


def test_a_damaged_dataset_is_refused(image: Image) -> None:
    image.write("data/dataset/a.txt", "1 2 4\n")
    assert main(image.root) == 1
    assert FakeNode.starts == []
    assert "'numbers' arrived damaged" in (image.failure() or "")
    assert not (image.mounts / "data").exists()


def test_a_mount_path_that_the_image_uses_is_refused(image: Image) -> None:
    (image.mounts / "workspace").mkdir()
    (image.mounts / "workspace/README").write_text("of the image")
    assert main(image.root) == 1
    assert FakeNode.starts == []
    assert "would hide" in (image.failure() or "")
    assert (image.mounts / "workspace/README").exists()


def test_without_a_workspace_the_code_in_the_image_runs(image: Image) -> None:
    job(image, 1, has_workspace=False)
    (image.mounts / "workspace").mkdir()
    (image.mounts / "workspace/main.py").write_text("of the image")
    assert main(image.root) == 0
    assert (image.root / "cloudtrain/workspace/main.py").read_text() == "of the image"


def test_a_checkpoint_folder_in_the_workspace_stays(
    image: Image, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "code/ckpt").mkdir()
    (tmp_path / "code/ckpt/old.pt").write_text("old")
    with tarfile.open(image.root / "input/data/cloudtrain/workspace.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "code", arcname=".")
    assert main(image.root) == 0
    assert (image.mounts / "workspace/ckpt/old.pt").exists()
    assert "SageMaker does not sync it" in caplog.text
