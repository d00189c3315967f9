"""`cloudtrain vm`: machines that a job can have."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from hf_cloudtrain.cli.arguments import Json, examples
from hf_cloudtrain.cli.output import print_json, say, show_table

app = typer.Typer(
    help="Machines for jobs: this one, Slurm's, your own, and those of clouds.",
    epilog=examples("cloudtrain vm list"),
    no_args_is_help=True,
)


@app.callback()
def _group() -> None:
    """Machines for jobs: this one, Slurm's, your own, and those of clouds."""


@app.command("list", epilog=examples("cloudtrain vm list", "cloudtrain vm list --cloud azure --gpu v100"))
def list_(
    cloud: Annotated[
        str | None,
        typer.Option(
            "--cloud", metavar="NAME", show_default=False, help="Only this one, such as azure or slurm."
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", metavar="NAME", show_default=False, help="Only GPUs whose name begins so, such as v100."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the machines that a job can have. The first column is what a job file calls `vm`.

    Asked are this machine, `sinfo` of Slurm, vms.yml in the store, and the catalog of SkyPilot, where there are such.
    """
    from hf_cloudtrain.jobs.inventory import find

    found = find(cloud, gpu)
    for problem in found.problems:
        say(f"Warning: {problem}")
    if as_json:
        print_json(
            {
                "vms": [{"vm": vm.vm, "device": vm.device, **dataclasses.asdict(vm)} for vm in found.vms],
                "problems": [*found.problems, *found.mistakes],
                "left_out": found.omitted,
            }
        )
    elif found.vms:
        show_table(
            ("VM", "Cloud", "Region", "Device", "Quota", "Spot"),
            [
                (vm.vm, vm.cloud, vm.region, vm.device, vm.quota, "yes" if vm.is_spot else "no")
                for vm in found.vms
            ],
        )
    else:
        say("There is no such machine.")
    if found.omitted:
        say(f"{found.omitted} more of SkyPilot's catalog are not shown: name a --cloud or a --gpu.")
    if found.mistakes:
        for mistake in found.mistakes:
            say(mistake)
        raise typer.Exit(1)
