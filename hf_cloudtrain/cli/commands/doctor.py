"""`cloudtrain doctor`: check a storage, and name the command that mends what is wrong."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_cloudtrain.cli.arguments import Json, RunUrl
from hf_cloudtrain.cli.output import print_json, say, show_table
from hf_cloudtrain.cli.tables import Columns
from hf_cloudtrain.runtime.text import clean

SHOWN: Columns = {
    "check": lambda line: line.check,
    "state": lambda line: line.state,
    "found": lambda line: line.found,
}


def doctor(
    url: RunUrl,
    gigabytes: Annotated[
        float, typer.Option("--gb", metavar="N", min=0.001, help="Size of a checkpoint, for time and cost.")
    ] = 10.0,
    as_json: Json = False,
) -> None:
    """Check credentials, bucket, permissions, speed, clock and disk.

    Each line is ok, or says what mends it. At most 73 MB are uploaded, and deleted again.
    """
    from hf_cloudtrain.cli.checkup import FAILED, Doctor, record

    patient = Doctor(url, int(gigabytes * 1e9))
    if not as_json:
        say(f"Checking {patient.storage.url!r}; a server that does not answer takes half a minute.")
    lines = list(patient.lines())
    if as_json:
        print_json(record(patient.storage, lines))
    else:
        show_table(SHOWN, lines, prose="found")
        for line in (line for line in lines if line.mend is not None):
            say(f"{line.check}: {line.error}")
            typer.echo(clean(f"{line.check}: {line.mend}"))
    if any(line.state == FAILED for line in lines):
        raise typer.Exit(1)
