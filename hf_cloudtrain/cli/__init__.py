"""The command line `cloudtrain`: results on stdout, messages on stderr, exit code 0 only for success.

A command reads what is on storage and prints it, or asks a lower room to change it. What may be deleted, when a run is
over and which checkpoint is newest is decided below, in `checkpoints/`, `tracking/` and `jobs/`; this room decides how it
looks. It may import every room except `testing`. In reading order:

    streams       stdout and stderr that are closed, full or a pipe without a reader
    tables        how tables and facts are laid out in the columns of a terminal
    curve         loss curves in a few lines of text
    output        messages, tables, JSON, progress bars
    panels        panels of what one thing is, and framed tables
    periflow      words of PeriFlow's command line, and ours for them
    runs          the run that a user names
    completion    names of runs, jobs, checkpoints and datasets for the shell
    arguments     options that several commands share; the checkpoint that a user names
    status, watch, compare, stop, clean, delete, prune, flush, download, checkup, job_actions
                  what one command (or, for job_actions, one group) shows and does
    verify/       the trial and the comparison of `verify-resume`
    commands/     a file a group: its commands, their options and help texts

Imports run upward only in that order. Whatever is heavy is imported inside the commands: `cloudtrain --help` takes 0.2 s.

This file holds the app, and the only place where errors become messages and exit codes.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hf_cloudtrain.cli import completion, streams
from hf_cloudtrain.cli.arguments import examples, use_commands
from hf_cloudtrain.cli.commands import (
    checkpoint,
    data,
    doctor,
    endpoint,
    job,
    launch,
    new,
    predict,
    run,
    serve,
    ui,
    verify_resume,
    vm,
)
from hf_cloudtrain.cli.output import fail, say, warnings_shown
from hf_cloudtrain.cli.periflow import translated
from hf_cloudtrain.errors import CloudTrainError, JobFileError
from hf_cloudtrain.storage.silence import slow_requests_told


def _text_of(error: OSError) -> object:
    if error.strerror is None:
        return error
    return f"{error.strerror}." if error.filename is None else f"{error.strerror}: {error.filename!r}."


class _Root(TyperGroup):
    """Exit codes: 1 for an error, 2 for wrong usage, 130 for Ctrl-C."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if ctx.resilient_parsing else translated(args))

    def invoke(self, ctx: Any) -> Any:
        with warnings_shown(), slow_requests_told(say):
            try:
                return super().invoke(ctx)
            except JobFileError as error:
                for problem in error.problems:
                    say(problem)
                fail("The job file has errors. Nothing was started.")
            except CloudTrainError as error:
                fail(error)
            except (KeyboardInterrupt, typer.Abort):  # Abort: Ctrl-C at a question
                say("Interrupted.")
                raise typer.Exit(130) from None
            except OSError as error:
                if streams.is_of_stream(error):
                    raise  # `main` ends the command
                fail(_text_of(error))


app = typer.Typer(
    cls=_Root,
    help="Manage the runs, checkpoints, jobs and datasets of hf_cloudtrain.",
    no_args_is_help=True,
    rich_markup_mode=None,  # else square brackets in help are markup, and errors are boxes that break sentences
    pretty_exceptions_enable=False,  # its tracebacks show local variables, and those may be credentials
)
# Longer lines than these are cut in the list of commands, in 80 columns.
app.add_typer(
    checkpoint.app, name="checkpoint", short_help="List, inspect, verify, pin and delete checkpoints."
)
app.add_typer(run.app, name="run")
app.add_typer(job.app, name="job")
app.add_typer(data.app, name="data")
app.add_typer(vm.app, name="vm")
app.add_typer(endpoint.app, name="endpoint", short_help="Serve models until they are deleted.")
app.command(
    epilog=examples(
        "launch --run-url RUN -- trl sft --config sft.yaml",
        "launch --run-url RUN -- torchrun --nproc-per-node 4 train.py",
    ),
    short_help="Run a command that trains, and store its checkpoints.",
    context_settings={"allow_interspersed_args": False},  # what follows the command is the command's
)(launch.launch)
app.command(
    epilog=examples("doctor RUN", "doctor RUN --gb 40"),
    short_help="Check credentials, permissions, speed, clock and disk.",
)(doctor.doctor)
app.command(epilog=examples("ui", "ui RUN"))(ui.ui)
app.command(epilog=examples("new my-project"))(new.new)
app.command(
    epilog=examples("serve RUN", "serve RUN --best --port 8000", "serve out/best"),
    short_help="Answer requests with the model of a checkpoint.",
)(serve.serve)
app.command(
    epilog=examples(
        "predict RUN test.parquet -o predictions.parquet",
        "predict RUN nsmc/test.parquet --column document -o predictions.csv --best",
    ),
    short_help="Add the predictions of a checkpoint to a table.",
)(predict.predict)
app.command("verify-resume", epilog=examples("verify-resume -- python train.py --max_steps 30"))(
    verify_resume.verify_resume
)
use_commands(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("hf_cloudtrain"))
        raise typer.Exit


@app.callback(epilog=examples("checkpoint list RUN"))
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Manage the runs, checkpoints, jobs and datasets of hf_cloudtrain."""


def main() -> None:
    """Run the command in `sys.argv`."""
    if completion.ASKED in os.environ:
        completion.answer(app)
    streams.prepare()
    try:
        app()
    except OSError as error:
        if not streams.is_of_stream(error):
            raise
        streams.end(error)
