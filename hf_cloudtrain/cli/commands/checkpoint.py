"""`cloudtrain checkpoint`: what is on storage, and how to get it, check it, delete it and finish its upload."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_cloudtrain.checkpoints import retention
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.deletion import retire
from hf_cloudtrain.checkpoints.manifest import Manifest, folder_name, parse_checkpoint_key
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.checkpoints.retention import Policy
from hf_cloudtrain.cli.arguments import (
    BY_NAME,
    WHICH,
    Json,
    RunUrl,
    RunUrlAndDir,
    Which,
    examples,
    find,
    newest,
    open_catalog,
    run_url_and_dir,
)
from hf_cloudtrain.cli.output import (
    confirm,
    fail,
    print_json,
    say,
    show_facts,
    show_table,
    show_tree,
    transfer,
)
from hf_cloudtrain.errors import ConfigurationError, NoCheckpointError
from hf_cloudtrain.report.summary import Found, Standing, files_text, look_at
from hf_cloudtrain.runtime.text import clean, size_text, time_text

if TYPE_CHECKING:
    from hf_cloudtrain.checkpoints.manifest import CheckpointKey
    from hf_cloudtrain.runtime.progress import Progress

app = typer.Typer(
    help="Checkpoints of a run: what is on storage, and what to do with it.",
    epilog=examples("cloudtrain checkpoint list s3://bucket/runs/mrpc"),
    no_args_is_help=True,
)

READS_AT_ONCE = 16
"""Manifests read at once: they wait for answers, not for bandwidth."""


@app.command("list", epilog=examples("cloudtrain checkpoint list s3://bucket/runs/mrpc"))
def list_(run_url: RunUrl, as_json: Json = False) -> None:
    """List the checkpoints of a run. The newest is the last; folders saved by name come after them."""
    catalog = open_catalog(run_url)
    standing = Standing.of(catalog)
    names = NamedFolders(catalog).keys()
    if not standing.keys and not names:
        catalog.attempts.check_any()
        say(f"The run {catalog.storage.url!r} has no checkpoint yet.")
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        found = [
            item for item in pool.map(lambda key: look_at(catalog, key), [*standing.keys, *names]) if item
        ]
    for item in found:
        if item.damaged:
            say(f"Warning: {item.damaged}")
    if as_json:
        records = {
            "checkpoints": [item.full_record(standing) for item in found if item.checkpoint_key],
            "folders": [item.full_record(standing) for item in found if not item.checkpoint_key],
        }
        print_json({"run_url": catalog.storage.url, **records})
    elif found:
        columns = ("checkpoint", "step", "attempt", "files", "size", "saved", "notes")
        rows = (item.row(standing) for item in found)
        show_table(columns, rows, numbers=("step", "attempt", "files", "size"))


@app.command(
    epilog=examples(
        "cloudtrain checkpoint view s3://bucket/runs/mrpc",
        "cloudtrain checkpoint view s3://bucket/runs/mrpc --checkpoint 500",
    )
)
def view(run_url: RunUrl, checkpoint: Which = None, as_json: Json = False) -> None:
    """Show one checkpoint. An overview, its files, its position in the data, its metadata."""
    catalog = open_catalog(run_url)
    manifest = find(catalog, checkpoint)
    found = Found(manifest.key, manifest)
    standing = Standing.of(catalog)
    if as_json:
        record = {"run_url": catalog.storage.url, **found.full_record(standing)}
        record["position"] = dataclasses.asdict(manifest.position)
        record["origin"] = manifest.origin
        record["files"] = [dataclasses.asdict(entry) for entry in manifest.files]
        print_json(record)
        return
    show_facts(
        {
            "run": catalog.storage.url,
            "folder": manifest.folder,
            "key": manifest.key,
            "attempt": manifest.attempt,
            "step": manifest.step,
            "files": files_text(manifest),
            "saved": time_text(manifest.created),
            "exact": "yes" if manifest.exact else f"no: {manifest.inexact_reason or 'no reason is recorded'}",
            "role": ", ".join(found.role(standing)) or None,
        }
    )
    typer.echo()
    show_tree(manifest.folder, ((entry.path, entry.size) for entry in manifest.files))
    _show_section("position", dataclasses.asdict(manifest.position))
    _show_section("metrics", {name: f"{value:.6g}" for name, value in manifest.metrics.items()})
    _show_section("origin", dict(manifest.origin))


@app.command(
    epilog=examples(
        "cloudtrain checkpoint download s3://bucket/runs/mrpc out",
        "cloudtrain checkpoint download s3://bucket/runs/mrpc out --best",
        "cloudtrain checkpoint download s3://bucket/runs/mrpc out --checkpoint final",
    )
)
def download(
    arguments: RunUrlAndDir,
    checkpoint: Which = None,
    best: Annotated[bool, typer.Option("--best", help="The best one instead of the newest.")] = False,
    as_json: Json = False,
) -> None:
    """Download one checkpoint. Prints where it is: DIR/checkpoint-STEP, or DIR/NAME for a folder saved by name.

    The folder appears when it is complete and every byte is verified. One that is there already, with the same files,
    is not downloaded again.
    """
    from hf_cloudtrain.cli.download import bring

    if best and checkpoint is not None:
        raise typer.BadParameter("--best and --checkpoint both say which one; give one of them.")
    run_url, directory = run_url_and_dir(arguments)
    catalog = open_catalog(run_url)
    manifest = _best(catalog) if best else find(catalog, checkpoint)
    target = directory / _local_name(manifest)
    needed = bring(catalog, manifest, target)
    what = f"{manifest.folder} (attempt {manifest.attempt}, {files_text(manifest)})"
    say(f"Downloaded and verified {what}." if needed else f"{what} was here already, and is whole.")
    if as_json:
        record = Found(manifest.key, manifest).record()
        print_json(
            {"run_url": catalog.storage.url, **record, "path": str(target.absolute()), "downloaded": needed}
        )
    else:
        typer.echo(clean(target))


@app.command(
    epilog=examples(
        "cloudtrain checkpoint verify s3://bucket/runs/mrpc",
        "cloudtrain checkpoint verify s3://bucket/runs/mrpc --all",
    )
)
def verify(
    run_url: RunUrl,
    checkpoint: Which = None,
    every: Annotated[
        bool, typer.Option("--all", help="All checkpoints, and all folders saved by name.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare every byte on storage with the manifest. The exit code is 1 where one differs."""
    if every and checkpoint is not None:
        raise typer.BadParameter("--all and --checkpoint both say which one; give one of them.")
    catalog = open_catalog(run_url)
    with transfer() as progress:
        records = [_verdict(catalog, found, progress) for found in _to_verify(catalog, checkpoint, every)]
    if as_json:
        print_json({"run_url": catalog.storage.url, "checkpoints": records})
    else:
        show_table(
            ("checkpoint", "files", "size", "verdict"), map(_verdict_row, records), numbers=("files", "size")
        )
    damaged = [record for record in records if not record["whole"]]
    for record in damaged:
        for problem in record["problems"]:
            say(f"{record['folder'] or record['key']}: {problem}")
    if damaged:
        names = ", ".join(record["folder"] or record["key"] for record in damaged)
        fail(f"Damaged: {names}. A restore passes over it, and takes the newest one that is whole.")


@app.command(
    epilog=examples(
        "cloudtrain checkpoint delete s3://bucket/runs/mrpc --checkpoint 500",
        "cloudtrain checkpoint delete s3://bucket/runs/mrpc --checkpoint 500 --yes",
    )
)
def delete(
    run_url: RunUrl,
    checkpoint: Annotated[str, typer.Option(*BY_NAME, metavar="WHICH", show_default=False, help=f"{WHICH}.")],
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Also the newest, the best, a pinned one, or the one that was resumed from."
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Delete one checkpoint from storage. Refuses, without --force, where the run would miss it."""
    catalog = open_catalog(run_url)
    manifest = find(catalog, checkpoint)
    found = _of_a_checkpoint(manifest, "is deleted by this command")
    key = found.checkpoint_key
    assert key is not None
    losses = Standing.of(catalog).losses(key)
    what = f"{manifest.folder} (attempt {key.attempt}, step {key.step}, {files_text(manifest)})"
    if losses and not force:
        fail(f"{what} is protected. {' '.join(losses)} Pass --force to delete it nevertheless.")
    if losses:
        say(f"Warning: {' '.join(losses)}")
    confirm(f"Delete {what} from {catalog.storage.url!r}?", yes)
    retire(catalog, key)
    say(f"Deleted {what}.")
    if as_json:
        print_json({"run_url": catalog.storage.url, **found.record(), "losses": losses})


@app.command(
    epilog=examples(
        "cloudtrain checkpoint pin s3://bucket/runs/mrpc --checkpoint 500",
        "cloudtrain checkpoint pin s3://bucket/runs/mrpc --checkpoint 500 --unpin",
    )
)
def pin(
    run_url: RunUrl,
    checkpoint: Which = None,
    unpin: Annotated[bool, typer.Option("--unpin", help="Take the pin away instead.")] = False,
    as_json: Json = False,
) -> None:
    """Keep one checkpoint. No limit, no `prune` and no `delete` without --force removes a pinned one."""
    catalog = open_catalog(run_url)
    found = _of_a_checkpoint(find(catalog, checkpoint), "is pinned")
    key = found.checkpoint_key
    assert key is not None
    (retention.unpin if unpin else retention.pin)(catalog, key)
    say(f"{found.title} (attempt {key.attempt}) is {'not pinned any more' if unpin else 'pinned'}.")
    if as_json:
        print_json({"run_url": catalog.storage.url, **found.record(), "pinned": not unpin})


@app.command(
    epilog=examples(
        "cloudtrain checkpoint prune s3://bucket/runs/mrpc --keep-last 3 --dry-run",
        "cloudtrain checkpoint prune s3://bucket/runs/mrpc --keep-last 3 --keep-every 10000 --yes",
    )
)
def prune(
    run_url: RunUrl,
    keep_last: Annotated[
        int, typer.Option("--keep-last", min=1, metavar="N", show_default=False, help="How many stay.")
    ],
    keep_every: Annotated[
        int | None,
        typer.Option(
            "--keep-every", min=1, metavar="STEPS", show_default=False, help="Multiples of this stay too."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would go, and delete nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Delete old checkpoints from storage, all but the newest few. Those that the run needs stay anyway."""
    from hf_cloudtrain.cli import prune as cli_prune

    catalog = open_catalog(run_url)
    catalog.attempts.check_any()
    plan = cli_prune.plan(catalog, Policy(keep_last, keep_every))
    if not as_json:
        plan.show()
    if plan.going and not dry_run:
        what = f"{len(plan.going)} checkpoint{'' if len(plan.going) == 1 else 's'}"
        confirm(f"Delete {what} from {catalog.storage.url!r}?", yes)
    plan.tell(dry_run=dry_run)
    gone = [] if dry_run else plan.carry_out()
    if as_json:
        print_json({"run_url": catalog.storage.url, "dry_run": dry_run, **plan.record(gone)})
    if not dry_run and len(gone) < len(plan.going):
        fail(f"Only {len(gone)} of {len(plan.going)} checkpoints were deleted.")


@app.command(epilog=examples("cloudtrain checkpoint flush out"))
def flush(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The output_dir of the training.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Finish uploads that a training on this machine left behind. Each goes to the run that it belongs to."""
    from hf_cloudtrain.cli import flush as cli_flush

    if not directory.is_dir():
        raise ConfigurationError(f"{str(directory)!r} is no folder. Name the output_dir of the training.")
    report = cli_flush.flush(directory)
    if as_json:
        print_json({"directory": str(directory.absolute()), **report.record()})
    elif report.entries:
        columns = ("checkpoint", "attempt", "size", "state", "run")
        show_table(columns, report.rows(), numbers=("attempt", "size"))
    report.tell(directory)


def _of_a_checkpoint(manifest: Manifest, what: str) -> Found:
    found = Found(manifest.key, manifest)
    if found.checkpoint_key is None:
        raise ConfigurationError(
            f"{manifest.folder!r} is a folder that was saved by name; only a checkpoint {what}."
        )
    return found


def _show_section(title: str, facts: dict[str, Any]) -> None:
    if any(value is not None for value in facts.values()):
        typer.echo(f"\n{title}")
        show_facts({f"  {name}": value for name, value in facts.items()})


def _best(catalog: Catalog) -> Manifest:
    key = catalog.pointer("best")
    if key is None:
        newest(catalog)
        raise NoCheckpointError(
            f"No checkpoint of {catalog.storage.url!r} is recorded as the best: the training had no "
            "metric_for_best_model. Choose one with --checkpoint."
        )
    return catalog.read(key)


def _local_name(manifest: Manifest) -> str:
    """The plain name, which frameworks read the step from; a folder saved by name loses its version."""
    if parse_checkpoint_key(manifest.key):
        return f"checkpoint-{manifest.step}"
    return folder_name(manifest.key.rpartition("-")[0])


def _to_verify(catalog: Catalog, checkpoint: str | None, every: bool) -> Iterator[Found]:
    if checkpoint is not None:
        manifest = find(catalog, checkpoint)
        yield Found(manifest.key, manifest)
        return
    keys: list[CheckpointKey | str] = [*catalog.checkpoints(), *NamedFolders(catalog).keys()] if every else []
    for key in keys or [newest(catalog)]:
        found = look_at(catalog, key)
        if found is not None:
            yield found


def _verdict(catalog: Catalog, found: Found, progress: Progress) -> dict[str, Any]:
    from hf_cloudtrain.checkpoints import download as checkpoints_download

    if found.manifest is None:
        problems = [str(found.damaged)]
    else:
        progress.begin(f"Verifying {found.title}", found.manifest.size)
        problems = checkpoints_download.verify(catalog, found.manifest, on_bytes=progress.add)
    return {**found.record(), "whole": not problems, "problems": problems}


def _verdict_row(record: dict[str, Any]) -> tuple[object, ...]:
    size = None if record["size"] is None else size_text(record["size"])
    verdict = "whole" if record["whole"] else "damaged"
    return record["folder"] or record["key"], record["file_count"], size, verdict
