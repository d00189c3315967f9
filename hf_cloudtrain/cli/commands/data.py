"""`cloudtrain data`: the datasets of a store, in versions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_cloudtrain import env
from hf_cloudtrain.cli.arguments import Json, examples
from hf_cloudtrain.cli.output import confirm, print_json, say, show_facts, show_table, show_tree, transfer
from hf_cloudtrain.report.summary import files_text, look_at
from hf_cloudtrain.runtime.redaction import redact
from hf_cloudtrain.runtime.text import clean, size_text, time_text
from hf_cloudtrain.runtime.threads import in_threads

if TYPE_CHECKING:
    from hf_cloudtrain.checkpoints.manifest import Manifest
    from hf_cloudtrain.datasets.store import Dataset, DatasetStore

app = typer.Typer(
    help=f"Datasets, in versions, in the store that {env.STORE} names (any URL; else a folder in the home folder).",
    epilog=examples("cloudtrain data create glue data/glue"),
    no_args_is_help=True,
)

READS_AT_ONCE = 16
"""Manifests read at once: they wait for answers, not for bandwidth."""

Name = Annotated[str, typer.Argument(metavar="NAME", show_default=False, help="What the dataset is called.")]
Version = Annotated[
    int | None,
    typer.Option(
        "--version", min=1, metavar="N", show_default=False, help="Which version. Default: the newest."
    ),
]


@app.command(
    epilog=examples(
        "cloudtrain data create glue data/glue",
        "cloudtrain data create nsmc s3://bucket/corpora/nsmc",
    )
)
def create(
    name: Name,
    source: Annotated[
        str,
        typer.Argument(
            metavar="PATH|URL",
            show_default=False,
            help="A folder or a file: a local path, or any fsspec URL.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Store a folder as the newest version of a dataset. A file that the version before has too is not sent again."""
    datasets = _open()
    with transfer() as progress:
        dataset, sent = datasets.create(name, source, progress=progress)
    what = f"{dataset} ({files_text(dataset.manifest)})"
    if sent is None:
        say(f"Nothing has changed since {what} was stored.")
    else:
        say(f"Stored {what}: {size_text(sent)} were sent.")
    if as_json:
        print_json({**_record(datasets, dataset), "created_now": sent is not None, "sent": sent or 0})


@app.command("list", epilog=examples("cloudtrain data list --json"))
def list_(as_json: Json = False) -> None:
    """List the datasets of the store. Each with its newest version."""
    from hf_cloudtrain.datasets.store import key_of

    datasets = _open()
    known = datasets.versions()
    keys = [key_of(name, versions[-1]) for name, versions in known.items()]
    (newest,) = in_threads(lambda key: look_at(datasets.catalog, key), (keys, READS_AT_ONCE))
    records = [
        _line(name, versions, found.manifest, found.damaged)
        for (name, versions), found in zip(known.items(), newest, strict=True)
        if found is not None  # deleted since the listing
    ]
    for record in records:
        if record["damaged"]:
            say(f"Warning: {record['damaged']}")
    if as_json:
        print_json({"store": redact(datasets.url), "datasets": records})
    elif records:
        show_table(
            ("dataset", "version", "versions", "files", "size", "stored"),
            map(_row, records),
            numbers=("version", "versions", "files", "size"),
        )
    else:
        say(f"There is no dataset in {redact(datasets.url)!r} yet. `cloudtrain data create` makes one.")


@app.command(epilog=examples("cloudtrain data view glue", "cloudtrain data view glue --version 1"))
def view(name: Name, version: Version = None, as_json: Json = False) -> None:
    """Show one version of a dataset. An overview, its files with their sizes, its metadata."""
    datasets = _open()
    dataset = datasets.find(name, version)
    manifest = dataset.manifest
    if as_json:
        record = _record(datasets, dataset)
        record["metadata"] = manifest.origin
        record["files"] = [dataclasses.asdict(entry) for entry in manifest.files]
        print_json(record)
        return
    versions = datasets.versions().get(name, [])
    show_facts(
        {
            "dataset": name,
            "version": dataset.version,
            "versions": ", ".join(map(str, versions)) if len(versions) > 1 else None,
            "store": redact(datasets.url),
            "folder": manifest.folder,
            "files": files_text(manifest),
            "kinds": _kinds(manifest),
            "stored": time_text(manifest.created),
        }
    )
    typer.echo()
    show_tree(name, ((entry.path, entry.size) for entry in manifest.files))
    if manifest.origin:
        typer.echo("\nmetadata")
        show_facts({f"  {key}": value for key, value in manifest.origin.items()})


@app.command(
    epilog=examples("cloudtrain data download glue data", "cloudtrain data download glue data --version 1")
)
def download(
    name: Name,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", show_default=False, help="Local folder to put it into.")
    ],
    version: Version = None,
    as_json: Json = False,
) -> None:
    """Download one version of a dataset. Prints where it is: DIR/NAME.

    The folder appears when it is complete and every byte is verified. One that is there already, with the same files,
    is not downloaded again.
    """
    from hf_cloudtrain.cli.download import bring

    datasets = _open()
    dataset = datasets.find(name, version)
    target = directory / dataset.name
    needed = bring(datasets.catalog, dataset.manifest, target)
    what = f"{dataset} ({files_text(dataset.manifest)})"
    say(f"Downloaded and verified {what}." if needed else f"{what} was here already, and is whole.")
    if as_json:
        print_json({**_record(datasets, dataset), "path": str(target.absolute()), "downloaded": needed})
    else:
        typer.echo(clean(target))


@app.command(epilog=examples("cloudtrain data delete glue --version 1", "cloudtrain data delete glue --yes"))
def delete(
    name: Name,
    version: Annotated[
        int | None,
        typer.Option(
            "--version", min=1, metavar="N", show_default=False, help="Which version. Default: all of them."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Delete a dataset, or one version of it. What runs with a local copy of it keeps that."""
    datasets = _open()
    begun = [number for number in datasets.half_deleted(name) if version in (None, number)]
    there = datasets.versions().get(name, [])
    if begun and (version in begun or not there):
        going = begun
    else:
        found = datasets.find(name, version)
        going = sorted({*begun, *(there if version is None else [found.version])})
    which = f"version {going[0]}" if len(going) == 1 else f"all {len(going)} versions"
    confirm(f"Delete {which} of the dataset {name!r} from {redact(datasets.url)!r}?", yes)
    for number in going:  # the oldest first, so that what is interrupted leaves the newer ones
        datasets.delete(name, number)
    say(f"Deleted {which} of the dataset {name!r}.")
    if as_json:
        print_json({"store": redact(datasets.url), "dataset": name, "deleted": going})


@app.command("clean", epilog=examples("cloudtrain data clean --dry-run", "cloudtrain data clean --yes"))
def clean_(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what is left over, and delete nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Delete what killed processes left in the store. Never a version, nor what somebody may still be uploading."""
    from hf_cloudtrain.cli import clean as cli_clean

    datasets = _open()
    left_over = cli_clean.clean(datasets.catalog, dry_run=dry_run, yes=yes, quiet=as_json)
    if as_json:
        print_json({"store": redact(datasets.url), "dry_run": dry_run, "left_over": left_over})


def _open() -> DatasetStore:
    from hf_cloudtrain.datasets.store import DatasetStore

    return DatasetStore()


def _record(datasets: DatasetStore, dataset: Dataset) -> dict[str, Any]:
    line = _line(dataset.name, [dataset.version], dataset.manifest, None)
    del line["versions"], line["damaged"]
    return {
        "store": redact(datasets.url),
        **line,
        "url": f"{datasets.catalog.storage.url}/{dataset.manifest.folder}",
    }


def _line(name: str, versions: list[int], manifest: Manifest | None, damaged: str | None) -> dict[str, Any]:
    return {
        "dataset": name,
        "version": versions[-1],
        "versions": versions,
        "file_count": len(manifest.files) if manifest else None,
        "size": manifest.size if manifest else None,
        "created": manifest.created if manifest else None,
        "damaged": damaged,
    }


def _row(record: dict[str, Any]) -> tuple[object, ...]:
    size = "damaged" if record["size"] is None else size_text(record["size"])
    return (
        record["dataset"],
        record["version"],
        len(record["versions"]),
        record["file_count"],
        size,
        time_text(record["created"]),
    )


def _kinds(manifest: Manifest) -> str | None:
    """How many files of which ending: '2 .parquet, 1 .json'."""
    counts: dict[str, int] = {}
    for entry in manifest.files:
        ending = Path(entry.path).suffix or "without ending"
        counts[ending] = counts.get(ending, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {ending}" for ending, count in ordered[:5]]
    return ", ".join([*shown, "…"] if len(ordered) > 5 else shown) or None
