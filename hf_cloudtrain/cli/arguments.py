"""What several commands take: a run, and which of its checkpoints."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest, parse_checkpoint_key
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.cli.output import say
from hf_cloudtrain.errors import ManifestError, NoCheckpointError
from hf_cloudtrain.storage.client import Storage

RunUrl = Annotated[
    str,
    typer.Argument(
        metavar="RUN_URL",
        envvar=env.RUN_URL,
        show_default=False,
        help="Where the run is: any fsspec URL, or a folder.",
    ),
]
RunUrlAndDir = Annotated[
    list[str],
    typer.Argument(
        metavar="[RUN_URL] DIR",
        show_default=False,
        help=f"Where the run is, unless {env.RUN_URL} says it, and the local folder to put the checkpoint into.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
BY_NAME = ("--checkpoint", "-c")
WHICH = "A step (500), a folder (checkpoint-500.a3, final) or a key (000003-0000000500)"
Which = Annotated[
    str | None,
    typer.Option(*BY_NAME, metavar="WHICH", show_default=False, help=f"{WHICH}. Default: the newest."),
]


def examples(*lines: str) -> str:
    """The examples below a command's help, one a line."""
    return "\b\n" + "\n".join(
        ["Example:" if len(lines) == 1 else "Examples:", *(f"  {line}" for line in lines)]
    )


def open_catalog(run_url: str) -> Catalog:
    """The records of a run; storage options come from the environment."""
    return Catalog(Storage(run_url, env.storage_options(None)))


def run_url_and_dir(arguments: list[str]) -> tuple[str, Path]:
    """Both of them, as `cp` reads its arguments: the last one is where to."""
    *urls, directory = arguments
    if len(urls) > 1:
        raise typer.BadParameter(f"{' '.join(arguments)!r} is more than a run URL and a folder.")
    run_url = urls[0] if urls else os.environ.get(env.RUN_URL)
    if not run_url or "://" in directory:
        raise typer.BadParameter(
            f"{directory!r} names only one of the run URL and the folder to download to."
        )
    return run_url, Path(directory)


def find(catalog: Catalog, which: str | None) -> Manifest:
    """The manifest of the checkpoint or named folder that a person means; the newest where they named none.

    Raises:
        NoCheckpointError: there is none such.
        ManifestError: its manifest is damaged.
    """
    if which is None:
        return catalog.read(newest(catalog))
    found = parse_checkpoint_key(which)
    if found:
        return catalog.read(CheckpointKey(*found))
    step = re.fullmatch(r"(?:checkpoint-)?(\d{1,15})(?:\.a(\d{1,9}))?", which)
    if step and step[2]:
        return catalog.read(CheckpointKey(int(step[2]), int(step[1])))
    keys = [key for key in catalog.checkpoints() if step and key.step == int(step[1])]
    if keys:
        return _of_step(catalog, keys, which)
    return _named_folder(catalog, which)


def newest(catalog: Catalog) -> CheckpointKey:
    """The newest checkpoint. Raises NoCheckpointError where there is none, which says whether there is a run."""
    key = catalog.newest()
    if key is None:
        catalog.attempts.check_any()
        raise NoCheckpointError(f"The run {catalog.storage.url!r} has no checkpoint yet.")
    return key


def _of_step(catalog: Catalog, keys: list[CheckpointKey], which: str) -> Manifest:
    if which.startswith("checkpoint-"):
        for key in reversed(keys):
            manifest = _read_if_whole(catalog, key)
            if manifest is not None and manifest.folder == which:
                return manifest
    manifest = catalog.read(keys[-1])
    if len(keys) > 1:
        attempts = ", ".join(str(key.attempt) for key in keys)
        say(
            f"Step {manifest.step} was saved by the attempts {attempts}: taking the newest, {manifest.folder}."
        )
    elif which.startswith("checkpoint-"):
        say(f"The checkpoint of step {manifest.step} is in the folder {manifest.folder}.")
    return manifest


def _read_if_whole(catalog: Catalog, key: CheckpointKey) -> Manifest | None:
    try:
        return catalog.read(key)
    except (ManifestError, NoCheckpointError):
        return None


def _named_folder(catalog: Catalog, which: str) -> Manifest:
    """By key (`final-000002`), by folder (`final.2`), or by name (`final`: its newest version)."""
    keys = NamedFolders(catalog).keys()
    versions = [key for key in keys if re.fullmatch(re.escape(which) + r"-\d{6,}", key)]
    name, _, version = which.rpartition(".")
    of_folder = f"{name}-{int(version):06d}" if re.fullmatch(r"\d{1,9}", version) else None
    for key in (which, *reversed(versions), of_folder):
        if key in keys:
            return NamedFolders(catalog).read(key)
    raise _none_such(catalog, which)


def _none_such(catalog: Catalog, which: str) -> NoCheckpointError:
    return NoCheckpointError(
        f"There is no checkpoint {which!r} in {catalog.storage.url!r}. `cloudtrain checkpoint list "
        f"{catalog.storage.url}` shows those that exist."
    )
