"""Arguments and options that several commands share, and the run and the checkpoint that a user names with them."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.cli import completion
from hf_cloudtrain.cli.output import say
from hf_cloudtrain.errors import ConfigurationError, ManifestError, NoCheckpointError

EXAMPLE_RUN = "s3://bucket/runs/mrpc"
"""What `RUN` stands for in the examples of the help texts."""

WHICH = "Step (500), folder (checkpoint-500.a3, final) or key (000003-0000000500)"


def page_file(path: Path | None) -> Path | None:
    """The file of a page, before the runs are read. Raises ConfigurationError: it cannot be written there."""
    if path is not None and path.is_dir():
        raise ConfigurationError(f"{str(path)!r} is a folder. Name a file in it: -o {path / 'report.html'}")
    if path is not None and not path.parent.is_dir():
        raise ConfigurationError(
            f"The folder {str(path.parent)!r} does not exist, so {str(path)!r} cannot be written. Create the folder (`mkdir -p "
            f"{shlex.quote(str(path.parent))}`), or choose a different path."
        )
    return path


RunUrl = Annotated[
    str,
    typer.Argument(
        metavar="RUN_URL", envvar=env.RUN_URL, help="URL of the run: any fsspec URL, or a folder."
    ),
]
RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        envvar=env.RUN_URL,
        help="Name of a run in the store, or the URL or folder of any run.",
        autocompletion=completion.runs,
    ),
]
RunAndDir = Annotated[
    list[str],
    typer.Argument(
        metavar="[RUN] DIR",
        help=f"The run (default: {env.RUN_URL}), and the local folder to download into.",
        autocompletion=completion.runs,
    ),
]
CheckpointName = Annotated[
    str,
    typer.Option(
        "--checkpoint", "-c", metavar="WHICH", help=f"{WHICH}.", autocompletion=completion.checkpoints
    ),
]
CheckpointOrNewest = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        "-c",
        metavar="WHICH",
        help=f"{WHICH}. Default: the newest checkpoint.",
        autocompletion=completion.checkpoints,
    ),
]
DatasetName = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the dataset.", autocompletion=completion.datasets)
]
JobId = Annotated[
    str,
    typer.Argument(metavar="JOB", help="Job id, or a name: its newest job.", autocompletion=completion.jobs),
]
Best = Annotated[bool, typer.Option("--best", help="The best checkpoint instead of the newest.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be deleted; delete nothing.")]
Force = Annotated[bool, typer.Option("--force", help="Delete it even if checkpoints are lost.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")]


class Command(TyperCommand):
    """A command whose help calls an argument what its metavar says: typer adds the type, as in `{RUN}` and `RUN <str>`."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words after the name of the command."""
        return [str(self.options_metavar), *(_in_usage(one) for one in self.params if _is_argument(one))]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The sections of arguments and options."""
        params = self.get_params(ctx)
        for title, wanted in (("Arguments", True), ("Options", False)):
            found = [one for one in params if _is_argument(one) is wanted]
            records = [(one, one.get_help_record(ctx)) for one in found]
            rows = [((wanted and one.metavar) or row[0], row[1]) for one, row in records if row is not None]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def use_commands(app: typer.Typer) -> None:
    """Make every command of an app, and of its groups, a `Command`."""
    for info in app.registered_commands:
        info.cls = Command
    for group in app.registered_groups:
        if group.typer_instance is not None:
            use_commands(group.typer_instance)


def _is_argument(param: Any) -> bool:
    return bool(param.param_type_name == "argument")


def _in_usage(argument: Any) -> str:
    name = str(argument.metavar or argument.name.upper())
    return name if argument.required or name.startswith("[") else f"[{name}]"


def examples(*lines: str) -> str:
    """The examples below the help of a command, one a line, without `cloudtrain` in front; `RUN` stands for a run URL."""
    heading = "Example:" if len(lines) == 1 else "Examples:"
    shown = [f"  cloudtrain {line.replace('RUN', EXAMPLE_RUN)}" for line in lines]
    return "\b\n" + "\n".join([heading, *shown])


def run_and_dir(arguments: list[str]) -> tuple[str, Path]:
    """Split `[RUN] DIR` as `cp` does: the last argument is the target."""
    *urls, directory = arguments
    if len(urls) > 1:
        raise typer.BadParameter(
            f"Expected [RUN] DIR, got {len(arguments)} arguments: {' '.join(arguments)!r}."
        )
    run_url = urls[0] if urls else os.environ.get(env.RUN_URL)
    if not run_url or "://" in directory:
        raise typer.BadParameter(f"Pass the run and the folder to download into; got only {directory!r}.")
    return run_url, Path(directory)


def find(catalog: Catalog, which: str | None) -> Manifest:
    """The manifest of the checkpoint or named folder that the user named; without a name the newest checkpoint's.

    Raises:
        NoCheckpointError: it does not exist.
        ManifestError: its manifest is damaged.
    """
    if which is None:
        return catalog.read(newest(catalog))
    key = CheckpointKey.named(which)
    if key:
        return catalog.read(key)
    step = re.fullmatch(r"(?:checkpoint-)?(\d{1,15})(?:\.a(\d{1,9})(?:\.\d{1,9})?)?", which)
    if step and step[2]:
        return catalog.read(CheckpointKey(int(step[2]), int(step[1])))
    keys = [key for key in catalog.checkpoints() if step and key.step == int(step[1])]
    return _of_step(catalog, keys, which) if keys else _named_folder(catalog, which)


def check_choice(which: str | None, best: bool) -> None:
    """Refuse `--best` beside `--checkpoint`."""
    if best and which is not None:
        raise typer.BadParameter("Pass either --best or --checkpoint, not both.")


def chosen(catalog: Catalog, which: str | None, best: bool) -> Manifest:
    """The checkpoint that `--checkpoint` names, the best with `--best`, else the newest. Raises as `find`."""
    check_choice(which, best)
    return _best(catalog) if best else find(catalog, which)


def newest(catalog: Catalog) -> CheckpointKey:
    """The newest checkpoint. Raises NoCheckpointError where the run, or any checkpoint of it, does not exist."""
    key = catalog.newest()
    if key is None:
        catalog.attempts.check_any()
        url = catalog.storage.url
        raise NoCheckpointError(
            f"The run {url!r} has no checkpoint yet. See how far it is: `cloudtrain run status {url}`."
        )
    return key


def _of_step(catalog: Catalog, keys: list[CheckpointKey], which: str) -> Manifest:
    if which.startswith("checkpoint-"):
        for key in reversed(keys):
            manifest = _read_or_none(catalog, key)
            if manifest is not None and manifest.folder == which:
                return manifest
    manifest = catalog.read(keys[-1])
    if len(keys) > 1:
        attempts = ", ".join(str(key.attempt) for key in keys)
        say(f"Step {manifest.step} was saved by attempts {attempts}; using the newest: {manifest.folder}.")
    elif which.startswith("checkpoint-"):
        say(f"The checkpoint of step {manifest.step} is in folder {manifest.folder}.")
    return manifest


def _read_or_none(catalog: Catalog, key: CheckpointKey) -> Manifest | None:
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
    url = catalog.storage.url
    raise NoCheckpointError(
        f"No checkpoint {which!r} in {url!r}. List them with `cloudtrain checkpoint list {url}`."
    )


def _best(catalog: Catalog) -> Manifest:
    key = catalog.pointer("best")
    if key is None:
        newest(catalog)
        raise NoCheckpointError(
            f"{catalog.storage.url!r} records no best checkpoint: the training had no metric_for_best_model. Choose a "
            "checkpoint with --checkpoint."
        )
    return catalog.read(key)
