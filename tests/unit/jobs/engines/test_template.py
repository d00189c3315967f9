"""The template of docs/add-an-engine.md is a working engine: it submits, follows, looks at and cancels a job."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.jobs import lifecycle
from hf_cloudtrain.jobs.engines import protocol
from hf_cloudtrain.jobs.records import JobRecord, JobStore
from hf_cloudtrain.jobs.spec.job_file import parse_job

TEMPLATE = Path(__file__).resolve().parents[4] / "docs" / "engine_template.py"
FINISHES = """echo 'step 1'; echo '{"outcome": "finished"}' > "$HF_CLOUDTRAIN_EXIT_FILE\""""
SECONDS = 60.0


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobStore]:
    """A store, and the template in place of the engine `local`: a job file names only engines of the package."""
    spec = importlib.util.spec_from_file_location("engine_template", TEMPLATE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "engine_template", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(protocol._HOMES, "local", "engine_template")
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path))
    store = JobStore()
    yield store
    for record in store.records():
        if not record.is_over:
            lifecycle.cancel(store, record.id)
            ended(store, record.id)


def submitted(store: JobStore, command: str) -> JobRecord:
    job = parse_job(f"name: toy\njob_setting:\n  docker:\n    command: |\n      {command}\n".encode())
    return lifecycle.submit(lifecycle.prepare(job, store), store)


def ended(store: JobStore, job_id: str) -> JobRecord:
    deadline = time.monotonic() + SECONDS
    while not (record := lifecycle.look(store, store.read(job_id))).is_over:
        assert time.monotonic() < deadline, record
        time.sleep(0.05)
    return record


def test_a_job_runs_to_its_end_and_its_output_is_followed(store: JobStore) -> None:
    record = submitted(store, FINISHES)
    assert list(protocol.engine("local").lines(record, None, follow=True)) == ["--- start 1 ---", "step 1"]
    record = ended(store, record.id)
    assert (record.state, [start.exit_codes for start in record.starts]) == ("finished", [(0,)])


def test_a_job_is_cancelled_and_resumed(store: JobStore) -> None:
    record = submitted(store, f"echo ready; [ -e again ] || {{ touch again; sleep 600; }}; {FINISHES}")
    lines = protocol.engine("local").lines(record, 0, follow=True)
    assert [next(lines), next(lines)] == ["--- start 1 ---", "ready"]
    lifecycle.cancel(store, record.id)
    assert ended(store, record.id).state == "cancelled"
    assert "step 1" not in list(lines)  # they end with the job
    lifecycle.resume(store, record.id)
    assert ended(store, record.id).state == "finished"


def test_a_job_that_it_cannot_run_is_refused_and_a_dry_run_starts_nothing(store: JobStore) -> None:
    job = parse_job(b"name: toy\njob_setting: {docker: {command: 'true'}}\nlocal: {nodes: 2}")
    with pytest.raises(ConfigurationError, match="runs one node, but the job needs 2"):
        lifecycle.submit(lifecycle.prepare(job, store), store)
    assert protocol.engine("local").show(lifecycle.prepare(job, store)).endswith("/jobs/toy-1\n")
    assert store.ids() == []
