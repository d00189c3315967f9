"""A job, and what Slurm says about one, for the tests of the engine `slurm`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hf_cloudtrain.jobs.engines.slurm.client import SlurmJob
from hf_cloudtrain.jobs.spec.job_file import parse_job
from hf_cloudtrain.jobs.submission import Submission


def submission(more: str = "", home: str = "/shared/jobs/toy-1") -> Submission:
    job = parse_job(
        f"name: toy\nengine: slurm\njob_setting: {{docker: {{command: torchrun train.py}}}}\n{more}".encode()
    )
    return Submission(job, job.plan(), "toy-1", "/runs/toy", "/shared", Path(home))


def slurm_job(**changes: object) -> SlurmJob:
    job = SlurmJob(
        "toy-1", "RUNNING", "None", 0, "0:0", began=100.0, ended=1900.0, limit=1800.0, preempted=None
    )
    return dataclasses.replace(job, **changes)  # type: ignore[arg-type]
