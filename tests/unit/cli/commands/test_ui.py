"""The door of `cloudtrain ui`: what it prints, and what it says where it cannot start."""

from __future__ import annotations

import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from hf_cloudtrain.cli import app
from hf_cloudtrain.ui import app as ui

CLOUDTRAIN = [sys.executable, "-m", "hf_cloudtrain.cli"]


def failure(*words: str) -> str:
    result = CliRunner().invoke(app, ["ui", *words], catch_exceptions=False)
    assert result.exit_code == 1
    assert result.stdout == ""
    return result.stderr


@pytest.mark.parametrize("actions", [False, True])
def test_it_prints_its_address_answers_and_ends_at_ctrl_c(tmp_path: Path, actions: bool) -> None:
    command = [*CLOUDTRAIN, "ui", "--port", "0", *(["--actions"] if actions else [])]
    environment = {**os.environ, "HF_CLOUDTRAIN_STORE": str(tmp_path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout
        address, _, fragment = process.stdout.readline().strip().partition("#")
        assert address.startswith("http://127.0.0.1:")
        assert address.endswith("/")
        assert fragment.startswith("token=") is actions
        connection = http.client.HTTPConnection(address.split("/")[2], timeout=20)
        connection.request("GET", "/api/stream/runs")
        answer = connection.getresponse()
        assert json.loads(answer.readline()[6:])["document"] == {"loading": True, "trouble": None}
        process.send_signal(signal.SIGINT)  # with a page open
        _, errors = process.communicate(timeout=20)
        connection.close()
    assert errors == "Open this page in a browser. Ctrl-C ends it.\nInterrupted.\n"
    assert process.returncode == 130


def test_the_level_of_messages_is_that_of_before_when_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger, levels = logging.getLogger("hf_cloudtrain"), []
    caplog.set_level(logging.INFO, logger.name)
    ended = {"run": lambda self, sockets: levels.append(logger.level)}
    monkeypatch.setattr(ui, "WebServer", lambda _: type("Ended", (), ended)())
    CliRunner().invoke(app, ["ui", str(tmp_path), "--port", "0"], catch_exceptions=False)
    assert [*levels, logger.level] == [logging.ERROR, logging.INFO]


def test_json_names_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path))
    monkeypatch.setenv("HF_CLOUDTRAIN_UI_TOKEN", "a-token-of-24-characters")
    monkeypatch.setattr(ui, "WebServer", lambda _: type("Ended", (), {"run": lambda self, sockets: None})())
    result = CliRunner().invoke(app, ["ui", "--port", "0", "--json"], catch_exceptions=False)
    found = json.loads(result.stdout)
    assert found.pop("url").startswith("http://127.0.0.1:")
    assert found == {"needs_token": True, "actions": False}
    assert "a-token" not in result.output


def test_where_other_machines_reach_the_page_reading_needs_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[ui.Server] = []
    monkeypatch.setattr(
        ui,
        "WebServer",
        lambda server: asked.append(server) or type("Ended", (), {"run": lambda self, sockets: None})(),
    )
    words = ["ui", str(tmp_path), "--host", "0.0.0.0", "--port", "0", "--json"]
    found = json.loads(CliRunner().invoke(app, words, catch_exceptions=False).stdout)
    address, _, token = found["url"].partition("#token=")
    assert (address[:15], found["needs_token"]) == ("http://0.0.0.0:", True)
    (server,) = asked
    client = TestClient(server.app, base_url="http://10.0.0.7")
    assert client.get("/api/details?id=0/x").status_code == 401
    headers = {"Authorization": f"Bearer {token}"}
    assert client.get("/api/details?id=0/x", headers=headers).status_code == 404


def test_a_port_that_is_taken_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert failure("--port", str(port)) == (
            f"Error: Cannot listen on '127.0.0.1', port {port}: a different program has it. Choose a different port with --port, "
            "or any free one with --port 0.\n"
        )


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--host", "no.such.name.invalid"], "Cannot listen on 'no.such.name.invalid', port 8620: "),
        (["s4://bucket/runs"], "'s4://'"),
    ],
)
def test_what_cannot_work_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], text: str
) -> None:
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path))
    assert text in failure(*words)


def test_a_short_token_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path))
    monkeypatch.setenv("HF_CLOUDTRAIN_UI_TOKEN", "short")
    assert failure() == "Error: The token has 5 characters. It needs at least 16.\n"


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "starlette", None)
    assert failure() == (
        "Error: The web page needs packages that are not installed (starlette). Run: pip install 'hf_cloudtrain[ui]'\n"
    )
