"""The engine `local`: how its supervisor is started. tests/integration/test_jobs_local.py runs jobs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_cloudtrain import env
from hf_cloudtrain.jobs import lifecycle
from hf_cloudtrain.jobs.engines import local
from hf_cloudtrain.jobs.records import JobStore
from hf_cloudtrain.jobs.spec.job_file import parse_job


def test_the_supervisor_is_started_elsewhere_and_with_the_variables_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(
        subprocess, "run", lambda argv, **options: started.append(options) or SimpleNamespace(returncode=0)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(env.STORE, "store")
    monkeypatch.setenv(env.CACHE, "cache")
    monkeypatch.setenv(env.RUN_URL, "s3://bucket/of-another")
    job = parse_job(b"name: toy\nenv: {PATH: /of/the/job}\njob_setting: {docker: {command: echo}}")
    store = JobStore()
    record = local.LocalEngine().submit(lifecycle.prepare(job, store), store, store.create("toy", **FACTS))
    (options,) = started
    assert options["cwd"] == tmp_path / "store" / "jobs" / record.id, "`-m` finds modules where it is started"
    assert options["env"]["PATH"].split(os.pathsep)[1:] == ["/of/the/job"]
    assert options["env"][env.CACHE] == str(tmp_path / "cache")
    assert env.RUN_URL not in options["env"]
    assert record.run_url == f"{tmp_path}/store/runs/toy-1", "the script runs elsewhere, too"


@pytest.mark.parametrize(("own", "folder"), [("", "/workspace/ckpt"), ("env: {CKPT_DIR: /mine}", "'***'")])
def test_a_dry_run_shows_the_variables_of_periflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, folder: str
) -> None:
    monkeypatch.setenv(env.STORE, str(tmp_path))
    text = (
        f"name: toy\n{own}\njob_setting: {{docker: {{command: echo}}}}\n"
        "checkpoint: {output_checkpoint_dir: /workspace/ckpt}\n"
    )
    shown = local.LocalEngine().show(lifecycle.prepare(parse_job(text.encode()), JobStore())).splitlines()
    assert f"  CKPT_DIR={folder}" in shown
    assert "  PROCESSED_ITERS=0" in shown


FACTS = {"engine": "local", "nodes": 1, "nproc_per_node": 1, "max_restarts": 0}
