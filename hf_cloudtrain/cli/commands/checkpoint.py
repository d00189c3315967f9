"""`cloudtrain checkpoint`: list, inspect, download, verify, pin and delete checkpoints, and finish their uploads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_cloudtrain.checkpoints import retention
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.deletion import retire
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest, folder_name
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.cli.arguments import (
    Best,
    CheckpointName,
    CheckpointOrNewest,
    DryRun,
    Json,
    RunAndDir,
    RunArgument,
    Yes,
    check_choice,
    chosen,
    examples,
    find,
    newest,
    run_and_dir,
)
from hf_cloudtrain.cli.output import (
    confirm,
    fail,
    print_json,
    say,
    show_table,
    transfer,
)
from hf_cloudtrain.cli.panels import facts_of, show_panels, tree_of
from hf_cloudtrain.cli.runs import open_run
from hf_cloudtrain.cli.tables import Columns
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.report.summary import CheckpointInfo, Roles, files_text, read_infos
from hf_cloudtrain.runtime.text import clean, count_text, size_text, time_text

if TYPE_CHECKING:
    from hf_cloudtrain.runtime.progress import Progress

app = typer.Typer(
    help="List, inspect, download, verify, pin and delete checkpoints.",
    epilog=examples("checkpoint list RUN"),
    no_args_is_help=True,
)


def _size(record: dict[str, Any]) -> str | None:
    return None if record["size"] is None else size_text(record["size"])


LISTED: Columns = {
    "checkpoint": lambda record: record["title"],
    ">step": lambda record: record["step"],
    ">attempt": lambda record: record["attempt"],
    ">files": lambda record: record["file_count"],
    ">size": _size,
    "saved": lambda record: time_text(record["created"]),
    "notes": lambda record: record["notes"],
}
SPARE = ("attempt", "files", "step", "saved", "size")
VERIFIED: Columns = {
    "checkpoint": lambda record: record["title"],
    ">files": lambda record: record["file_count"],
    ">size": _size,
    "verdict": lambda record: "intact" if record["whole"] else "damaged",
}


@app.command("list", epilog=examples("checkpoint list RUN"))
def list_(run: RunArgument, as_json: Json = False) -> None:
    """List the checkpoints of a run.

    The newest comes last, followed by folders saved by name.
    """
    catalog = open_run(run)
    roles = Roles.of(catalog)
    names = NamedFolders(catalog).keys()
    if not roles.keys and not names:
        catalog.attempts.check_any()
        say(f"The run {catalog.storage.url!r} has no checkpoint yet.")
    found = read_infos(catalog, [*roles.keys, *names])
    for info in found:
        if info.damaged:
            say(f"Warning: {info.damaged}")
    if as_json:
        records = {
            "checkpoints": [info.full_record(roles) for info in found if info.checkpoint_key],
            "folders": [info.full_record(roles) for info in found if not info.checkpoint_key],
        }
        print_json({"run_url": catalog.storage.url, **records})
    elif found:
        rows = [
            {**info.full_record(roles), "title": info.title, "notes": _notes(info, roles)} for info in found
        ]
        show_table(LISTED, rows, spare=SPARE, prose="notes")


@app.command(epilog=examples("checkpoint view RUN", "checkpoint view RUN --checkpoint 500"))
def view(run: RunArgument, checkpoint: CheckpointOrNewest = None, as_json: Json = False) -> None:
    """Show the files, position and metadata of a checkpoint."""
    catalog = open_run(run)
    manifest = find(catalog, checkpoint)
    info = CheckpointInfo(manifest.key, manifest)
    roles = Roles.of(catalog)
    if as_json:
        record = {"run_url": catalog.storage.url, **info.full_record(roles)}
        record["position"] = dataclasses.asdict(manifest.position)
        record["origin"] = manifest.origin
        record["files"] = [dataclasses.asdict(entry) for entry in manifest.files]
        print_json(record)
        return
    overview = facts_of(
        {
            "run": catalog.storage.url,
            "folder": manifest.folder,
            "key": manifest.key,
            "attempt": manifest.attempt,
            "step": manifest.step,
            "files": files_text(manifest),
            "saved": time_text(manifest.created),
            "exact": str(manifest.exactness),
            "role": ", ".join(info.roles_in(roles)) or None,
        }
    )
    objects = {name: found for name, text in manifest.origin.items() if (found := _object(text))}
    sections = {
        "Position": dataclasses.asdict(manifest.position),
        "Metrics": {name: f"{value:.6g}" for name, value in manifest.metrics.items()},
        "Origin": {name: text for name, text in manifest.origin.items() if name not in objects},
        **{name.capitalize(): values for name, values in objects.items()},
    }
    show_panels(
        ("Overview", overview),
        ("Files", tree_of(manifest.folder, ((entry.path, entry.size) for entry in manifest.files))),
        *((title, facts_of(facts)) for title, facts in sections.items() if set(facts.values()) - {None}),
    )


@app.command(
    epilog=examples(
        "checkpoint download RUN out",
        "checkpoint download RUN out --best",
        "checkpoint download RUN out --checkpoint final",
    )
)
def download(
    arguments: RunAndDir,
    checkpoint: CheckpointOrNewest = None,
    best: Best = False,
    as_json: Json = False,
) -> None:
    """Download a checkpoint and verify it.

    Prints its folder: DIR/checkpoint-STEP, or DIR/NAME for a folder saved by name. The folder appears once all of its
    bytes are verified. An intact copy that is already there is not downloaded again.
    """
    from hf_cloudtrain.cli.download import bring

    check_choice(checkpoint, best)
    run, directory = run_and_dir(arguments)
    catalog = open_run(run)
    manifest = chosen(catalog, checkpoint, best)
    target = directory / _local_name(manifest)
    title = f"{manifest.folder} ({files_text(manifest)})"
    downloaded = bring(catalog, manifest, target, title)
    if as_json:
        record = CheckpointInfo(manifest.key, manifest).record()
        facts = {"path": str(target.absolute()), "downloaded": downloaded}
        print_json({"run_url": catalog.storage.url, **record, **facts})
    else:
        typer.echo(clean(target))


@app.command(epilog=examples("checkpoint verify RUN", "checkpoint verify RUN --all"))
def verify(
    run: RunArgument,
    checkpoint: CheckpointOrNewest = None,
    every: Annotated[bool, typer.Option("--all", help="All checkpoints and folders saved by name.")] = False,
    as_json: Json = False,
) -> None:
    """Compare every byte on storage with the manifest. Exit with code 1 if any differs."""
    if every and checkpoint is not None:
        raise typer.BadParameter("Pass either --all or --checkpoint, not both.")
    catalog = open_run(run)
    with transfer() as progress:
        found = [(info, _verdict(catalog, info, progress)) for info in _to_verify(catalog, checkpoint, every)]
    if as_json:
        print_json({"run_url": catalog.storage.url, "checkpoints": [record for _, record in found]})
    else:
        rows = [{**record, "title": info.title} for info, record in found]
        show_table(VERIFIED, rows, spare=["files", "size"])
    damaged = [(info.title, record["problems"]) for info, record in found if not record["whole"]]
    for title, problems in damaged:
        for problem in problems:
            say(f"{title}: {problem}")
    if damaged:
        names = ", ".join(title for title, _ in damaged)
        fail(f"Damaged: {names}. A restore skips damaged checkpoints and takes the newest intact one.")


@app.command(
    epilog=examples("checkpoint delete RUN --checkpoint 500", "checkpoint delete RUN --checkpoint 500 --yes")
)
def delete(
    run: RunArgument,
    checkpoint: CheckpointName,
    force: Annotated[
        bool,
        typer.Option("--force", help="Delete it even if it is the newest, best, pinned or resumed from."),
    ] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Delete a checkpoint. Without --force, refuse if the run needs it."""
    catalog = open_run(run)
    manifest = find(catalog, checkpoint)
    info, key = _checkpoint(manifest, "deleted with this command")
    losses = Roles.of(catalog).losses(key)
    what = f"{manifest.folder} ({files_text(manifest)})"
    if losses and not force:
        fail(f"{what} is protected. {' '.join(losses)} Pass --force to delete it anyway.")
    if losses:
        say(f"Warning: {' '.join(losses)}")
    confirm(f"Delete {what} from {catalog.storage.url!r}?", yes)
    retire(catalog, key)
    say(f"Deleted {what}.")
    if as_json:
        print_json({"run_url": catalog.storage.url, **info.record(), "losses": losses})


@app.command(
    epilog=examples("checkpoint pin RUN --checkpoint 500", "checkpoint pin RUN --checkpoint 500 --unpin")
)
def pin(
    run: RunArgument,
    checkpoint: CheckpointOrNewest = None,
    unpin: Annotated[bool, typer.Option("--unpin", help="Remove the pin instead.")] = False,
    as_json: Json = False,
) -> None:
    """Pin a checkpoint. Only `delete --force` deletes a pinned one."""
    catalog = open_run(run)
    info, key = _checkpoint(find(catalog, checkpoint), "pinned")
    (retention.unpin if unpin else retention.pin)(catalog, key)
    say(f"{info.title} is {'no longer' if unpin else 'now'} pinned.")
    if as_json:
        print_json({"run_url": catalog.storage.url, **info.record(), "pinned": not unpin})


@app.command(
    epilog=examples(
        "checkpoint prune RUN --keep-last 3 --dry-run",
        "checkpoint prune RUN --keep-last 3 --keep-every 10000 --yes",
    )
)
def prune(
    run: RunArgument,
    keep_last: Annotated[
        int, typer.Option("--keep-last", min=1, metavar="N", help="Keep the N newest checkpoints.")
    ],
    keep_every: Annotated[
        int | None,
        typer.Option(
            "--keep-every", min=1, metavar="STEPS", help="Also keep steps that are a multiple of STEPS."
        ),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Delete all but the newest checkpoints.

    The best, the pinned, and the one that the newest attempt resumed from are kept as well.
    """
    from hf_cloudtrain.cli.prune import Plan

    catalog = open_run(run)
    catalog.attempts.check_any()
    plan = Plan(catalog, retention.Policy(keep_last, keep_every))
    if not as_json:
        plan.show()
    if plan.going and not dry_run:
        confirm(f"Delete {count_text(len(plan.going), 'checkpoint')} from {catalog.storage.url!r}?", yes)
    plan.tell(dry_run=dry_run)
    gone = [] if dry_run else plan.delete()
    if as_json:
        print_json({"run_url": catalog.storage.url, "dry_run": dry_run, **plan.record(gone)})
    if not dry_run and len(gone) < len(plan.going):
        fail(f"Only {len(gone)} of {len(plan.going)} checkpoints were deleted.")


@app.command(epilog=examples("checkpoint flush out"))
def flush(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="output_dir of the training.")],
    as_json: Json = False,
) -> None:
    """Finish uploads that a training left on this machine. Each goes to the run that saved it."""
    from hf_cloudtrain.cli import flush as actions

    if not directory.is_dir():
        raise ConfigurationError(f"{str(directory)!r} is not a folder. Pass the output_dir of the training.")
    report = actions.flush(directory)
    if as_json:
        print_json({"directory": str(directory.absolute()), **report.record()})
    else:
        report.show()
    report.tell(directory)


def _object(text: str) -> dict[str, Any] | None:
    """A JSON object, such as the arguments of the training; None for any other text."""
    try:
        found = json.loads(text) if text.startswith("{") else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _checkpoint(manifest: Manifest, verb: str) -> tuple[CheckpointInfo, CheckpointKey]:
    """A checkpoint and its key; ConfigurationError for a folder saved by name."""
    info = CheckpointInfo(manifest.key, manifest)
    if info.checkpoint_key is None:
        raise ConfigurationError(
            f"{manifest.folder!r} is a folder saved by name. Only checkpoints can be {verb}."
        )
    return info, info.checkpoint_key


def _notes(info: CheckpointInfo, roles: Roles) -> str:
    notes = info.roles_in(roles)
    if info.manifest is None:
        notes.append("damaged manifest")
    elif not info.manifest.exact:
        notes.append(info.manifest.exactness.word)
    return ", ".join(notes)


def _local_name(manifest: Manifest) -> str:
    """The plain name, from which frameworks read the step; a folder saved by name loses its version."""
    if CheckpointKey.named(manifest.key):
        return f"checkpoint-{manifest.step}"
    return folder_name(manifest.key.rpartition("-")[0])


def _to_verify(catalog: Catalog, checkpoint: str | None, every: bool) -> Iterator[CheckpointInfo]:
    if checkpoint is not None:
        manifest = find(catalog, checkpoint)
        yield CheckpointInfo(manifest.key, manifest)
        return
    keys: list[CheckpointKey | str] = [*catalog.checkpoints(), *NamedFolders(catalog).keys()] if every else []
    for key in keys or [newest(catalog)]:
        # Read when its turn comes: a training may delete it while those before it are verified.
        yield from read_infos(catalog, [key])


def _verdict(catalog: Catalog, info: CheckpointInfo, progress: Progress) -> dict[str, Any]:
    from hf_cloudtrain.checkpoints import download as checkpoints_download

    if info.manifest is None:
        problems = [str(info.damaged)]
    else:
        progress.begin(f"Verifying {info.title}", info.manifest.size)
        problems = checkpoints_download.verify(catalog, info.manifest, on_bytes=progress.add)
    return {**info.record(), "whole": not problems, "problems": problems}
