"""`cloudtrain run`: list, inspect, watch, stop and clean up runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.run_deletion import DELETED
from hf_cloudtrain.checkpoints.titles import Titles
from hf_cloudtrain.cli import completion
from hf_cloudtrain.cli.arguments import DryRun, Force, Json, RunArgument, Yes, examples, page_file
from hf_cloudtrain.cli.output import fail, of_total, print_json, say, show_facts, show_table
from hf_cloudtrain.cli.runs import job_of, open_run, runs_url
from hf_cloudtrain.cli.tables import Columns
from hf_cloudtrain.errors import ManifestError, NoCheckpointError
from hf_cloudtrain.runtime.text import clean as clean_text
from hf_cloudtrain.runtime.text import size_text, time_text
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.runtime.values import number
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.tracking.mirror import Mirror, mirrors_below
from hf_cloudtrain.tracking.status import RunState, run_state

app = typer.Typer(
    help="List, inspect, watch, stop and clean up runs.",
    epilog=examples("run status RUN"),
    no_args_is_help=True,
)

RUNS_AT_ONCE = 16
"""Runs read at the same time: reading them takes round trips, not bandwidth."""

LISTED: Columns = {
    "run": lambda record: record["name"],
    "experiment": lambda record: record["experiment"],
    "state": lambda record: record["state"],
    ">attempts": lambda record: record["attempts"],
    ">step": lambda record: of_total(record["step"], record["total_steps"]),
    ">checkpoints": lambda record: record["checkpoints"],
    "newest": lambda record: record["newest_folder"],
    ">size": lambda record: size_text(record["size"]),
    "last seen": lambda record: time_text(record["last_seen"]),
}
SPARE = ("attempts", "checkpoints", "last seen", "size", "newest", "step")


@app.command("list", epilog=examples("run list", "run list s3://bucket/runs"))
def list_(
    url: Annotated[
        str | None,
        typer.Argument(
            metavar="[URL]",
            help="URL or folder with runs below it, at any depth. Default: the runs of the store.",
        ),
    ] = None,
    experiment: Annotated[
        str | None, typer.Option("--experiment", metavar="NAME", help="Only runs of this experiment.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the runs of the store, or below a URL. Runs of one experiment are together."""
    storage = Storage(url or runs_url(), env.storage_options(None))
    found = {name: run for name, run in mirrors_below(storage).items() if name}
    if not found:
        say(f"No runs below {storage.url!r}.")
        if Catalog(storage).attempts.numbers():
            say(f"It is a run itself. Show it with `cloudtrain run status {storage.url}`.")
        elif url is None:
            say(f"List those elsewhere with `cloudtrain run list URL`. The store is set by {env.STORE}.")
    (records,) = in_threads(lambda name: _run_record(*found[name], name), (list(found), RUNS_AT_ONCE))
    for record in records:
        if record["damaged"]:
            say(f"Warning: {record['damaged']}")
    if experiment is not None:
        records = [record for record in records if record["experiment"] == experiment]
        if not records:
            say(f"No runs of the experiment {experiment!r} below {storage.url!r}.")
    records.sort(key=lambda record: record["experiment"] or "")
    if as_json:
        print_json({"url": storage.url, "runs": records})
    elif records:
        show_table(_with_groups(LISTED, records), records, spare=SPARE)


@app.command(epilog=examples("run status RUN"))
def status(run: RunArgument, as_json: Json = False) -> None:
    """Show the state, progress and attempts of a run."""
    from hf_cloudtrain.cli import status as shown
    from hf_cloudtrain.tracking.history import history_of

    catalog = open_run(run)
    history = history_of(catalog)
    if not history.attempts:
        catalog.attempts.check_any()
        raise ManifestError(f"No attempt record of {catalog.storage.url!r} can be read.")
    if deleted := history.attempts[-1].facts.get(DELETED):
        raise NoCheckpointError(f"The run {catalog.storage.url!r} was deleted ({deleted}).")
    record = shown.status_record(history, run_state(catalog).stalled, catalog)
    if as_json:
        print_json(record)
        return
    record = shown.with_titles(record, Titles(catalog))
    show_facts(shown.facts(record))
    typer.echo()
    show_table(shown.ATTEMPTS, record["attempts"], spare=shown.SPARE)


@app.command(epilog=examples("run stop RUN", "run stop RUN --wait"))
def stop(
    run: RunArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Block until the run has stopped.")] = False,
    as_json: Json = False,
) -> None:
    """Ask a run to save a checkpoint and stop.

    The newest attempt stops. An attempt that is started later trains as usual.
    """
    from hf_cloudtrain.cli import stop as actions

    now, trouble = actions.stop(open_run(run), wait=wait)
    if as_json:
        print_json(now.record())
    if trouble is not None:
        fail(trouble)


@app.command(epilog=examples("run watch RUN"))
def watch(run: RunArgument, as_json: Json = False) -> None:
    """Watch a run until it is over.

    Shows its progress, rate, loss and uploads. Ctrl-C ends the watching, not the run.
    """
    from hf_cloudtrain.cli import watch as actions

    catalog = open_run(run)
    now = actions.watch(catalog, as_json=as_json, awaited=lambda: _awaited(catalog.storage.url))
    if now.state in ("failed", "overtaken"):
        what = "failed" if now.state == "failed" else "was overtaken by a newer attempt"
        fail(f"Attempt {now.attempt} of {now.run_url!r} {what}.")


def _awaited(run_url: str) -> str | None:
    job = job_of(run_url)
    return None if job is None else f"Job {job.id} is {job.state}"


@app.command(epilog=examples("run report RUN -o report.html"))
def report(
    run: RunArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.", callback=page_file)
    ] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Write an HTML page about a run.

    It shows curves, attempts, uploads, lost work and checkpoints.
    """
    from hf_cloudtrain.report.page import PAGE_NEEDS, Report, check_extra_installed

    check_extra_installed("The report", *PAGE_NEEDS)
    page = Report(open_run(run))
    size = page.write(output)
    if as_json:
        print_json({"run_url": page.history.run_url, "path": str(output.absolute()), "size": size})
    else:
        say(f"Wrote {size_text(size)}. Open the file in a browser.")
        typer.echo(clean_text(output))


@app.command(epilog=examples("run compare glue-1 glue-2", "run compare RUN glue-2 -o compare.html"))
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN RUN …",
            help="Names of runs in the store, or URLs or folders of any runs.",
            autocompletion=completion.runs,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write an HTML page with all curves.", callback=page_file
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare runs: curves, last values, different arguments."""
    from hf_cloudtrain.cli import compare as actions

    actions.compare(runs, output=output, as_json=as_json)


@app.command(epilog=examples("run clean RUN --dry-run", "run clean RUN --yes"))
def clean(run: RunArgument, dry_run: DryRun = False, yes: Yes = False, as_json: Json = False) -> None:
    """Delete what killed processes left on storage.

    Checkpoints, and uploads that may still be running, are kept.
    """
    from hf_cloudtrain.cli import clean as actions

    catalog = open_run(run)
    catalog.attempts.check_any()
    left_over = actions.clean(catalog, dry_run=dry_run, yes=yes, quiet=as_json)
    if as_json:
        print_json({"run_url": catalog.storage.url, "dry_run": dry_run, "left_over": left_over})


@app.command(epilog=examples("run delete RUN --force", "run delete glue-2 --force --yes"))
def delete(run: RunArgument, force: Force = False, yes: Yes = False, as_json: Json = False) -> None:
    """Delete a run with its checkpoints. Refused while it trains.

    Without --force, refuse if it has any checkpoint, and say what would be lost.
    """
    from hf_cloudtrain.cli import delete as actions

    record = actions.delete(open_run(run), force=force, yes=yes)
    if as_json:
        print_json(record)


def _with_groups(columns: Columns, records: list[dict[str, Any]]) -> Columns:
    """The columns, without that of the experiments if no run has one."""
    if any(record["experiment"] for record in records):
        return columns
    return {name: cell for name, cell in columns.items() if name != "experiment"}


def _run_record(storage: Mirror, size: int, name: str) -> dict[str, Any]:
    """What the listing and three small records tell about a run; the records of its steps are not read."""
    catalog = Catalog(storage)
    damaged = None
    now, facts = RunState(storage.url, "damaged"), {}
    try:
        now, facts = run_state(catalog), catalog.attempts.run_facts() or {}
    except ManifestError as error:
        damaged = str(error)
    return {
        "run_url": storage.url,
        "name": name,
        "experiment": str(facts["experiment"])[:80] if facts.get("experiment") else None,
        "damaged": damaged,
        "state": now.state,
        "attempts": now.attempts if damaged is None else None,
        "step": now.step,
        "total_steps": now.total_steps,
        "checkpoints": now.checkpoints if damaged is None else None,
        "newest": now.last_committed,
        "newest_folder": None if now.last_committed is None else Titles(catalog).of(now.last_committed),
        "size": size,
        "created": number(facts.get("created")),
        "last_seen": now.last_seen,
    }
