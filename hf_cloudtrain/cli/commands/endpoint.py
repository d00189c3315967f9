"""`cloudtrain endpoint`: models that are served until they are deleted, on this machine or by SageMaker."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_cloudtrain import env
from hf_cloudtrain.cli.arguments import Best, CheckpointOrNewest, DryRun, Json, RunArgument, Yes, examples
from hf_cloudtrain.cli.commands.serve import Base, Processor, TaskName, TrustCode, found_model
from hf_cloudtrain.cli.output import confirm, print_json, say, show_facts, show_table
from hf_cloudtrain.cli.tables import Columns
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError
from hf_cloudtrain.runtime.redaction import has_user_part
from hf_cloudtrain.runtime.text import time_text

if TYPE_CHECKING:
    from hf_cloudtrain.serving.endpoints.records import Endpoint, Endpoints, State

app = typer.Typer(
    help="Serve models until they are deleted: on this machine, or by SageMaker.",
    epilog=examples("endpoint create nsmc RUN --best"),
    no_args_is_help=True,
)
LISTED: Columns = {
    "endpoint": lambda record: record["name"],
    "state": lambda record: record["state"],
    "engine": lambda record: record["engine"],
    "model": lambda record: record["model"],
    "created": lambda record: time_text(record["created"]),
    "reason": lambda record: record["reason"],
}
SPARE = ("created", "engine", "model")
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the endpoint.")]
DRY_RUN = "Show the requests to SageMaker; start nothing."


@app.command(
    epilog=examples(
        "endpoint create nsmc RUN --best",
        "endpoint create nsmc RUN --engine sagemaker --role ARN --image URI --serverless-mb 3072",
    )
)
def create(
    name: Name,
    run: RunArgument,
    checkpoint: CheckpointOrNewest = None,
    best: Best = False,
    engine: Annotated[str, typer.Option(metavar="ENGINE", help="local or sagemaker.")] = "local",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="local: port to listen on. Default: a free one.")
    ] = None,
    role: Annotated[str, typer.Option(metavar="ARN", help="sagemaker: role that the endpoint assumes.")] = "",
    image: Annotated[
        str, typer.Option(metavar="URI", help="sagemaker: Hugging Face's inference container, in ECR.")
    ] = "",
    instance_type: Annotated[str, typer.Option(metavar="TYPE", help="sagemaker: machine.")] = "ml.m5.xlarge",
    instances: Annotated[int, typer.Option(min=1, metavar="N", help="sagemaker: number of machines.")] = 1,
    serverless_mb: Annotated[
        int | None,
        typer.Option(metavar="MB", help="sagemaker: memory of a serverless endpoint, instead of machines."),
    ] = None,
    base: Base = None,
    processor: Processor = None,
    task: TaskName = None,
    trust_code: TrustCode = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN)] = False,
    as_json: Json = False,
) -> None:
    """Serve the model of a checkpoint until it is deleted.

    Returns when the endpoint answers.
    """
    from hf_cloudtrain.jobs.engines.sagemaker.api import configured_region
    from hf_cloudtrain.serving.endpoints import sagemaker
    from hf_cloudtrain.serving.endpoints.local import absolute, create_local
    from hf_cloudtrain.serving.endpoints.records import Endpoint, Endpoints, State, check_name
    from hf_cloudtrain.serving.models.source import Wish

    if engine not in ("local", "sagemaker"):
        raise typer.BadParameter(f"--engine {engine!r} must be one of: local, sagemaker.")
    if engine == "local" and dry_run:
        raise typer.BadParameter("--dry-run shows the requests to SageMaker. Pass --engine sagemaker.")
    if engine == "local" and has_user_part(run):
        raise ConfigurationError(
            "RUN contains a user and a password, which the record of the endpoint would show. Set them in the storage's own "
            f"variables, or in {env.STORAGE_OPTIONS}."
        )
    endpoints = Endpoints()
    check_name(name)
    if not dry_run:
        endpoints.check_free(name)
    machine = sagemaker.Machine(role, image, instance_type, instances, serverless_mb)
    region = configured_region() if engine == "sagemaker" else None
    if engine == "sagemaker" and not dry_run:  # before a download that may take long
        sagemaker.check(machine, endpoints.jobs.url, region)
    model = found_model(run, checkpoint, best, Wish(trust_code, processor, base, task))
    if engine == "local":
        from hf_cloudtrain.jobs.engines.local import free_port

        # The checkpoint that was found: after a restart, the newest or the best may be a different one.
        folders = {"--base": base and absolute(base), "--processor": processor and absolute(processor)}
        given = {"--checkpoint": model.checkpoint, "--task": task, **folders}
        words = [model.run, *(["--trust-code"] if trust_code else [])]
        words += [word for option, value in given.items() if value for word in (option, value)]
        made = create_local(
            endpoints, Endpoint(name, "local", model.title, time.time()), words, port or free_port(), say
        )
    else:
        aws_name = name if dry_run else sagemaker.aws_name(name)
        asked = sagemaker.requests(aws_name, model, machine, sagemaker.data_url(endpoints, name))
        if dry_run:
            _show_requests(asked)
            return
        sagemaker.check(machine, endpoints.jobs.url, region, model)
        handle = {"region": region, "name": aws_name}
        with tempfile.TemporaryDirectory(prefix="cloudtrain-endpoint-") as work:
            packed = Path(work, sagemaker.ARCHIVE)
            sagemaker.archive(model, packed)
            endpoint = Endpoint(name, "sagemaker", model.title, time.time(), handle)
            made = sagemaker.create(endpoints, endpoint, asked, packed, say)
    say(f"The endpoint {name!r} serves {model.title}. Ask it with `cloudtrain endpoint invoke {name} BODY`.")
    _show(made, State("in service"), as_json)


@app.command("list", epilog=examples("endpoint list --json"))
def list_(as_json: Json = False) -> None:
    """List the endpoints of the store."""
    from hf_cloudtrain.serving.endpoints.records import Endpoints, State

    endpoints = Endpoints()
    records = []
    for name in endpoints.names():
        endpoint: Endpoint | None = None
        try:
            endpoint = endpoints.read(name)
            state = _state(endpoints, endpoint)
        except CloudTrainError as error:
            if endpoint is None and isinstance(error, ConfigurationError):
                continue  # deleted meanwhile
            state = State("unknown", str(error))
        records.append(_record(name, endpoint, state))
    if as_json:
        print_json({"store": endpoints.jobs.url, "endpoints": records})
    elif records:
        show_table(LISTED, records, spare=SPARE, prose="reason")
    else:
        say(f"There is no endpoint in {endpoints.jobs.url!r}.")


@app.command(epilog=examples("endpoint view nsmc"))
def view(name: Name, as_json: Json = False) -> None:
    """Show how an endpoint is, and where its log is."""
    from hf_cloudtrain.serving.endpoints.records import Endpoints

    endpoints = Endpoints()
    endpoint = endpoints.read(name)
    _show(endpoint, _state(endpoints, endpoint), as_json)


@app.command(
    epilog=examples(
        'endpoint invoke nsmc \'{"inputs": "a good film"}\'',
        "endpoint invoke nsmc @rows.csv --type text/csv",
    )
)
def invoke(
    name: Name,
    body: Annotated[str, typer.Argument(metavar="BODY", help="The request, @FILE with it, or - for stdin.")],
    kind: Annotated[
        str, typer.Option("--type", metavar="TYPE", help="Type of the request.")
    ] = "application/json",
    accept: Annotated[str, typer.Option(metavar="TYPE", help="Type of the answer.")] = "application/json",
    as_json: Json = False,
) -> None:
    """Send one request to an endpoint and print the answer."""
    from hf_cloudtrain.serving.endpoints import sagemaker
    from hf_cloudtrain.serving.endpoints.local import invoke_local
    from hf_cloudtrain.serving.endpoints.records import Endpoints

    endpoints = Endpoints()
    endpoint = endpoints.read(name)
    data = (
        sys.stdin.buffer.read() if body == "-" else _file(body[1:]) if body.startswith("@") else body.encode()
    )
    if endpoint.engine == "local":
        answer = invoke_local(endpoints, endpoint, data, kind, accept)
    else:
        answer = sagemaker.invoke(endpoint, data, kind, accept)
    text = answer.decode(errors="replace")
    if as_json:
        print_json({"endpoint": name, "answer": text})
    else:
        typer.echo(text.rstrip("\n"))


@app.command(epilog=examples("endpoint delete nsmc", "endpoint delete nsmc --yes"))
def delete(name: Name, dry_run: DryRun = False, yes: Yes = False, as_json: Json = False) -> None:
    """Delete an endpoint and all that was made for it. The run and its checkpoints stay."""
    from hf_cloudtrain.serving.endpoints import sagemaker
    from hf_cloudtrain.serving.endpoints.local import delete_local
    from hf_cloudtrain.serving.endpoints.records import Endpoints

    endpoints = Endpoints()
    endpoint = endpoints.read(name)
    if dry_run:
        say(f"Dry run: the endpoint {name!r} ({endpoint.model}) would be deleted.")
    else:
        confirm(f"Delete the endpoint {name!r} ({endpoint.model})?", yes)
        (delete_local if endpoint.engine == "local" else sagemaker.delete)(endpoints, endpoint)
        say(f"Deleted the endpoint {name!r}.")
    if as_json:
        print_json({"endpoint": name, "engine": endpoint.engine, "dry_run": dry_run})


def _file(path: str) -> bytes:
    return Path(path).read_bytes()


def _state(endpoints: Endpoints, endpoint: Endpoint) -> State:
    from hf_cloudtrain.serving.endpoints import sagemaker
    from hf_cloudtrain.serving.endpoints.local import look_local

    return look_local(endpoints, endpoint) if endpoint.engine == "local" else sagemaker.look(endpoint)


def _record(name: str, endpoint: Endpoint | None, state: State) -> dict[str, Any]:
    """What is shown of an endpoint; None: its record is damaged."""
    facts = {field: getattr(endpoint, field, None) for field in ("engine", "model", "created", "handle")}
    return {"name": name, "state": state.word, "reason": state.reason, **facts}


def _show(endpoint: Endpoint, state: State, as_json: bool) -> None:
    record = _record(endpoint.name, endpoint, state)
    if as_json:
        print_json(record)
        return
    handle = record.pop("handle")
    log = f"cloudtrain job logs -f {handle['job']}" if "job" in handle else None
    show_facts({**record, "created": time_text(endpoint.created), **handle, "log": log})


def _show_requests(asked: dict[str, dict[str, Any]]) -> None:
    from hf_cloudtrain.jobs.engines.protocol import as_text

    typer.echo(as_text(asked).rstrip("\n"))
