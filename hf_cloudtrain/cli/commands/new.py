"""`cloudtrain new`: create a project from `examples/template`."""

from __future__ import annotations

import contextlib
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
        Path, typer.Argument(metavar="DIR", help="Folder to create. It must not exist, or be empty.")
    ],
    as_json: Json = False,
) -> None:
    """Create a project from a template.

    It has a model, its data, and a training loop that survives its machine.
    """
    _check_free(directory)
    # Without the modes of the files: of a package that is installed read-only, they would make a read-only project.
    is_new = not directory.exists()
    try:
        shutil.copytree(
            _template(),
            directory,
            ignore=shutil.ignore_patterns(*LEFT_OUT),
            copy_function=_copy,
            dirs_exist_ok=True,
        )
    except BaseException:  # half a project looks like a whole one
        _empty(directory, is_new)
        raise
    files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    command = f"cd {shlex.quote(str(directory))} && python train.py"
    if as_json:
        print_json({"directory": str(directory.absolute()), "files": files, "command": command})
        return
    say(f"Created {str(directory)!r} with {len(files)} files; README.md describes them. Start training with:")
    typer.echo(command)


def _copy(source: str, target: str) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as error:  # copytree would collect it, and go on
        raise CloudTrainError(f"Cannot write {target!r}: {error.strerror}. Nothing was created.") from None


def _empty(directory: Path, is_new: bool) -> None:
    """Delete what was created; the folder itself only if it is new."""
    with contextlib.suppress(OSError):
        for path in [directory] if is_new else list(directory.iterdir()):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _check_free(directory: Path) -> None:
    if directory.is_dir():
        if any(directory.iterdir()):
            raise ConfigurationError(
                f"{str(directory)!r} is not empty. Choose a folder that does not exist yet."
            )
    elif directory.exists() or directory.is_symlink():
        raise ConfigurationError(f"{str(directory)!r} is a file. Choose a folder that does not exist yet.")


def _template() -> Path:
    for home in HOMES:
        if (home / "train.py").is_file():
            return home
    raise CloudTrainError(f"The template is missing from {str(HOMES[0])!r}. Reinstall hf_cloudtrain.")
