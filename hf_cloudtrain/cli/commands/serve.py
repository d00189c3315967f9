"""`cloudtrain serve`: answer requests with the model of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_cloudtrain.cli.arguments import Best, CheckpointOrNewest, Json, RunArgument, chosen
from hf_cloudtrain.cli.output import print_json, say, transfer
from hf_cloudtrain.cli.runs import job_of, open_run
from hf_cloudtrain.errors import CloudTrainError, ManifestError, NoCheckpointError, StorageError

if TYPE_CHECKING:
    from hf_cloudtrain.checkpoints.catalog import Catalog
    from hf_cloudtrain.checkpoints.manifest import Manifest
    from hf_cloudtrain.serving.models.source import Model, Wish

TrustCode = Annotated[
    bool, typer.Option("--trust-code", help="Run code/inference.py of the checkpoint, on this machine.")
]
Processor = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Tokenizer or image processor, if the checkpoint has none: a folder, or a name on the Hub.",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Base model of an adapter: a folder, or a name on the Hub. Default: as the adapter says.",
    ),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task", metavar="TASK", help="Task of the pipeline. Default: by the architecture of the model."
    ),
]
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")]


def serve(
    run: RunArgument,
    checkpoint: CheckpointOrNewest = None,
    best: Best = False,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    base: Base = None,
    processor: Processor = None,
    task: TaskName = None,
    trust_code: TrustCode = False,
    max_body: Annotated[
        float, typer.Option(metavar="MB", min=0.001, help="Largest body of a request.")
    ] = 6.0,
    max_seconds: Annotated[
        float, typer.Option(metavar="S", min=0.1, help="Longest time of a request.")
    ] = 60.0,
    max_batch: Annotated[int, typer.Option(metavar="ROWS", min=1, help="Largest batch of the model.")] = 64,
    as_json: Json = False,
) -> None:
    """Serve the model of a checkpoint, of a run or in a local folder.

    POST /invocations takes JSON, JSON Lines and CSV as SageMaker's containers do; GET /ping and GET /metrics tell how the
    server is. SIGTERM or Ctrl-C stops it, after all requests are answered.
    """
    from hf_cloudtrain.report.page import check_extra_installed
    from hf_cloudtrain.runtime.listening import listen

    check_extra_installed("The server", "serve", "starlette", "uvicorn", "prometheus_client")
    from hf_cloudtrain.serving.app import Limits, Service
    from hf_cloudtrain.serving.models.loading import load
    from hf_cloudtrain.serving.models.source import Wish
    from hf_cloudtrain.serving.server import Server
    from hf_cloudtrain.serving.user_code import UserCode
    from hf_cloudtrain.tracking.exit_record import record_served

    with listen(host, port) as listening:
        model = found_model(run, checkpoint, best, Wish(trust_code, processor, base, task))
        limits = Limits(int(max_body * 2**20), max_seconds, max_batch)
        name = "code/inference.py" if model.task is None else model.task.name
        predictor = UserCode(model) if model.runs_code else load(model)
        service = Service(predictor, limits, {"model": model.title, "task": name}, host)
        url = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"

        def ready() -> None:
            record_served()
            if as_json:
                print_json({"url": url, "model": model.title, "task": name}, line=True)
            say(f"Serving {model.title} ({name}) at {url}. Stop it with Ctrl-C.")

        server = Server(service, limits, ready)
        server.run(sockets=[listening])
    if server.force_exit:
        say("Stopped at once, by the second signal. Requests that were under way got no answer.")
    elif server.was_cut_off:
        say("Stopped. The shutdown deadline passed; requests still in progress got no answer.")
    else:
        say("Stopped. Every accepted request was answered.")


def found_model(run: str, checkpoint: str | None, best: bool, wish: Wish) -> Model:
    """The model that a user names: in a local folder, or of a run, downloaded and verified."""
    from hf_cloudtrain.serving.models.source import is_model_folder, model_of_checkpoint, model_of_folder

    if is_model_folder(run):
        if checkpoint is not None or best:
            raise typer.BadParameter(
                f"{run!r} is a folder with one model. Leave out --checkpoint and --best."
            )
        return model_of_folder(Path(run), wish)
    catalog = open_run(run)
    manifest, trouble = _manifest(catalog, checkpoint, best, wish)
    with transfer(f"Downloading {manifest.folder}", manifest.size) as progress:
        model = model_of_checkpoint(catalog, manifest, wish, on_bytes=progress.add)
    if trouble:
        say(f"{trouble} Using the verified copy on this machine.")
    say(f"Verified {model.title}.")
    return model


def _manifest(
    catalog: Catalog, checkpoint: str | None, best: bool, wish: Wish
) -> tuple[Manifest, CloudTrainError | None]:
    """The manifest; and why it is that of the copy on this machine."""
    from hf_cloudtrain.serving.models.source import before, manifest_of_copy

    try:
        return chosen(catalog, checkpoint, best), None
    except (NoCheckpointError, StorageError) as error:
        copy = None if checkpoint is None else manifest_of_copy(catalog, checkpoint, wish)
        if copy is not None:
            return copy, error
        if isinstance(error, StorageError):
            raise
        job = None if catalog.checkpoints() else job_of(catalog.storage.url)
        if job is None:
            raise
        raise NoCheckpointError(
            f"Job {job.id} is {job.state}, and has no checkpoint yet. Watch it with `cloudtrain run watch {catalog.storage.url}`; its "
            f"log: `cloudtrain job logs -f {job.id}`."
        ) from None
    except ManifestError as error:
        keys = catalog.checkpoints()
        if checkpoint is not None:
            keys = [
                key for key in keys if checkpoint in (str(key), str(key.step)) or key.may_be_in(checkpoint)
            ]
        key = catalog.pointer("best") if best else keys[-1] if keys else None
        raise ManifestError(f"{error} {before(catalog, key)}") from None
