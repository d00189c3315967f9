"""A job to make nodes of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hf_cloudtrain.jobs.spec.job_file import parse_job
from hf_cloudtrain.jobs.submission import Submission

SubmissionOf = Callable[..., Submission]


@pytest.fixture
def submission_of(tmp_path: Path) -> SubmissionOf:
    """Makes the submission of a job with these further lines in its file."""

    def submission_of(more: str = "", *, workspace: bool = False) -> Submission:
        job = parse_job(
            f"name: toy\njob_setting: {{docker: {{command: echo, image: some/image}}}}\n{more}".encode()
        )
        home, run_url = tmp_path / "home", str(tmp_path / "run")
        return Submission(job, job.plan(), "toy-1", run_url, "store", home, has_workspace=workspace)

    return submission_of
