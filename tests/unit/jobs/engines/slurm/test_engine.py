"""The engine slurm without a Slurm: what its supervisor does where Slurm says nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf_cloudtrain.jobs import lifecycle
from hf_cloudtrain.jobs.engines.slurm import batch_main, client
from hf_cloudtrain.jobs.engines.slurm.client import SlurmSilentError
from hf_cloudtrain.jobs.records import JobStore
from hf_cloudtrain.jobs.spec.job_file import parse_job

if TYPE_CHECKING:
    import pytest

FILE = b"name: toy\nengine: slurm\njob_setting: {docker: {command: torchrun train.py}}"


def test_a_saved_job_that_a_silent_slurm_does_not_queue_again_says_so_and_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(*command: str) -> str:
        raise SlurmSilentError("Slurm does not answer.")

    for module in (batch_main, client):
        monkeypatch.setattr(module, "call", silent)
    store = JobStore(str(tmp_path / "store"))
    submission = lifecycle.prepare(parse_job(FILE), store)
    record = store.create("toy", engine="slurm", nodes=1, nproc_per_node=1, max_restarts=0)
    record = store.write(record, state="queued", reason="Preempted in Slurm.", handle={"job": "7"})
    ended = batch_main.SlurmWatch(submission, store, "7", 0)._requeue(record)
    assert (ended.state, store.read("toy").state) == ("preempted", "preempted")
    assert "Slurm does not answer" in (ended.reason or "")
    assert "cloudtrain job run --resume toy-1" in (ended.reason or "")
