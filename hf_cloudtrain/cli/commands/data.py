"""`cloudtrain data`: store, list, inspect, download and delete versioned datasets."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_cloudtrain import env
from hf_cloudtrain.cli.arguments import DatasetName, DryRun, Json, Yes, examples
from hf_cloudtrain.cli.output import (
    confirm,
    print_json,
    say,
    show_table,
    transfer,
)
from hf_cloudtrain.cli.panels import facts_of, show_panels, tree_of
from hf_cloudtrain.cli.tables import Columns
from hf_cloudtrain.report.summary import files_text, read_infos
from hf_cloudtrain.runtime.redaction import redact
from hf_cloudtrain.runtime.text import clean, size_text, time_text

if TYPE_CHECKING:
    from hf_cloudtrain.checkpoints.manifest import Manifest
    from hf_cloudtrain.datasets.store import Dataset, DatasetStore

app = typer.Typer(
    help=f"Store, list, inspect, download and delete datasets.\n\nThey have versions, and are in the store of {env.STORE}.",
    epilog=examples("data create glue data/glue"),
    no_args_is_help=True,
)

Version = Annotated[
    int | None, typer.Option("--version", min=1, metavar="N", help="Version. Default: the newest.")
]

LISTED: Columns = {
    "dataset": lambda record: record["dataset"],
    ">version": lambda record: record["version"],
    ">versions": lambda record: len(record["versions"]),
    ">files": lambda record: record["file_count"],
    ">size": lambda record: "damaged" if record["size"] is None else size_text(record["size"]),
    "stored": lambda record: time_text(record["created"]),
}


@app.command(epilog=examples("data create glue data/glue", "data create nsmc s3://bucket/corpora/nsmc"))
def create(
    name: DatasetName,
    source: Annotated[
        str, typer.Argument(metavar="PATH|URL", help="Folder or file: a local path or any fsspec URL.")
    ],
    as_json: Json = False,
) -> None:
    """Store a folder as a new version of a dataset.

    Files that the previous version has as well are copied on storage instead of uploaded.
    """
    datasets = _open()
    with transfer() as progress:
        dataset, sent = datasets.create(name, source, progress=progress)
    what = _title(dataset)
    if sent is None:
        say(f"Nothing has changed since {what}.")
    else:
        say(f"Stored {what} ({size_text(sent)} uploaded).")
    if as_json:
        print_json({**_record(datasets, dataset), "created_now": sent is not None, "sent": sent or 0})


@app.command("list", epilog=examples("data list --json"))
def list_(as_json: Json = False) -> None:
    """List the datasets of the store, each with its newest version."""
    from hf_cloudtrain.datasets.store import key_of

    datasets = _open()
    known = {key_of(name, versions[-1]): (name, versions) for name, versions in datasets.versions().items()}
    records = [
        _line(*known[info.key], info.manifest, info.damaged) for info in read_infos(datasets.catalog, known)
    ]
    for record in records:
        if record["damaged"]:
            say(f"Warning: {record['damaged']}")
    if as_json:
        print_json({"store": redact(datasets.url), "datasets": records})
    elif records:
        show_table(LISTED, records, spare=["versions", "files", "stored"])
    else:
        say(f"No datasets in {redact(datasets.url)!r} yet. Store one with `cloudtrain data create`.")


@app.command(epilog=examples("data view glue", "data view glue --version 1"))
def view(name: DatasetName, version: Version = None, as_json: Json = False) -> None:
    """Show the files and the metadata of a dataset."""
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
    overview = facts_of(
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
    show_panels(
        ("Overview", overview),
        ("Files", tree_of(name, ((entry.path, entry.size) for entry in manifest.files))),
        *([("Metadata", facts_of(manifest.origin))] if manifest.origin else []),
    )


@app.command(epilog=examples("data download glue data", "data download glue data --version 1"))
def download(
    name: DatasetName,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Local folder to download into.")],
    version: Version = None,
    as_json: Json = False,
) -> None:
    """Download a version of a dataset and verify it.

    Prints its folder, DIR/NAME. The folder appears once all of its bytes are verified. An intact copy that is already
    there is not downloaded again.
    """
    from hf_cloudtrain.cli.download import bring

    datasets = _open()
    dataset = datasets.find(name, version)
    target = directory / dataset.name
    downloaded = bring(datasets.catalog, dataset.manifest, target, _title(dataset))
    if as_json:
        facts = {"path": str(target.absolute()), "downloaded": downloaded}
        print_json({**_record(datasets, dataset), **facts})
    else:
        typer.echo(clean(target))


@app.command(epilog=examples("data delete glue --version 1", "data delete glue --yes"))
def delete(
    name: DatasetName,
    version: Annotated[
        int | None, typer.Option("--version", min=1, metavar="N", help="Version. Default: all versions.")
    ] = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Delete a dataset, or one version of it.

    Local copies are kept, so running jobs are not affected.
    """
    datasets = _open()
    begun = [number for number in datasets.half_deleted(name) if version in (None, number)]
    stored = datasets.versions().get(name, [])
    if begun and (version in begun or not stored):
        going = begun
    else:
        found = datasets.find(name, version)
        going = sorted({*begun, *(stored if version is None else [found.version])})
    which = f"version {going[0]}" if len(going) == 1 else f"all {len(going)} versions"
    confirm(f"Delete {which} of the dataset {name!r} from {redact(datasets.url)!r}?", yes)
    for number in going:  # the oldest first, so that an interrupted deletion leaves the newer ones
        datasets.delete(name, number)
    say(f"Deleted {which} of the dataset {name!r}.")
    if as_json:
        print_json({"store": redact(datasets.url), "dataset": name, "deleted": going})


@app.command("clean", epilog=examples("data clean --dry-run", "data clean --yes"))
def clean_(dry_run: DryRun = False, yes: Yes = False, as_json: Json = False) -> None:
    """Delete what killed processes left in the store.

    Datasets, and uploads that may still be running, are kept.
    """
    from hf_cloudtrain.cli import clean as actions

    datasets = _open()
    left_over = actions.clean(datasets.catalog, dry_run=dry_run, yes=yes, quiet=as_json)
    if as_json:
        print_json({"store": redact(datasets.url), "dry_run": dry_run, "left_over": left_over})


def _open() -> DatasetStore:
    from hf_cloudtrain.datasets.store import DatasetStore

    return DatasetStore()


def _title(dataset: Dataset) -> str:
    return f"{dataset.name}, version {dataset.version}: {files_text(dataset.manifest)}"


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


def _kinds(manifest: Manifest) -> str | None:
    """How many files have which suffix: '2 .parquet, 1 .json'."""
    counts = Counter(Path(entry.path).suffix or "without suffix" for entry in manifest.files)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {suffix}" for suffix, count in ordered[:5]]
    return ", ".join([*shown, "…"] if len(ordered) > 5 else shown) or None
