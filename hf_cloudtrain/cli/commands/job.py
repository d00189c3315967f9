"""`cloudtrain job`: run jobs from job files, see how they are doing, end them."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_cloudtrain.cli.arguments import Json, examples
from hf_cloudtrain.cli.output import print_json

if TYPE_CHECKING:
    from hf_cloudtrain.jobs.spec.job import EngineName

app = typer.Typer(
    help="Jobs: what runs, where, and how it is doing.",
    epilog=examples("cloudtrain job run -f job.yml -d ./glue"),
    no_args_is_help=True,
)

TEMPLATE = """\
# What to run, on how many machines, and where its checkpoints go. A line that begins with "#" shows a default or an
# example.

# experiment: bert               # jobs that belong together
name: my-job

# vm: azure-16gb-v100-4g-eastus-spot   # [cloud]-[memory]-[gpu]-[count]g-[region][-spot]
# num_devices: 8                 # GPUs in all: 8 on 4-GPU machines are 2 nodes

job_setting:
  type: custom
  docker:
    # image: pytorch/pytorch     # where the engine runs images
    command:
      # setup: pip install -r requirements.txt   # once on each node
      # torchrun finds nodes, processes and addresses in its environment.
      run: |
        torchrun train.py
  # workspace:
  #   mount_path: /workspace     # where the job finds the folder that is given with -d

# The newest checkpoint of the run is put here before the command starts.
# checkpoint:
#   output_checkpoint_dir: /workspace/ckpt

# data:
#   name: mnli                   # a dataset of the store; mnli@2 is its second version
#   mount_path: /workspace/data  # to read

# run_url: s3://bucket/runs/my-job   # default: a folder of your store
# engine: local                  # or slurm, skypilot, sagemaker
# max_restarts: 3                # after crashes; a machine that is taken away is no crash

# env:
#   HF_CLOUDTRAIN_GRACE: 30      # seconds between the notice that a machine goes and its end
#   WANDB_API_KEY:               # no value: taken from the shell that submits the job

# local:
#   nodes: 1                     # instead of what vm and num_devices say
#   nproc_per_node: 1

# slurm:
#   nodes: 2
#   nproc_per_node: 4
#   partition: gpu
#   account: nlp
#   qos: normal
#   time: 1-12:00:00
#   gres: gpu:v100:4             # default: the GPUs of vm

# skypilot:
#   managed: true                # started again on another machine when its own is taken away
#   bucket: s3://bucket          # default: that of run_url

# sagemaker:
#   role: arn:aws:iam::111122223333:role/training
#   instance_type: ml.p3.8xlarge # default: the one that has the GPUs of vm
#   checkpoint_s3_uri: s3://bucket/checkpoints
#   output_s3_uri: s3://bucket/output
#   channels:
#     train: s3://bucket/data
#   metric_definitions:
#     - name: train:loss
#       regex: "'loss': ([0-9.]+)"
#   max_run: 86400               # seconds
#   max_wait: 172800             # seconds, with the waiting for spot machines
"""


JobId = Annotated[
    str, typer.Argument(metavar="JOB", show_default=False, help="Id of a job; its name means the newest.")
]


class EngineChoice(str, enum.Enum):
    """As job files have it."""

    local = "local"
    slurm = "slurm"
    skypilot = "skypilot"
    sagemaker = "sagemaker"


@app.command(
    epilog=examples(
        "cloudtrain job run -f job.yml -d ./glue",
        "cloudtrain job run -f job.yml -d ./glue --engine slurm --dry-run",
        "cloudtrain job run --resume mnli-2",
    )
)
def run(
    file: Annotated[
        Path | None, typer.Option("--file", "-f", show_default=False, help="The job file.")
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--directory",
            "-d",
            show_default=False,
            help="Folder that the job finds as its workspace; it is copied.",
        ),
    ] = None,
    engine: Annotated[
        EngineChoice | None, typer.Option("--engine", show_default=False, help="Instead of the file's.")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, show_default=False, help="Instead of the file's.")
    ] = None,
    nproc_per_node: Annotated[
        int | None, typer.Option("--nproc-per-node", min=1, show_default=False, help="Instead of the file's.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="JOB",
            show_default=False,
            help="Go on with a job that was cancelled, failed or lost.",
        ),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Show what it says until it is over; exit code 0 if it finished.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print exactly what would be started, and start nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a job. It goes on when this command, or the terminal, ends."""
    from hf_cloudtrain.cli import job_actions

    if (file is None) == (resume is None):
        raise typer.BadParameter("Pass a job file with -f, or a job to go on with by --resume.")
    if resume is not None:
        if dry_run or any(option is not None for option in (directory, engine, nodes, nproc_per_node)):
            raise typer.BadParameter(
                "--resume takes the job as it was submitted: no other option but --wait."
            )
        job_actions.resume(resume, wait, as_json)
        return
    assert file is not None
    name: EngineName | None = None if engine is None else engine.value
    job_actions.run(file, directory, name, nodes, nproc_per_node, wait=wait, dry_run=dry_run, as_json=as_json)


@app.command("list", epilog=examples("cloudtrain job list", "cloudtrain job list --all"))
def list_(
    experiment: Annotated[
        str | None, typer.Option("--experiment", show_default=False, help="Only the jobs of this experiment.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", "-a", help="Also what was over before the last 20.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the jobs of the store, the newest last."""
    from hf_cloudtrain.cli import job_actions

    job_actions.show_list(experiment, None if everything else 20, as_json)


@app.command(epilog=examples("cloudtrain job status mnli-2"))
def status(job: JobId, as_json: Json = False) -> None:
    """Show how a job is doing: state, reason, starts, exit codes, and how far its run is."""
    from hf_cloudtrain.cli import job_actions

    job_actions.show_status(job, as_json)


@app.command(epilog=examples("cloudtrain job logs -f mnli-2", "cloudtrain job logs mnli-2 --node 1"))
def logs(
    job: JobId,
    follow: Annotated[
        bool,
        typer.Option("--follow", "-f", help="Wait for more until the job is over. Ctrl-C leaves it alone."),
    ] = False,
    node: Annotated[
        int | None, typer.Option("--node", min=0, show_default=False, help="Only this node, from 0.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print what the nodes of a job say."""
    from hf_cloudtrain.cli import job_actions

    job_actions.show_logs(job, node, follow, as_json)


@app.command(epilog=examples("cloudtrain job cancel mnli-2", "cloudtrain job cancel mnli-2 --wait"))
def cancel(
    job: JobId,
    wait: Annotated[bool, typer.Option("--wait", help="Until it is over.")] = False,
    as_json: Json = False,
) -> None:
    """End a job: it saves within its grace time, and what is left then is killed."""
    from hf_cloudtrain.cli import job_actions

    job_actions.cancel(job, wait, as_json)


@app.command(epilog=examples("cloudtrain job template > job.yml"))
def template(as_json: Json = False) -> None:
    """Print a job file to start from, with every key that there is."""
    if as_json:
        print_json({"template": TEMPLATE})
        return
    typer.echo(TEMPLATE, nl=False)


@app.command(epilog=examples("cloudtrain job schema > job.schema.json"))
def schema(
    as_json: Json = False,  # noqa: ARG001 - every command has the option, and this one prints nothing else
) -> None:
    """Print the JSON schema of job files, which editors complete and check them by."""
    from hf_cloudtrain.jobs.spec.job import Job

    print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **Job.model_json_schema()})
