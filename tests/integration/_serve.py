"""A server in a process of its own, and clients of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests import tiny_models
from tests.integration._zygote import Child, Zygote
from tests.unit.cli.terminal import Run

PATIENCE = 60.0
MODULE = __name__


def command(words: list[str]) -> None:
    """Run `cloudtrain` as a user would type it; called in the child."""
    from hf_cloudtrain.cli import main

    sys.argv = ["cloudtrain", *words]
    main()


class Served:
    """`cloudtrain serve` of some words, ready to answer."""

    def __init__(self, zygote: Zygote, *words: str, env: dict[str, str] | None = None) -> None:
        self.child: Child = zygote.start(
            MODULE, "command", words=["serve", *words, "--port", "0"], env=env or {}
        )
        deadline = time.monotonic() + PATIENCE
        while not (found := re.search(r" at http://127\.0\.0\.1:(\d+)\.", self.child.log)):
            assert self.child.poll() is None, self.child.log
            assert time.monotonic() < deadline, self.child.log
            time.sleep(0.02)
        self.port = int(found[1])

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def ask(
        self,
        body: Any,
        kind: str = "application/json",
        path: str = "/invocations",
        method: str = "POST",
        **headers: str,
    ) -> tuple[int, Any]:
        """The status and the body of an answer; JSON is parsed."""
        data = (
            json.dumps(body).encode() if kind == "application/json" and not isinstance(body, bytes) else body
        )
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, data, {"content-type": kind, **headers})
            return read(connection)

    def get(self, path: str) -> tuple[int, Any]:
        return self.ask(None, "", path, "GET")

    def terminate(self) -> None:
        os.kill(self.child.pid, signal.SIGTERM)

    def stop(self) -> str:
        """SIGTERM, and what it has said."""
        if self.child.poll() is None:
            self.terminate()
        code = self.child.wait()
        assert code == 0, self.child.log
        return self.child.log


def read(connection: http.client.HTTPConnection) -> tuple[int, Any]:
    answer = connection.getresponse()
    body = answer.read()
    if answer.getheader("content-type") == "application/json":
        return answer.status, json.loads(body)
    return answer.status, body.decode()


def committed(run: Run, step: int, kind: str = "BertForSequenceClassification", **more: bytes) -> None:
    """Commit a checkpoint with a tiny model, and what a Trainer writes beside it."""
    beside = {"optimizer.pt": b"pickle", "training_args.bin": b"pickle", "trainer_state.json": b"{}"}
    run.save(1, step, {**beside, **tiny_models.files(kind), **more})


def folder_with(folder: Path, files: dict[str, bytes], leave_out: Iterable[str] = ()) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        if name not in leave_out:
            (folder / name).write_bytes(data)
    return folder
