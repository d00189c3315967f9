"""The command line `cloudtrain`. Data on stdout, words on stderr, exit code 0 only for success.

One file a command group. What is heavy is imported inside the commands: `cloudtrain --help` takes 0.2 s.
"""

from __future__ import annotations

import errno
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hf_cloudtrain.cli.arguments import examples
from hf_cloudtrain.cli.commands import checkpoint, data, job, new, run, verify_resume, vm
from hf_cloudtrain.cli.output import fail, say, warnings_shown
from hf_cloudtrain.errors import CloudTrainError, JobFileError


class _Root(TyperGroup):
    """The one place where errors become words and exit codes: 1 for trouble, 2 for wrong usage, 130 for Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        with warnings_shown():
            try:
                return super().invoke(ctx)
            except JobFileError as error:
                for problem in error.problems:
                    say(problem)
                fail("The job file cannot be run as it is. Nothing was started.")
            except CloudTrainError as error:
                fail(error)
            except (KeyboardInterrupt, typer.Abort):  # Abort: at a question
                say("Interrupted.")
                raise typer.Exit(130) from None
            except OSError as error:
                if error.errno == errno.EPIPE:
                    raise  # `cloudtrain … | head`: typer ends quietly
                fail(f"{error.strerror}: {error.filename!r}." if error.strerror else error)


app = typer.Typer(
    cls=_Root,
    help="Runs, checkpoints and datasets of hf_cloudtrain on storage.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # else square brackets in help are markup, and errors are boxes that break sentences
    pretty_exceptions_enable=False,  # its tracebacks show local variables, and those may be credentials
)
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(run.app, name="run")
app.add_typer(job.app, name="job")
app.add_typer(data.app, name="data")
app.add_typer(vm.app, name="vm")
app.command(epilog=examples("cloudtrain new my-project"))(new.new)
app.command("verify-resume", epilog=examples("cloudtrain verify-resume -- python train.py --max_steps 30"))(
    verify_resume.verify_resume
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("hf_cloudtrain"))
        raise typer.Exit


@app.callback(epilog=examples("cloudtrain checkpoint list s3://bucket/runs/mrpc"))
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Runs, checkpoints and datasets of hf_cloudtrain on storage."""


def main() -> None:
    """Run the command in `sys.argv`."""
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks is no reason to fail.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    app()
