"""`cloudtrain run`: which runs there are, how one is doing, how it is stopped, and what it left over."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.attempts import run_urls
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.cli.arguments import Json, RunUrl, examples, open_catalog
from hf_cloudtrain.cli.output import fail, of_total, print_json, say, show_facts, show_table
from hf_cloudtrain.errors import CloudTrainError, ManifestError
from hf_cloudtrain.runtime.text import clean as clean_text
from hf_cloudtrain.runtime.text import duration_text, size_text, time_text
from hf_cloudtrain.storage.backend import ObjectInfo
from hf_cloudtrain.storage.client import MAX_RECORD_READ, Storage
from hf_cloudtrain.tracking.status import number, run_state, state_of

if TYPE_CHECKING:
    from hf_cloudtrain.tracking.history import AttemptInfo, History

app = typer.Typer(
    help="Runs: which there are, how one is doing, how it is stopped, and what it left over.",
    epilog=examples("cloudtrain run status s3://bucket/runs/mrpc"),
    no_args_is_help=True,
)

RUNS_AT_ONCE = 16
"""Runs looked at at once: they wait for answers."""


@app.command("list", epilog=examples("cloudtrain run list s3://bucket/runs"))
def list_(
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL", show_default=False, help="A URL or folder with runs below it, at any depth."
        ),
    ],
    as_json: Json = False,
) -> None:
    """List the runs below a URL."""
    storage = Storage(url, env.storage_options(None))
    names = run_urls(storage)
    if not names:
        say(f"There is no run below {storage.url!r}.")
        if Catalog(storage).attempts.numbers():
            say(f"It is a run itself: `cloudtrain run status {storage.url}` shows it.")
    with ThreadPoolExecutor(RUNS_AT_ONCE) as pool:
        records = list(pool.map(lambda name: _run_record(_Below(storage, name), name), names))
    for record in records:
        if record["damaged"]:
            say(f"Warning: {record['damaged']}")
    if as_json:
        print_json({"url": storage.url, "runs": records})
    elif records:
        columns = ("run", "state", "attempts", "step", "checkpoints", "newest", "last seen")
        show_table(columns, map(_run_row, records), numbers=("attempts", "step", "checkpoints"))


@app.command(epilog=examples("cloudtrain run status s3://bucket/runs/mrpc"))
def status(run_url: RunUrl, as_json: Json = False) -> None:
    """Show how a run is doing. Its state, progress, rate and goodput, and all its attempts."""
    from hf_cloudtrain.tracking.history import history_of

    catalog = open_catalog(run_url)
    history = history_of(catalog)
    if not history.attempts:
        catalog.attempts.check_any()
        raise ManifestError(f"No record of an attempt of {catalog.storage.url!r} can be read.")
    record = {**_status_record(history), "stalled": run_state(catalog).stalled}
    if as_json:
        print_json(record)
        return
    _show_status(record)
    typer.echo()
    columns = ("attempt", "state", "started", "ran", "steps", "done again", "resumed from", "host")
    rows = map(_attempt_row, record["attempts"])
    show_table(columns, rows, numbers=("attempt", "done again"))


@app.command(
    epilog=examples(
        "cloudtrain run stop s3://bucket/runs/mrpc", "cloudtrain run stop s3://bucket/runs/mrpc --wait"
    )
)
def stop(
    run_url: RunUrl,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run until it has stopped.")] = False,
    as_json: Json = False,
) -> None:
    """Ask a run to save and stop. Its newest attempt does; one that a person starts later trains."""
    from hf_cloudtrain.cli import stop as cli_stop

    catalog = open_catalog(run_url)
    standing, trouble = cli_stop.ask(catalog), None
    if wait:
        standing, trouble = cli_stop.follow(catalog, standing)
    if as_json:
        print_json(standing.record())
    if trouble is not None:
        fail(trouble)


@app.command(epilog=examples("cloudtrain run watch s3://bucket/runs/mrpc"))
def watch(run_url: RunUrl, as_json: Json = False) -> None:
    """Watch a run until it is over. Its progress, rate, loss and uploads; Ctrl-C leaves the run alone."""
    from hf_cloudtrain.cli import watch as cli_watch

    now = cli_watch.watch(open_catalog(run_url), as_json=as_json, is_awaited=_Job(run_url).goes_on)
    if now.state in ("failed", "overtaken"):
        fail(f"Attempt {now.attempt} of {now.run_url!r} is {now.state!r}.")


class _Job:
    """The job of this store that writes to a run, if one does."""

    def __init__(self, run_url: str) -> None:
        self._url = run_url
        self._said = False

    def goes_on(self) -> bool:
        """Whether it may begin another attempt; says once that it is waited for."""
        from hf_cloudtrain.jobs import lifecycle
        from hf_cloudtrain.jobs.records import JobStore

        try:
            record = lifecycle.writer_of(self._url, JobStore())
        except (CloudTrainError, OSError):  # no store, no job: the run can be watched all the same
            return False
        if record is not None and not self._said:
            self._said = True
            say(f"The job {record.id} is {record.state}: its training is waited for. Ctrl-C leaves it alone.")
        return record is not None


@app.command(epilog=examples("cloudtrain run report s3://bucket/runs/mrpc -o report.html"))
def report(
    run_url: RunUrl,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the page.")
    ] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Write a page that shows a run. One HTML file with its curves, attempts, uploads, lost work and checkpoints."""
    from hf_cloudtrain.report.page import Report

    page = Report(open_catalog(run_url))
    size = page.write(output)
    if as_json:
        print_json({"run_url": page.history.run_url, "path": str(output.absolute()), "size": size})
    else:
        say(f"Wrote {size_text(size)}: open it with any browser.")
        typer.echo(clean_text(output))


@app.command(
    epilog=examples(
        "cloudtrain run clean s3://bucket/runs/mrpc --dry-run",
        "cloudtrain run clean s3://bucket/runs/mrpc --yes",
    )
)
def clean(
    run_url: RunUrl,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what is left over, and delete nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Delete what killed processes left on storage. Never a checkpoint, nor what somebody may still be uploading."""
    from hf_cloudtrain.cli import clean as cli_clean

    catalog = open_catalog(run_url)
    catalog.attempts.check_any()
    left_over = cli_clean.clean(catalog, dry_run=dry_run, yes=yes, quiet=as_json)
    if as_json:
        print_json({"run_url": catalog.storage.url, "dry_run": dry_run, "left_over": left_over})


class _Below(Storage):
    """One run of a storage that is open: a new connection for each of hundreds of runs would take minutes."""

    def __init__(self, parent: Storage, name: str) -> None:
        super().__init__(parent.url)
        self.url = f"{parent.url.rstrip('/')}/{name}"
        self._parent = parent
        self._name_below = name

    def read(self, path: str, max_bytes: int = MAX_RECORD_READ) -> bytes:
        return self._parent.read(f"{self._name_below}/{path}", max_bytes)

    def list(self, prefix: str) -> list[ObjectInfo]:
        skip = len(self._name_below) + 1
        found = self._parent.list(f"{self._name_below}/{prefix}")
        return [ObjectInfo(info.path[skip:], info.size) for info in found]


def _run_record(storage: Storage, name: str) -> dict[str, Any]:
    """What is known of one run without reading its steps: two listings and two small records."""
    record: dict[str, Any] = {"run_url": storage.url, "name": name, "damaged": None}
    try:
        return {**record, **run_facts(Catalog(storage))}
    except ManifestError as error:
        return {**record, **dict.fromkeys(_RUN_FACTS), "state": "damaged", "damaged": str(error)}


_RUN_FACTS = ("state", "attempts", "step", "total_steps", "checkpoints", "newest", "created", "last_seen")


def run_facts(catalog: Catalog) -> dict[str, Any]:
    """What is known of a run without reading its steps."""
    now = run_state(catalog)
    values = (
        now.state,
        now.attempts,
        now.step,
        now.total_steps,
        now.checkpoints,
        now.last_committed,
        number((catalog.attempts.run_facts() or {}).get("created")),
        now.last_seen,
    )
    return dict(zip(_RUN_FACTS, values, strict=True))


def _run_row(record: dict[str, Any]) -> tuple[object, ...]:
    return (
        record["name"],
        record["state"],
        record["attempts"],
        of_total(record["step"], record["total_steps"]),
        record["checkpoints"],
        record["newest"],
        time_text(record["last_seen"]),
    )


def _status_record(history: History) -> dict[str, Any]:
    attempts = _attempt_records(history.attempts)
    newest, progress = history.attempts[-1], history.attempts[-1].progress
    committed = max((key for info in history.attempts for key in info.checkpoints), default=None)
    state = attempts[-1]["state"]
    total_steps = number(progress.get("total_steps"))
    rates = ("step_seconds", "samples_per_second", "tokens_per_second", "loss", "learning_rate")
    return {
        "run_url": history.run_url,
        "state": state,
        "attempt": newest.number,
        "step": newest.last_step,
        "total_steps": None if total_steps is None else int(total_steps),
        **{name: number(progress.get(name)) for name in rates},
        "eta_seconds": number(progress.get("eta_seconds")) if state == "training" else None,
        "goodput": history.goodput,
        "last_committed": None if committed is None else str(committed),
        "checkpoints": sum(len(info.checkpoints) for info in history.attempts),
        "last_seen": newest.last_seen,
        "heartbeat_age_seconds": max(0.0, time.time() - newest.last_seen),
        "kept_steps": sum(info.kept_steps for info in history.attempts),
        "superseded_steps": sum(info.redone_steps for info in history.attempts),
        "superseded_seconds": sum(info.redone_seconds for info in history.attempts),
        "attempts": attempts,
    }


def _attempt_records(attempts: list[AttemptInfo]) -> list[dict[str, Any]]:
    return [
        {
            "number": info.number,
            "state": state_of(info.state, info.last_seen, newest=info is attempts[-1]),
            "started": info.started,
            "last_seen": info.last_seen,
            "first_step": info.first_step,
            "last_step": info.last_step,
            "resumed_from": None if info.resumed_from is None else str(info.resumed_from),
            "checkpoints": [str(key) for key in info.checkpoints],
            "kept_steps": info.kept_steps,
            "superseded_steps": info.redone_steps,
            "facts": info.facts,
        }
        for info in attempts
    ]


def _show_status(record: dict[str, Any]) -> None:
    age = duration_text(record["heartbeat_age_seconds"])
    seen = f"{time_text(record['last_seen'])} ({age} ago)" if record["last_seen"] else None
    redone = record["superseded_steps"]
    spent = duration_text(record["superseded_seconds"])
    show_facts(
        {
            "run": record["run_url"],
            "state": record["state"],
            "stalled": record["stalled"],
            "step": of_total(record["step"], record["total_steps"], percent=True),
            "rate": _rate(record),
            "eta": duration_text(record["eta_seconds"]),
            "loss": None if record["loss"] is None else f"{record['loss']:.6g}",
            "goodput": None if record["goodput"] is None else f"{record['goodput']:.1%}",
            "last committed": record["last_committed"] or "nothing yet",
            "checkpoints": record["checkpoints"],
            "last heartbeat": seen,
            "done again": f"{redone} steps, {spent}" if redone else "0 steps",
        }
    )


def _attempt_row(record: dict[str, Any]) -> tuple[object, ...]:
    return (
        record["number"],
        record["state"],
        time_text(record["started"]),
        duration_text(record["last_seen"] - record["started"]),
        f"{record['first_step']} to {record['last_step']}",
        record["superseded_steps"],
        record["resumed_from"],
        record["facts"].get("host"),
    )


def _rate(record: dict[str, Any]) -> str | None:
    parts = [
        duration_text(record["step_seconds"]) and f"{duration_text(record['step_seconds'])} a step",
        record["samples_per_second"] and f"{record['samples_per_second']:.4g} samples/s",
        record["tokens_per_second"] and f"{record['tokens_per_second']:.4g} tokens/s",
    ]
    return ", ".join(part for part in parts if part) or None
