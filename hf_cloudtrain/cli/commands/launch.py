"""`cloudtrain launch`: run a command that trains, unmodified, with checkpoints on storage and resume."""

from __future__ import annotations

import os
import shlex
from typing import Annotated

import typer

from hf_cloudtrain import env
from hf_cloudtrain.cli.output import say
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.storage.urls import normal_url


def launch(
    command: Annotated[
        list[str],
        typer.Argument(metavar="-- COMMAND...", help="The command that trains, as without `cloudtrain`."),
    ],
    run_url: Annotated[
        str | None,
        typer.Option(metavar="URL", envvar=env.RUN_URL, help="URL of the run: any fsspec URL, or a folder."),
    ] = None,
    resume_option: Annotated[
        str | None,
        typer.Option(
            metavar="OPTION",
            help="Option of the command that names the folder to load, for scripts with Accelerator.save_state; added with the "
            "newest folder once there is one.",
        ),
    ] = None,
) -> None:
    """Run a command that trains, and store its checkpoints.

    Works for each command that trains with the Trainer of transformers, or saves with Accelerator.save_state, such as
    `torchrun train.py` or `trl sft`, with no line changed: its checkpoints are uploaded to the run, and the same command on
    any machine resumes from the newest one. The exit code is that of the command.
    """
    from hf_cloudtrain.launch.command import run

    if env.run_url_or_none(run_url) is None:
        raise ConfigurationError(
            f"No run URL was given. Write `cloudtrain launch --run-url s3://bucket/runs/mrpc -- {shlex.join(command)}`, or set "
            f"{env.RUN_URL}."
        )
    url = normal_url(env.run_url(run_url))
    raise typer.Exit(run(command, url, say, os.environ, resume_option))
