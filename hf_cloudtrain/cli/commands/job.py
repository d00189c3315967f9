"""`cloudtrain job`: run jobs from job files; list, inspect, follow and cancel them."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_cloudtrain.cli import completion
from hf_cloudtrain.cli.arguments import JobId, Json, Yes, examples
from hf_cloudtrain.cli.output import print_json

if TYPE_CHECKING:
    from hf_cloudtrain.jobs.spec.job import EngineName

app = typer.Typer(
    help="Run jobs; list, inspect, follow and cancel them.",
    epilog=examples("job run -f job.yml -d ./glue"),
    no_args_is_help=True,
)

TEMPLATE = Path(__file__).with_name("job.yml").read_text(encoding="utf-8")
"""A job file that runs as it is, with every other key as a comment."""
OVERRIDE = "Override the value in the job file."


class EngineChoice(str, enum.Enum):
    """The values of `engine` in a job file."""

    local = "local"
    slurm = "slurm"
    skypilot = "skypilot"
    sagemaker = "sagemaker"


@app.command(
    epilog=examples(
        "job run -f job.yml -d ./glue",
        "job run -f job.yml -d ./glue --engine slurm --dry-run",
        "job run --resume mnli-2",
    )
)
def run(
    file: Annotated[Path | None, typer.Option("--file", "-f", metavar="FILE", help="The job file.")] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--directory",
            "-d",
            metavar="DIR",
            help="Folder to copy into the workspace of the job: ./glue becomes /workspace/glue.",
        ),
    ] = None,
    engine: Annotated[EngineChoice | None, typer.Option("--engine", help=OVERRIDE)] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, metavar="N", help=OVERRIDE)] = None,
    nproc_per_node: Annotated[
        int | None, typer.Option("--nproc-per-node", min=1, metavar="N", help=OVERRIDE)
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="JOB",
            help="Resume a job that was cancelled, preempted, failed or lost.",
            autocompletion=completion.jobs,
        ),
    ] = None,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait", help="Print its log and block until it has ended. Exit with code 0 if it finished."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be started; start nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a job. It keeps running when this command or the terminal ends."""
    from hf_cloudtrain.cli import job_actions

    if resume is not None:
        if dry_run or any(option is not None for option in (file, directory, engine, nodes, nproc_per_node)):
            raise typer.BadParameter(
                "--resume starts the job as it was submitted. Pass no option except --wait."
            )
        job_actions.resume(resume, wait, as_json)
        return
    if file is None:
        raise typer.BadParameter("Pass a job file with -f, or a job to resume with --resume.")
    name: EngineName | None = None if engine is None else engine.value
    job_actions.run(file, directory, name, nodes, nproc_per_node, wait=wait, dry_run=dry_run, as_json=as_json)


@app.command("list", epilog=examples("job list", "job list --all"))
def list_(
    experiment: Annotated[
        str | None, typer.Option("--experiment", metavar="NAME", help="Only jobs of this experiment.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", "-a", help="All jobs instead of the last 20.")] = False,
    as_json: Json = False,
) -> None:
    """List the jobs of the store, the newest last."""
    from hf_cloudtrain.cli import job_actions

    job_actions.show_list(experiment, None if everything else 20, as_json)


@app.command(epilog=examples("job status mnli-2"))
def status(job: JobId, as_json: Json = False) -> None:
    """Show the state, starts and exit codes of a job."""
    from hf_cloudtrain.cli import job_actions

    job_actions.show_status(job, as_json)


@app.command(epilog=examples("job logs -f mnli-2", "job logs mnli-2 --node 1"))
def logs(
    job: JobId,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", "-f", help="Print new lines until the job ends. Ctrl-C leaves the job alone."
        ),
    ] = False,
    node: Annotated[
        int | None, typer.Option("--node", min=0, metavar="N", help="Only node N, from 0.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the log of a job."""
    from hf_cloudtrain.cli import job_actions

    job_actions.show_logs(job, node, follow, as_json)


@app.command(epilog=examples("job cancel mnli-2", "job cancel mnli-2 --wait"))
def cancel(
    job: JobId,
    wait: Annotated[bool, typer.Option("--wait", help="Block until the job has ended.")] = False,
    as_json: Json = False,
) -> None:
    """Cancel a job. It saves within its grace period; then it is killed."""
    from hf_cloudtrain.cli import job_actions

    job_actions.cancel(job, wait, as_json)


@app.command(epilog=examples("job delete mnli-2", "job delete mnli-2 --force --yes"))
def delete(
    job: JobId,
    force: Annotated[
        bool, typer.Option("--force", help="Delete it even if it could still be resumed.")
    ] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Delete a job that is over.

    Deletes its record, and its folder on this machine. Its run stays.
    """
    from hf_cloudtrain.cli import job_actions

    job_actions.delete(job, force, yes, as_json)


@app.command(epilog=examples("job template > job.yml"))
def template(as_json: Json = False) -> None:
    """Print a job file to start from, with every key."""
    if as_json:
        print_json({"template": TEMPLATE})
    else:
        typer.echo(TEMPLATE, nl=False)


@app.command(epilog=examples("job schema > job.schema.json"))
def schema(
    as_json: Json = False,  # noqa: ARG001 - every command has the option; this one only prints JSON
) -> None:
    """Print the JSON schema of job files.

    Editors complete and check job files with it.
    """
    from hf_cloudtrain.jobs.spec.job import Job

    print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **Job.model_json_schema()})
