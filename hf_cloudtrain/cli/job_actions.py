"""What the commands of `cloudtrain job` do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from hf_cloudtrain.cli.arguments import open_catalog
from hf_cloudtrain.cli.output import (
    fail,
    of_total,
    print_json,
    say,
    show_facts,
    show_table,
    transfer,
    warnings_shown,
)
from hf_cloudtrain.errors import CloudTrainError
from hf_cloudtrain.jobs import lifecycle
from hf_cloudtrain.jobs.logs import last_lines
from hf_cloudtrain.jobs.node.workspace import workspace_size
from hf_cloudtrain.jobs.records import JobRecord, JobStore
from hf_cloudtrain.jobs.spec.job import EngineName
from hf_cloudtrain.jobs.spec.job_file import read_job
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.runtime.text import clean, duration_text, size_text, time_text
from hf_cloudtrain.tracking.status import RunState, run_state

POLL = 1.0
"""Seconds between two looks at a job that is waited for."""
LATE = 600.0
"""Seconds for data, setup and imports, after which a job that trains nothing yet is shown as stalled."""


def run(
    file: Path,
    directory: Path | None,
    engine_name: EngineName | None,
    nodes: int | None,
    nproc_per_node: int | None,
    *,
    wait: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """See `cloudtrain job run`."""
    try:
        job = read_job(file)
    except OSError as error:
        fail(
            f"{str(file)!r} cannot be read ({error.strerror}). `cloudtrain job template > job.yml` makes a job file."
        )
    store = JobStore()
    submission = lifecycle.prepare(
        job, store, engine_name=engine_name, nodes=nodes, nproc_per_node=nproc_per_node, workspace=directory
    )
    size = _size_of(directory, lifecycle.own_folders(submission))
    if dry_run:
        _show_submission(submission, size, as_json)
        return
    with warnings_shown(), transfer("Copying the workspace", size or 0) as progress:
        record = lifecycle.submit(submission, store, directory, on_bytes=progress.add)
    _submitted(store, record, wait, as_json)


def resume(job_id: str, wait: bool, as_json: bool) -> None:
    """See `cloudtrain job run --resume`."""
    store = JobStore()
    with warnings_shown():
        record = lifecycle.resume(store, job_id)
    _submitted(store, record, wait, as_json)


def show_list(experiment: str | None, limit: int | None, as_json: bool) -> None:
    """See `cloudtrain job list`."""
    store = JobStore()
    records = [record for record in store.records() if experiment in (None, record.experiment)]
    left_out = 0 if limit is None else max(0, len(records) - limit)
    shown = [_looked_at(store, record) for record in records[left_out:]]
    if as_json:
        print_json({"store": store.url, "jobs": [lifecycle.facts_of(record) for record in shown]})
        return
    if not shown:
        say(f"There is no job in {store.url!r}. `cloudtrain job run -f job.yml` starts one.")
        return
    columns = ("job", "state", "engine", "nodes", "processes", "starts", "restarts", "created", "run")
    show_table(columns, map(_row, shown), numbers=("nodes", "processes", "starts", "restarts"))
    if left_out:
        say(f"{left_out} older ones are not shown: --all does.")


def show_status(job_id: str, as_json: bool) -> None:
    """See `cloudtrain job status`."""
    store = JobStore()
    record = _looked_at(store, store.read(job_id))
    run_now = _run_now(record)
    stall = _stall(record, run_now)
    if as_json:
        run_facts = None if run_now is None else run_now.record()
        print_json({**lifecycle.facts_of(record), "run": run_facts, "stalled": stall})
        return
    show_facts(
        {
            "job": record.id,
            "experiment": record.experiment,
            "state": record.state + (f" (stalled: {stall})" if stall else ""),
            "reason": record.reason,
            "engine": record.engine + _handle(record),
            "vm": record.vm,
            "nodes": _shape(record.nodes, record.nproc_per_node),
            "restarts": f"{record.restarts} of {record.max_restarts}",
            "created": time_text(record.created),
            "step": run_now and of_total(run_now.step, run_now.total_steps, percent=True),
            "newest": run_now and run_now.last_committed,
            "run": f"{record.run_url}  (cloudtrain run status {record.run_url})",
            "home": record.home,
        }
    )
    if record.starts:
        typer.echo()
        columns = ("start", "began", "took", "outcome", "exit codes", "reason")
        show_table(columns, [_start_row(start) for start in record.starts], numbers=("start",))
    if record.state == "failed":
        _show_last_words(record)


def show_logs(job_id: str, node: int | None, follow: bool, as_json: bool) -> None:
    """See `cloudtrain job logs`."""
    store = JobStore()
    record = store.read(job_id)
    if node is not None and node >= record.nodes:
        fail(f"The job {record.id!r} has {record.nodes} nodes: --node takes 0 to {record.nodes - 1}.")
    lines = lifecycle.starter_of(record).lines(record, node, follow)
    if as_json and not follow:
        print_json({"id": record.id, "lines": [clean(line) for line in lines]})
        return
    _print(record, lines, as_json)


def cancel(job_id: str, wait: bool, as_json: bool) -> None:
    """See `cloudtrain job cancel`."""
    store = JobStore()
    record = lifecycle.cancel(store, job_id)
    if wait:
        with _leaving(record):
            record = _wait_until_over(store, record)
    if as_json:
        print_json(lifecycle.facts_of(record))
    elif wait:
        say(f"{record.id} is {record.state}. {record.reason or ''}".strip())
    else:
        say(f"{record.id} is asked to end. `cloudtrain job status {record.id}` shows when it has.")


def _submitted(store: JobStore, record: JobRecord, wait: bool, as_json: bool) -> None:
    if not as_json:
        say(f"Job {record.id}, run {record.run_url}")
        say(
            f"`cloudtrain job logs -f {record.id}` shows what it says, `cloudtrain job status {record.id}` how it is."
        )
    if wait:
        if as_json:
            with _leaving(record):
                record = _wait_until_over(store, record)
        else:
            _print(record, lifecycle.starter_of(record).lines(record, None, True), as_json=False)
            record = _wait_until_over(store, record)
            say(f"{record.id} is {record.state}. {record.reason or ''}".strip())
    if as_json:
        print_json(lifecycle.facts_of(record))
    if wait and record.state != "finished":
        raise typer.Exit(1)


def _wait_until_over(store: JobStore, record: JobRecord) -> JobRecord:
    while True:
        record = _looked_at(store, store.read(record.id))
        if record.is_over:
            return record
        time.sleep(POLL)


def _looked_at(store: JobStore, record: JobRecord) -> JobRecord:
    """One engine that does not answer must not hide the jobs of the others."""
    try:
        return lifecycle.look(store, record)
    except (CloudTrainError, OSError) as error:
        say(f"Warning: {record.engine} does not answer about {record.id}, so its record is shown. {error}")
        return record


def _print(record: JobRecord, lines: Iterator[str], as_json: bool) -> None:
    import json

    with _leaving(record):
        for line in lines:
            typer.echo(json.dumps({"line": clean(line)}) if as_json else clean(line))


@contextlib.contextmanager
def _leaving(record: JobRecord) -> Iterator[None]:
    """Ctrl-C ends the looking, and not the job."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"{record.id} goes on. `cloudtrain job cancel {record.id}` ends it.")
        raise typer.Exit(130) from None


def _size_of(directory: Path | None, leave_out: list[Path]) -> int | None:
    if directory is None or not directory.is_dir():
        return None
    found = workspace_size(directory, leave_out=leave_out)
    for text in found.skipped[:10]:
        say(f"Not copied: {text}")
    if found.advice is not None:
        say(f"Warning: {found.advice}")
    return found.size


def _show_submission(submission: Submission, size: int | None, as_json: bool) -> None:
    text = lifecycle.starter(submission).show(submission)
    plan, job = submission.plan, submission.job
    if as_json:
        facts = {"engine": job.engine, "nodes": plan.nodes, "nproc_per_node": plan.nproc_per_node}
        print_json(
            {
                "id": submission.id,
                **facts,
                "run_url": submission.run_url,
                "workspace_size": size,
                "shown": text,
            }
        )
        return
    typer.echo(
        clean(f"# {submission.id} by the engine {job.engine}: {_shape(plan.nodes, plan.nproc_per_node)}")
    )
    typer.echo(clean(f"# run: {submission.run_url}"))
    if size is not None:
        typer.echo(f"# workspace: {size_text(size)}")
    for line in text.splitlines():
        typer.echo(clean(line))


def _run_now(record: JobRecord) -> RunState | None:
    """How far the run is; None where its storage does not answer."""
    try:
        return run_state(open_catalog(record.run_url))
    except (CloudTrainError, OSError) as error:
        say(f"Warning: the run does not answer. {error}")
        return None


def _stall(record: JobRecord, now: RunState | None) -> str | None:
    """Why a job that runs seems not to get on."""
    if record.state not in ("running", "starting") or not record.starts or now is None:
        return None
    began = record.starts[-1].began
    if record.state == "running":
        return now.stalled if (now.last_seen or 0.0) > began else None
    waited = time.time() - began
    return f"no training has begun for {duration_text(waited)}" if waited > LATE else None


def _show_last_words(record: JobRecord) -> None:
    for rank in range(record.nodes):
        lines = last_lines(Path(record.home, "log", f"node-{rank}.log"), 15)
        if lines:
            typer.echo(f"\nThe last lines of node {rank}:")
            for line in lines:
                typer.echo(f"  {clean(line)}")
            return


def _row(record: JobRecord) -> tuple[object, ...]:
    processes = record.nodes * record.nproc_per_node
    return (
        record.id,
        record.state,
        record.engine,
        record.nodes,
        processes,
        len(record.starts),
        record.restarts,
        time_text(record.created),
        record.run_url,
    )


def _start_row(start: Any) -> tuple[object, ...]:
    codes = " ".join("lost" if code is None else str(code) for code in start.exit_codes)
    took = duration_text(start.ended - start.began) if start.ended else None
    return start.number, time_text(start.began), took, start.outcome or "runs", codes, start.reason


def _handle(record: JobRecord) -> str:
    shown = ", ".join(
        f"{key} {value}" for key, value in record.handle.items() if key not in ("began", "boot")
    )
    return f" ({shown})" if shown else ""


def _shape(nodes: int, processes: int) -> str:
    return f"{nodes} node{'' if nodes == 1 else 's'} of {processes} process{'' if processes == 1 else 'es'}"
