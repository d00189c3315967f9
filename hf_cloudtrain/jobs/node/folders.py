"""Which folders a job sees at other paths than their own, and where its checkpoints are on this disk."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from pathlib import Path

from hf_cloudtrain.jobs.node.mounts import Mount
from hf_cloudtrain.jobs.spec.values import is_below
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.storage.urls import is_local, local_path


def folder_mounts(submission: Submission) -> list[Mount]:
    """Workspace and checkpoint folder, if they are not at their paths already."""
    job = submission.job
    target = job.job_setting.workspace.mount_path
    inner = [job.checkpoint_dir, job.data.mount_path if job.data else None]
    mounts = []
    if submission.has_workspace or any(path and is_below(path, target) for path in inner):
        mounts.append(Mount(submission.workspace, target))
    folder, real = job.checkpoint_dir, real_checkpoint_dir(submission)
    if folder is not None and real == submission.home / "checkpoint":
        mounts.append(Mount(real, folder))
    return mounts


def real_checkpoint_dir(submission: Submission) -> Path | None:
    """The checkpoint folder of a job on this disk; None if the job names none."""
    folder = submission.job.checkpoint_dir
    if folder is None:
        return None
    target = submission.job.job_setting.workspace.mount_path
    if is_below(folder, target):
        return submission.workspace / posixpath.relpath(folder, target)
    parent = os.path.dirname(folder)
    # A disk that the machine has for it. The root folder is not one, although root may write there.
    if os.path.isdir(folder) or (parent != "/" and os.access(parent, os.W_OK)):
        return Path(folder)
    return submission.home / "checkpoint"


def unmoved_folders(submission: Submission) -> Iterator[Mount]:
    """Folders that a command writes to at the machine's own paths; without a mount a container would lose the files."""
    run, folder = submission.run_url, submission.job.checkpoint_dir
    if is_local(run):
        yield Mount(Path(local_path(run)), local_path(run))
    if folder is not None and real_checkpoint_dir(submission) == Path(folder):
        yield Mount(Path(folder), folder)
