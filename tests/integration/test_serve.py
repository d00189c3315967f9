"""`cloudtrain serve` in a process of its own: what clients get, and what becomes of them in trouble."""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny_models
from tests.integration._serve import Served, committed, read
from tests.integration._zygote import Zygote
from tests.unit.cli.terminal import Run, damage, process, sentence


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("served")
    run = Run(folder / "run", folder / "out")
    run.begin()
    committed(run, 4)
    committed(run, 8)
    return run


@pytest.fixture(scope="module")
def shared(zygote: Zygote, checkpoints: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server for all tests that leave it as it was."""
    cache = {"HF_CLOUDTRAIN_CACHE": str(tmp_path_factory.mktemp("cache"))}
    server = Served(zygote, checkpoints.url, env=cache)
    yield server
    server.child.kill()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_CLOUDTRAIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def served(zygote: Zygote, checkpoints: Run) -> Iterator[Served]:
    server = Served(zygote, checkpoints.url)
    yield server
    server.child.kill()


class TestDoor:
    def test_a_checkpoint_is_served_and_stopped(self, served: Served, checkpoints: Run) -> None:
        assert served.get("/ping") == (200, "ok\n")
        status, answer = served.ask({"inputs": ["a good film", "bad"]})
        assert status == 200
        assert [set(row) for row in answer] == [{"label", "score"}] * 2
        assert served.stop().splitlines() == [
            f"Verified checkpoint-8 of {checkpoints.url!r}.",
            (
                f"Serving checkpoint-8 of {checkpoints.url!r} (text-classification) at http://127.0.0.1:{served.port}. Stop it "
                "with Ctrl-C."
            ),
            "Stopped. Every accepted request was answered.",
        ]

    def test_a_chosen_checkpoint_and_a_folder(self, zygote: Zygote, checkpoints: Run, tmp_path: Path) -> None:
        for words in ([checkpoints.url, "-c", "4"], [str(checkpoints.folder / "checkpoint-4")]):
            server = Served(zygote, *words)
            assert server.ask({"inputs": "a"})[0] == 200
            assert "Serving checkpoint-4 of" in server.stop() or words[0].endswith("checkpoint-4")

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["--task", "text-clasification"], "must be one of: text-classification, "),
            (["-c", "5"], "No checkpoint '5' in"),
            (["--trust-code"], "has no code/inference.py"),
            (["--best"], "records no best checkpoint"),
            (["--host", "256.1.1.1"], "Cannot listen on '256.1.1.1'"),
        ],
    )
    def test_a_mistyped_value_is_named(self, checkpoints: Run, words: list[str], expected: str) -> None:
        assert expected in sentence("serve", checkpoints.url, "--port", "0", *words)

    def test_a_port_that_is_taken_is_named_before_anything_is_downloaded(self, checkpoints: Run) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            text = sentence("serve", checkpoints.url, "--port", str(port))
        assert text == (
            f"Error: Cannot listen on '127.0.0.1', port {port}: a different program has it. Choose a different port with --port, "
            "or any free one with --port 0.\n"
        )

    def test_help_shows_the_command_of_the_docs(self) -> None:
        assert "cloudtrain serve s3://bucket/runs/mrpc --best" in process("serve", "--help").stdout

    def test_the_code_of_a_checkpoint_runs_only_if_it_is_trusted(
        self, zygote: Zygote, tmp_path: Path
    ) -> None:
        run = Run(tmp_path / "run", tmp_path / "out")
        run.begin()
        code = (
            b"import pathlib\npathlib.Path(__file__).parents[1]\n"
            b"def model_fn(folder):\n    return 2\n"
            b"def predict_fn(data, model):\n    return data / 0 if data == 0 else data * model\n"
        )
        committed(run, 4, **{"code/inference.py": code})
        plain = Served(zygote, run.url)
        assert "label" in plain.ask({"inputs": "a"})[1][0]
        plain.stop()
        trusted = Served(zygote, run.url, "--trust-code")
        assert trusted.ask(21) == (200, 42)
        status, answer = trusted.ask(0)
        assert (status, answer["error"]) == (
            500,
            "The code of the checkpoint failed. ZeroDivisionError: division by zero",
        )
        assert trusted.ask(b"{") == (
            400,
            {
                "error": "The body is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)."
            },
        )
        assert "(code/inference.py)" in trusted.stop()


class TestAnswers:
    def test_each_type(self, shared: Served) -> None:
        _, (first, second) = shared.ask({"inputs": ["good", "bad"]})
        lines = shared.ask(
            b'{"inputs": "good"}\n"bad"\n', "application/jsonlines", accept="application/jsonlines"
        )
        assert [json.loads(line)["label"] for line in lines[1].splitlines()] == [
            first["label"],
            second["label"],
        ]
        table = shared.ask(b"inputs\ngood\nbad\n", "text/csv", accept="text/csv")[1].splitlines()
        assert table[0] == "label,score,error"
        assert [row.split(",")[0] for row in table[1:]] == [first["label"], second["label"]]
        assert shared.ask(b'{"inputs": "good"}', "application/x-www-form-urlencoded")[0] == 200  # curl -d

    def test_a_bad_row_does_not_fail_the_others(self, shared: Served) -> None:
        status, (first, second, third) = shared.ask({"inputs": ["good", 7, "bad"]})
        assert (status, second) == (200, {"error": "An input must be a text, not 7."})
        assert set(first) == set(third) == {"label", "score"}

    @pytest.mark.parametrize(
        ("body", "kind", "status", "text"),
        [
            (b"{", "application/json", 400, "The body is not JSON"),
            (b'{"inputs": [7]}', "application/json", 400, "An input must be a text"),
            (
                b'{"inputs": "a", "parameters": {"topk": 1}}',
                "application/json",
                400,
                "Unknown parameter",
            ),
            (b"\xff\xfe", "text/csv", 400, "not UTF-8"),
            (b"a", "application/x-npy", 415, "is not read. Send one of"),
            (b"a", "text/csv; charset=latin-1", 415, "Send UTF-8"),
        ],
    )
    def test_a_wrong_request_says_what_is_wrong(
        self, shared: Served, body: bytes, kind: str, status: int, text: str
    ) -> None:
        found, answer = shared.ask(body, kind)
        assert (found, text in answer["error"]) == (status, True)

    def test_metrics(self, served: Served) -> None:
        served.ask({"inputs": ["good", 7]})
        lines = served.get("/metrics")[1].splitlines()
        assert 'cloudtrain_serve_requests_total{code="200"} 1.0' in lines
        assert 'cloudtrain_serve_rows_total{outcome="failed"} 1.0' in lines
        assert any('task="text-classification"' in line for line in lines)


class TestClients:
    def test_a_body_of_100_mb_is_refused_and_the_next_request_answered(self, shared: Served) -> None:
        status, answer = shared.ask(b'{"inputs": "' + b"a" * 100_000_000 + b'"}')
        assert (status, answer) == (
            413,
            {"error": "The body is larger than the 6291456 bytes that are read."},
        )
        assert shared.ask({"inputs": "good"})[0] == 200

    def test_a_page_of_a_different_site_gets_no_answer(self, shared: Served) -> None:
        """DNS may lead any name to this machine, and a page may send a form to any address."""
        status, answer = shared.ask({"inputs": "good"}, host="evil.example")
        assert (status, "'evil.example' is not this server's" in answer["error"]) == (403, True)
        status, answer = shared.ask(b'{"inputs": "good"}', "text/plain", origin="https://evil.example")
        assert (status, "origin 'https://evil.example'" in answer["error"]) == (403, True)
        assert shared.ask({"inputs": "good"}, host=f"localhost:{shared.port}")[0] == 200

    def test_a_request_of_too_many_rows_is_refused(self, shared: Served) -> None:
        status, answer = shared.ask([1] * 1_000_000)
        assert (status, answer) == (
            413,
            {"error": "The request has more than the 10,000 rows that are read."},
        )

    def test_clients_that_hang_do_not_hold_up_the_others(self, zygote: Zygote, checkpoints: Run) -> None:
        served = Served(zygote, checkpoints.url, "--max-seconds", "1")
        silent, half_head, half_body = (
            socket.create_connection(("127.0.0.1", served.port)) for _ in range(3)
        )
        half_head.sendall(b"POST /invocations HTTP/1.1\r\nhost: localhost\r\ncontent-")
        half_body.sendall(b"POST /invocations HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
        assert served.ask({"inputs": "good"})[0] == 200
        half_body.settimeout(30)
        assert b"408" in half_body.recv(100)
        served.stop()  # although two connections are open
        for connection in (silent, half_head, half_body):
            connection.close()

    def test_a_client_that_goes_away_is_forgotten(self, shared: Served) -> None:
        with socket.create_connection(("127.0.0.1", shared.port)) as connection:
            body = json.dumps({"inputs": ["good"] * 5000}).encode()
            connection.sendall(
                b"POST /invocations HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%s"
                % (len(body), body)
            )
        deadline = time.monotonic() + 60
        while 'code="499"' not in shared.get("/metrics")[1]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert "cloudtrain_serve_waiting_rows 0.0\n" in shared.get("/metrics")[1]
        assert shared.ask({"inputs": "good"})[0] == 200

    def test_the_bodies_of_all_requests_have_a_limit(self, zygote: Zygote, checkpoints: Run) -> None:
        served = Served(zygote, checkpoints.url, "--max-body", "256", "--max-seconds", "30")
        body = b'{"inputs": "good"' + b" " * 200_000_000 + b"}"
        with contextlib.closing(served.connect()) as slow:
            slow.putrequest("POST", "/invocations")
            slow.putheader("content-length", str(len(body)))
            slow.endheaders()
            slow.send(body[:-1])
            assert served.ask(b'{"inputs": "good"}')[0] == 200
            status, answer = served.ask(body)
            assert (status, answer["error"]) == (
                503,
                "Too many request bodies are waiting (limit 256 MB). Try again later.",
            )
            slow.send(body[-1:])
            assert read(slow)[0] == 200
        assert served.ask(body)[0] == 200
        served.stop()

    def test_a_request_that_takes_too_long_is_given_up(self, zygote: Zygote, tmp_path: Path) -> None:
        run = Run(tmp_path / "run", tmp_path / "out")
        run.begin()
        code = b"import time\ndef model_fn(folder): ...\ndef predict_fn(data, model):\n    time.sleep(data)\n    return data\n"
        committed(run, 4, **{"code/inference.py": code})
        served = Served(zygote, run.url, "--trust-code", "--max-seconds", "0.5")
        assert served.ask(3) == (504, {"error": "The model did not answer within the time of a request."})
        served.child.kill()


class TestEnd:
    def test_no_request_is_lost_at_sigterm(self, served: Served) -> None:
        """64 clients on connections that stay open; each sent request is answered, and then none can connect."""
        outcomes: collections.Counter[str] = collections.Counter()

        def client() -> None:
            connection = served.connect()
            while True:
                try:
                    connection.connect()
                except ConnectionRefusedError:
                    outcomes["closed"] += 1
                    return
                while connection.sock is not None:
                    try:
                        connection.request("POST", "/invocations", b'{"inputs": "a good film"}')
                        status, _ = read(connection)
                    except (OSError, http.client.HTTPException) as error:
                        outcomes[f"lost: {error!r}"] += 1
                        return
                    outcomes[str(status)] += 1

        threads = [threading.Thread(target=client) for _ in range(64)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while outcomes["200"] < 200:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        served.terminate()
        for thread in threads:
            thread.join(60)
        assert served.child.wait() == 0
        assert set(outcomes) == {"200", "closed"}, outcomes
        assert outcomes["closed"] == 64

    def test_ping_says_that_the_server_stops(self, served: Served) -> None:
        with contextlib.closing(served.connect()) as connection:
            connection.request("GET", "/ping")
            assert read(connection) == (200, "ok\n")
            served.terminate()
            deadline = time.monotonic() + 30
            status = 200
            while status == 200:
                assert time.monotonic() < deadline
                connection.request("GET", "/ping")
                answer = connection.getresponse()
                status, text = answer.status, answer.read()
        assert (status, text, answer.getheader("connection")) == (503, b"stopping\n", "close")
        assert served.child.wait() == 0

    def test_a_second_signal_ends_code_that_hangs(self, zygote: Zygote, tmp_path: Path) -> None:
        run = Run(tmp_path / "run", tmp_path / "out")
        run.begin()
        marks = f"open({str(tmp_path / 'runs')!r}, 'w').close()"
        code = f"import time\ndef model_fn(folder): ...\ndef predict_fn(data, model):\n    {marks}\n    time.sleep(600)\n"
        committed(run, 4, **{"code/inference.py": code.encode()})
        served = Served(zygote, run.url, "--trust-code")
        with contextlib.closing(served.connect()) as connection:
            connection.request("POST", "/invocations", b"1")
            deadline = time.monotonic() + 60
            while not (tmp_path / "runs").exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            served.terminate()
            time.sleep(0.5)  # two signals at once are one
            assert served.child.poll() is None
            served.terminate()
            assert served.child.wait() == 0
        assert "Stopped at once, by the second signal. Requests" in served.child.log


class TestRun:
    def test_a_run_that_is_deleted_while_it_is_served(self, zygote: Zygote, tmp_path: Path) -> None:
        run = Run(tmp_path / "run", tmp_path / "out")
        run.begin()
        committed(run, 4)
        served = Served(zygote, run.url)
        shutil.rmtree(run.folder)
        assert served.ask({"inputs": "good"})[0] == 200
        served.stop()

    def test_a_damaged_checkpoint_is_not_served_and_the_one_before_is_offered(
        self, zygote: Zygote, tmp_path: Path
    ) -> None:
        run = Run(tmp_path / "run", tmp_path / "out")
        run.begin()
        committed(run, 4)
        committed(run, 8)
        damage(run.folder / "checkpoint-8" / "model.safetensors")
        text = sentence("serve", run.url, "--port", "0")
        assert "'model.safetensors' of checkpoint-8 differs from the digest" in text
        offered = text.rpartition("pass -c ")[2].strip(".\n")
        served = Served(zygote, run.url, "-c", offered)
        assert "Serving checkpoint-4 of" in served.stop()

    def test_a_folder_that_was_saved_by_name(self, zygote: Zygote, tmp_path: Path) -> None:
        run = Run(tmp_path / "run", tmp_path / "out")
        run.begin()
        run.save(1, 4, tiny_models.files("BertForTokenClassification"), name="final")
        served = Served(zygote, run.url, "-c", "final")
        assert [token["word"] for token in served.ask({"inputs": "good film"})[1][0]] == ["good", "film"]
        assert "Serving final of" in served.stop()

    def test_without_the_extra_the_command_to_install_it_is_named(
        self, zygote: Zygote, checkpoints: Run, tmp_path: Path
    ) -> None:
        hidden = "import importlib.util as found\nfind = found.find_spec\n"
        hidden += "found.find_spec = lambda name, *more: None if name == 'prometheus_client' else find(name, *more)\n"
        (tmp_path / "sitecustomize.py").write_text(hidden)
        ended = process("serve", checkpoints.url, PYTHONPATH=str(tmp_path))
        assert (
            "The server needs packages that are not installed (prometheus_client). Run: pip install 'hf_cloudtrain[serve]'"
            in ended.stderr
        )
