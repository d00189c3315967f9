"""Jobs for SkyPilot, and a fake command `sky` that prints what SkyPilot 0.14 prints."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest  # noqa: TC002 - as every test

from hf_cloudtrain.jobs.engines import engine
from hf_cloudtrain.jobs.records import JobRecord, JobStore
from hf_cloudtrain.jobs.spec.job_file import parse_job, read_job
from hf_cloudtrain.jobs.submission import Submission

DATA = Path(__file__).resolve().parent / "data"
HOME = Path("/home/me/.hf_cloudtrain/jobs")
SKYPILOT = engine("skypilot")

GOLDEN = {
    # Golden file: job file, whether a workspace is given, and the run URL of a job that names none.
    "skypilot_glue.txt": ("periflow_glue.yml", True, "s3://bucket/runs/glue-run-1"),
    "skypilot_cifar.txt": ("periflow_cifar.yml", True, "gs://bucket/runs/cifar-job-1"),
    "skypilot_minimal.txt": ("job_minimal.yml", False, "hf://buckets/team/runs/minimal-1"),
    "skypilot_everything.txt": ("job_everything.yml", True, ""),
}


def submission_of(
    content: bytes | Path, run_url: str = "s3://bucket/runs/x", *, home: Path = HOME, workspace: bool = False
) -> Submission:
    job = read_job(content) if isinstance(content, Path) else parse_job(content)
    job_id = f"{job.name}-1"
    return Submission(
        job=job,
        plan=job.plan("skypilot"),
        id=job_id,
        run_url=job.run_url or run_url,
        store="s3://bucket/store",
        home=home / job_id,
        has_workspace=workspace,
    )


def job_text(*lines: str, name: str = "x") -> bytes:
    return "\n".join(
        [f"name: {name}", "job_setting: {docker: {command: torchrun train.py}}", *lines]
    ).encode()


LAUNCHED = "Submitted.\n📋 Useful Commands\nManaged Job ID: 12\n├── To cancel the job:\t\t\x1b[1msky jobs cancel 12\x1b[0m\n"


FAKE = """\
#!/bin/sh
# Prints what the test has written, and records its arguments.
printf '%s\\n' "$*" >> "$FAKE_SKY/calls"
env | grep -e '^TOKEN=' >> "$FAKE_SKY/environment"
case "$1 $2" in
*queue*) name=queue ;;
*logs*) name=logs ;;
*launch*) name=launch ;;
*) name=other ;;
esac
cat "$FAKE_SKY/$name" 2>/dev/null
[ ! -e "$FAKE_SKY/$name.code" ] || exit "$(cat "$FAKE_SKY/$name.code")"
"""


class FakeSky:
    """A fake command `sky`: the test decides what it prints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        script = folder / "bin" / "sky"
        script.write_text(FAKE)
        script.chmod(script.stat().st_mode | stat.S_IXUSR)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put it on the PATH, as `sky`."""
        monkeypatch.setenv("PATH", f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("FAKE_SKY", str(self.folder))
        monkeypatch.setattr(sys, "executable", str(self.folder / "no" / "python"))

    def prints(self, what: str, text: str, code: int = 0) -> None:
        (self.folder / what).write_text(text)
        if code:
            (self.folder / f"{what}.code").write_text(str(code))

    def lists(self, *rows: dict[str, Any]) -> None:
        rows = tuple({"job_name": "x-1", **row} for row in rows)
        self.prints("queue", "Hint: a newer version is there.\n" + json.dumps(list(rows), indent=2) + "\n")

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


def submitted(store: JobStore, sky: FakeSky, *lines: str, run_url: str = "s3://bucket/runs/x") -> JobRecord:
    submission = submission_of(job_text(*lines), run_url, home=Path(store.below("jobs")), workspace=True)
    submission.workspace.mkdir(parents=True)
    record = store.create(
        "x", engine="skypilot", run_url=run_url, nodes=submission.plan.nodes, nproc_per_node=1, max_restarts=3
    )
    return SKYPILOT.submit(submission, store, record)
