"""`cloudtrain job`: what a job file looks like."""

from __future__ import annotations

import typer

from hf_cloudtrain.cli._arguments import Json, examples
from hf_cloudtrain.cli._output import print_json

app = typer.Typer(
    help="Jobs: what runs, where, and how it is doing.",
    epilog=examples("cloudtrain job template > job.yml"),
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
    from hf_cloudtrain.job import Job

    print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **Job.model_json_schema()})
