"""`cloudtrain ui`: serve a live web page about runs, jobs and datasets."""

from __future__ import annotations

import logging
import secrets
import sys
from typing import Annotated

import typer

from hf_cloudtrain import env
from hf_cloudtrain.cli.arguments import Json
from hf_cloudtrain.cli.output import messages_hidden, print_json, say
from hf_cloudtrain.cli.runs import runs_url, url_of


def ui(
    urls: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[URL]...", help="Runs, or URLs with runs below them. Default: the runs of the store."
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            "--host", help="Address to listen on. If other machines reach it, reading needs a token."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 for any free one.")] = 8620,
    actions: Annotated[
        bool, typer.Option("--actions", help="Allow to stop, pin, prune and cancel, with a token.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show runs, jobs and datasets live in a browser.

    The page reads storage, so it shows the runs of all machines. Ctrl-C ends it.
    """
    from hf_cloudtrain.report.page import check_extra_installed
    from hf_cloudtrain.runtime.listening import is_loopback, listen

    check_extra_installed("The web page", "ui", "starlette", "uvicorn", "plotly")
    from hf_cloudtrain.ui import app

    own = env.ui_token()
    reading = own is not None or not is_loopback(host)
    token = own or secrets.token_urlsafe(24) if reading or actions else None
    pages = app.Pages([url_of(url) for url in urls] if urls else [runs_url()])
    server = app.Server(pages, host, token, reading=reading, may_act=actions)
    with (
        messages_hidden(below=logging.ERROR),
        listen(host, port) as listening,
    ):  # pages show damaged records
        name = f"[{host}]" if ":" in host else host
        address = f"http://{name}:{listening.getsockname()[1]}/"
        if token is not None and own is None:
            address += f"#token={token}"
        if as_json:
            print_json({"url": address, "needs_token": reading, "actions": actions}, line=True)
        else:
            say("Open this page in a browser. Ctrl-C ends it.")
            if own is not None:
                say(f"It asks for the token in {env.UI_TOKEN}.")
            typer.echo(address)
        sys.stdout.flush()
        app.WebServer(server).run(sockets=[listening])
