"""How the uploads stand, as the tracker reads it."""

from __future__ import annotations

from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.upload_status import REMEMBERED_COMMITS, Commit, UploadStatus


def commit(step: int, size: int | None = None) -> Commit:
    return Commit(CheckpointKey(1, step), saved=float(step), committed=step + 1.0, size=size)


def test_each_commit_is_handed_out_once() -> None:
    status = UploadStatus()
    status.committed(commit(5))
    status.committed(commit(10))
    assert status.take_commits() == [commit(5), commit(10)]
    assert status.take_commits() == []


def test_a_commit_that_rank_0_notes_twice_counts_once() -> None:
    """The upload queue has committed it, and the watch has seen it."""
    status = UploadStatus()
    status.committed(commit(5, size=100))
    status.committed(commit(5))
    assert status.take_commits() == [commit(5, size=100)]


def test_the_newest_commit_stays_the_last_one_although_an_older_one_follows() -> None:
    status = UploadStatus()
    status.committed(commit(10))
    status.committed(commit(5))
    assert status.last_committed == CheckpointKey(1, 10)
    assert len(status.take_commits()) == 2


def test_commits_that_are_never_taken_do_not_fill_the_memory() -> None:
    status = UploadStatus()
    for step in range(REMEMBERED_COMMITS + 5):
        status.committed(commit(step))
    assert len(status.take_commits()) == REMEMBERED_COMMITS
