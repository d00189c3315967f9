"""What the commands of `cloudtrain job` do. `commands/job.py` imports it late: it brings pydantic and the engines."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from hf_cloudtrain.checkpoints.titles import Titles
from hf_cloudtrain.cli.output import (
    confirm,
    fail,
    of_total,
    print_json,
    say,
    show_facts,
    show_table,
    transfer,
    warnings_shown,
)
from hf_cloudtrain.cli.runs import name_of, open_catalog
from hf_cloudtrain.cli.tables import Columns
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError
from hf_cloudtrain.jobs import deletion, lifecycle
from hf_cloudtrain.jobs.inventory import this_machine
from hf_cloudtrain.jobs.logs import last_lines
from hf_cloudtrain.jobs.node.workspace import workspace_size
from hf_cloudtrain.jobs.records import JobRecord, JobStore, job_columns, start_columns
from hf_cloudtrain.jobs.spec.job import EngineName
from hf_cloudtrain.jobs.spec.job_file import read_job
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.runtime.text import clean, count_text, duration_text, size_text, time_text
from hf_cloudtrain.tracking.status import RunState, run_state

POLL = 1.0
"""Seconds between two looks at a job that is waited for."""
LATE = 600.0
"""Seconds for data, setup and imports, after which a job that has not begun training is shown as stalled."""

JOBS: Columns = {**job_columns(time_text), "run": lambda job: name_of(job.run_url)}
SPARE = ("run", "processes", "nodes", "restarts", "starts", "engine", "created")
ENDED = {"cancelled": "was cancelled", "preempted": "was preempted", "lost": "is lost"}
"""How a state reads in a sentence; "failed" and "finished" do as they are."""


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
            f"Cannot read {str(file)!r} ({error.strerror}). Create a job file with `cloudtrain job template > job.yml`."
        )
    store = JobStore()
    submission = lifecycle.prepare(
        job, store, engine_name=engine_name, nodes=nodes, nproc_per_node=nproc_per_node, workspace=directory
    )
    _say_what_starts(submission)
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
    shown = [_current(store, record) for record in records[left_out:]]
    if as_json:
        print_json({"store": store.url, "jobs": [lifecycle.facts_of(record) for record in shown]})
        return
    if not shown:
        say(f"No jobs in {store.url!r}. Start one with `cloudtrain job run -f job.yml`.")
        return
    shown.sort(key=lambda job: job.experiment or "")  # those of one experiment are together
    grouped = any(job.experiment for job in shown)
    columns = {name: cell for name, cell in JOBS.items() if grouped or name != "experiment"}
    show_table(columns, shown, spare=SPARE)
    if left_out:
        say(f"{count_text(left_out, 'older job')} not shown. List all with --all.")


def show_status(job_id: str, as_json: bool) -> None:
    """See `cloudtrain job status`."""
    store = JobStore()
    record = _current(store, store.read(job_id))
    now = _run_state(record)
    stalled = _stall(record, now)
    if as_json:
        print_json({**lifecycle.facts_of(record), "run": now and now.record(), "stalled": stalled})
        return
    titled = _titles_of(record)
    show_facts(
        {
            "job": record.id,
            "experiment": record.experiment,
            "state": record.state + (f" (stalled: {stalled})" if stalled else ""),
            "reason": titled(record.reason),
            "engine": record.engine + _handle(record),
            "vm": record.vm,
            "nodes": _shape(record.nodes, record.nproc_per_node),
            "restarts": f"{record.restarts} of {record.max_restarts}",
            "created": time_text(record.created),
            "step": now and of_total(now.step, now.total_steps, percent=True),
            "newest": now and titled(now.last_committed),
            "run": record.run_url,
            "home": record.home,
        }
    )
    if record.starts:
        typer.echo()
        starts = [dataclasses.replace(start, reason=titled(start.reason)) for start in record.starts]
        show_table(start_columns(time_text), starts, spare=["took", "began"], prose="reason")
    if record.state == "failed":
        _show_last_lines(record)


def show_logs(job_id: str, node: int | None, follow: bool, as_json: bool) -> None:
    """See `cloudtrain job logs`."""
    record = JobStore().read(job_id)
    if node is not None and node >= record.nodes:
        fail(
            f"--node {node} is out of range: {record.id!r} has {count_text(record.nodes, 'node')}, numbered from 0."
        )
    lines = lifecycle.starter(record).lines(record, node, follow)
    if as_json and not follow:
        print_json({"id": record.id, "lines": [clean(line) for line in lines]})
    else:
        _print(record, lines, as_json)


def cancel(job_id: str, wait: bool, as_json: bool) -> None:
    """See `cloudtrain job cancel`."""
    store = JobStore()
    record = lifecycle.cancel(store, job_id)
    if wait:
        record = _wait_until_over(store, record)
    if as_json:
        print_json(lifecycle.facts_of(record))
    elif wait:
        _say_ended(record)
    else:
        say(f"Asked {record.id} to end. Check it with `cloudtrain job status {record.id}`.")


def delete(job_id: str, force: bool, yes: bool, as_json: bool) -> None:
    """See `cloudtrain job delete`."""
    store = JobStore()
    record = deletion.find(store, job_id)
    job_id = record.id if record else job_id
    home = deletion.home(store, job_id, record)
    losses = []
    if record is not None and record.state != "finished":
        losses.append(f"It {ENDED.get(record.state, record.state)}, and could not be resumed afterwards.")
    if losses and not force:
        fail(f"The job {job_id!r} is protected. {' '.join(losses)} Pass --force to delete it anyway.")
    if losses:
        say(f"Warning: {' '.join(losses)}")
    confirm(f"Delete the job {job_id!r} with its logs and its workspace?", yes)
    is_here = home.exists()
    deletion.delete(store, job_id, home)
    say(f"Deleted the job {job_id}.")
    if record is not None:
        if not is_here:
            say(f"Its folder {record.home!r} on {record.submitted_by.get('host')!r} stays.")
        say(
            f"Its run stays: {record.run_url}. Delete it with `cloudtrain run delete {name_of(record.run_url)}`."
        )
    if as_json:
        print_json({"id": job_id, "losses": losses, "run_url": record and record.run_url})


def _submitted(store: JobStore, record: JobRecord, wait: bool, as_json: bool) -> None:
    if not as_json:
        say(f"Job {record.id}, run {record.run_url}")
        say(f"Log: `cloudtrain job logs -f {record.id}`. State: `cloudtrain job status {record.id}`.")
    if wait:
        if not as_json:
            _print(record, lifecycle.starter(record).lines(record, None, True), as_json=False)
        record = _wait_until_over(store, record)
        if not as_json:
            _say_ended(record)
    if as_json:
        print_json(lifecycle.facts_of(record))
    if wait and record.state != "finished":
        raise typer.Exit(1)


def _say_ended(record: JobRecord) -> None:
    say(
        f"{record.id} {ENDED.get(record.state, record.state)}. {_titles_of(record)(record.reason) or ''}".strip()
    )


def _titles_of(record: JobRecord) -> Callable[[str | None], str | None]:
    """Puts folders in place of keys into texts about the job."""
    try:
        titles = Titles(open_catalog(record.run_url))
    except ConfigurationError:  # recorded by an older version, which refused fewer URLs
        return lambda text: text
    return lambda text: text and titles.in_text(text)


def _wait_until_over(store: JobStore, record: JobRecord) -> JobRecord:
    with _interruptible(record):
        while not (record := _current(store, store.read(record.id))).is_over:
            time.sleep(POLL)
    return record


def _current(store: JobStore, record: JobRecord) -> JobRecord:
    """The record with what its engine knows now. An engine that does not answer must not hide the jobs of the others."""
    try:
        return lifecycle.look(store, record)
    except (CloudTrainError, OSError) as error:
        say(
            f"Warning: cannot ask {record.engine} about {record.id}, so its last known state is shown. {error}"
        )
        return record


def _print(record: JobRecord, lines: Iterator[str], as_json: bool) -> None:
    with _interruptible(record):
        for line in lines:
            typer.echo(json.dumps({"line": clean(line)}) if as_json else clean(line))


@contextlib.contextmanager
def _interruptible(record: JobRecord) -> Iterator[None]:
    """Ctrl-C ends this command, not the job."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"{record.id} keeps running. Cancel it with `cloudtrain job cancel {record.id}`.")
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


def _say_what_starts(submission: Submission) -> None:
    """The engine `local` has no machines of the type in `vm`."""
    job, plan = submission.job, submission.plan
    if job.engine != "local" or job.vm is None:
        return
    try:
        count = sum(vm.gpus for vm in this_machine())
        gpus = f", which has {count_text(count, 'GPU') if count else 'no GPU'}"
    except (CloudTrainError, OSError, subprocess.SubprocessError):
        gpus = ""
    say(
        f"Engine local has no {job.vm}: all {plan.world_size} processes ({_shape(plan.nodes, plan.nproc_per_node)}) start "
        f"on this machine{gpus}."
    )


def _show_submission(submission: Submission, size: int | None, as_json: bool) -> None:
    text = lifecycle.starter(submission.job).show(submission)
    engine, plan = submission.job.engine, submission.plan
    if as_json:
        print_json(
            {
                "id": submission.id,
                "engine": engine,
                "nodes": plan.nodes,
                "nproc_per_node": plan.nproc_per_node,
                "run_url": submission.run_url,
                "workspace_size": size,
                "shown": text,
            }
        )
        return
    lines = [
        f"# {submission.id} with engine {engine}: {_shape(plan.nodes, plan.nproc_per_node)}",
        f"# run: {submission.run_url}",
        *([] if size is None else [f"# workspace: {size_text(size)}, at {submission.start_folder}"]),
        *text.splitlines(),
    ]
    for line in lines:
        typer.echo(clean(line))


def _run_state(record: JobRecord) -> RunState | None:
    """How far the run is; None if its storage cannot be read."""
    try:
        return run_state(open_catalog(record.run_url))
    except (CloudTrainError, OSError) as error:
        say(f"Warning: cannot read the run. {error}")
        return None


def _stall(record: JobRecord, now: RunState | None) -> str | None:
    """Why a running job seems to make no progress."""
    if record.state not in ("running", "starting") or not record.starts or now is None:
        return None
    began = record.starts[-1].began
    if record.state == "running":
        return now.stalled if (now.last_seen or 0.0) > began else None
    waited = time.time() - began
    return f"training has not begun after {duration_text(waited)}" if waited > LATE else None


def _show_last_lines(record: JobRecord) -> None:
    for rank in range(record.nodes):
        lines = last_lines(Path(record.home, "log", f"node-{rank}.log"), 15)
        if lines:
            typer.echo(f"\nLast lines of node {rank}:")
            for line in lines:
                typer.echo(f"  {clean(line)}")
            return


def _handle(record: JobRecord) -> str:
    known: dict[str, Any] = {
        key: value for key, value in record.handle.items() if key not in ("began", "boot")
    }
    shown = ", ".join(f"{key} {value}" for key, value in known.items())
    return f" ({shown})" if shown else ""


def _shape(nodes: int, processes: int) -> str:
    return f"{count_text(nodes, 'node')} of {count_text(processes, 'process')}"
