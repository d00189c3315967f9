"""`cloudtrain new`: a project to start from, copied from `examples/template`."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Annotated

import typer

from hf_cloudtrain.cli.arguments import Json
from hf_cloudtrain.cli.output import print_json, say
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError

PACKAGE = Path(__file__).resolve().parents[2]
HOMES = (PACKAGE / "template", PACKAGE.parent / "examples" / "template")
"""Where the template is: setup.cfg puts the one folder of the repository into the package as well."""
LEFT_OUT = ("__pycache__", "output", "runs")
"""What Python and a training in the template leave there."""


def new(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", show_default=False, help="The folder to make; it may exist if empty."),
    ],
    as_json: Json = False,
) -> None:
    """Make a project to start from: a model of your own, its data, and a training loop that survives its machine."""
    _check_not_taken(directory)
    left_out = shutil.ignore_patterns(*LEFT_OUT)
    # The content alone: where the package is installed read-only, its modes would make a project that nobody can edit.
    shutil.copytree(
        _template(), directory, ignore=left_out, copy_function=shutil.copyfile, dirs_exist_ok=True
    )
    files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    command = f"cd {shlex.quote(str(directory))} && python train.py"
    if as_json:
        print_json({"directory": str(directory.absolute()), "files": files, "command": command})
        return
    say(f"Made {str(directory)!r}, {len(files)} files; README.md says what is what. Train at once:")
    typer.echo(command)


def _check_not_taken(directory: Path) -> None:
    if directory.is_dir():
        if any(directory.iterdir()):
            raise ConfigurationError(f"{str(directory)!r} is not empty. Name a folder that is not there yet.")
    elif directory.exists() or directory.is_symlink():
        raise ConfigurationError(f"{str(directory)!r} is a file. Name a folder that is not there yet.")


def _template() -> Path:
    for home in HOMES:
        if (home / "train.py").is_file():
            return home
    raise CloudTrainError(f"The template is not in {str(HOMES[0])!r}. Install hf_cloudtrain again.")
