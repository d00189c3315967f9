"""Which folders a job sees at other paths, and where its checkpoints are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hf_cloudtrain.jobs.node.folders import folder_mounts, real_checkpoint_dir
from hf_cloudtrain.jobs.node.mounts import Mount
from hf_cloudtrain.jobs.submission import Submission


@pytest.mark.parametrize(
    ("more", "workspace", "targets", "real"),
    [
        ("", False, [], None),
        ("", True, ["/workspace"], None),
        ("checkpoint: {output_checkpoint_dir: ckpt}", False, ["/workspace"], "home/workspace/ckpt"),
        ("checkpoint: {output_checkpoint_dir: /no-such/ckpt}", False, ["/no-such/ckpt"], "home/checkpoint"),
        # Root may write there, but it is not a disk for checkpoints.
        ("checkpoint: {output_checkpoint_dir: /no-such}", False, ["/no-such"], "home/checkpoint"),
        ("data: {name: x, mount_path: /workspace/data}", False, ["/workspace"], None),
        ("data: {name: x, mount_path: /data}", False, [], None),
    ],
)
def test_mounts_and_the_real_checkpoint_folder(
    submission_of: Callable[..., Submission],
    tmp_path: Path,
    more: str,
    workspace: bool,
    targets: list[str],
    real: str | None,
) -> None:
    submission = submission_of(more, workspace=workspace)
    assert [mount.target for mount in folder_mounts(submission)] == targets
    assert real_checkpoint_dir(submission) == (tmp_path / real if real else None)


def test_an_existing_checkpoint_folder_is_used_as_it_is(
    submission_of: Callable[..., Submission], tmp_path: Path
) -> None:
    folder = tmp_path / "disk" / "ckpt"
    folder.mkdir(parents=True)
    submission = submission_of(f"checkpoint: {{output_checkpoint_dir: {folder}}}")
    assert real_checkpoint_dir(submission) == folder
    assert folder_mounts(submission) == []
    assert Mount(folder, str(folder)) not in folder_mounts(submission)
