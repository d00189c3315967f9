"""`cloudtrain vm`: list the machines that jobs can run on."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from hf_cloudtrain.cli.arguments import Json, examples
from hf_cloudtrain.cli.output import print_json, say
from hf_cloudtrain.cli.panels import show_framed
from hf_cloudtrain.cli.tables import Columns

if TYPE_CHECKING:
    from hf_cloudtrain.jobs.inventory import Vm

HELP = "List machines that jobs can run on."

app = typer.Typer(help=HELP, epilog=examples("vm list"), no_args_is_help=True)


def _device(vm: Vm) -> str:
    """The GPU, if the name of the machine says the rest."""
    if vm.vm is not None:
        return str(vm.gpu).upper()
    return f"{vm.device}, spot" if vm.is_spot else vm.device


LISTED: Columns = {
    "VM": lambda vm: vm.vm,
    "Cloud": lambda vm: vm.cloud,
    "Region": lambda vm: vm.region,
    "Device": _device,
    "Quota": lambda vm: vm.quota,
}
PRICE: Columns = {">Price/h": lambda vm: None if vm.price is None else f"{vm.price:,.2f}"}
"""Hourly price of one machine, if the source lists prices; SkyPilot's are in US dollars."""


@app.callback(help=HELP)
def _group() -> None:
    """With a callback, typer keeps `list` although it is the only command of the group."""


@app.command("list", epilog=examples("vm list", "vm list --cloud azure --gpu v100"))
def list_(
    cloud: Annotated[
        str | None, typer.Option("--cloud", metavar="NAME", help="Only this cloud, such as azure or slurm.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="NAME", help="Only GPUs whose name starts with NAME, such as v100."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List machines that jobs can run on.

    The first column is `vm` in a job file. Sources are this machine, `sinfo` of Slurm, vms.yml in the store, and the catalog of SkyPilot.
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
        columns = {**LISTED, **PRICE} if any(vm.price for vm in found.vms) else LISTED
        show_framed(columns, found.vms, spare=["Cloud", "Region", "Quota"])
    else:
        say("No machine matches.")
    if found.omitted:
        say(
            f"{found.omitted} more of SkyPilot's catalog are not shown. Narrow the list with --cloud or --gpu."
        )
    for mistake in found.mistakes:
        say(mistake)
    if found.mistakes:
        raise typer.Exit(1)
