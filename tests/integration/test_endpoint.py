"""`cloudtrain endpoint` on this machine, and what SageMaker's container would find in the archive."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from hf_cloudtrain.jobs.records import JobStore
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.serving.endpoints import sagemaker
from hf_cloudtrain.serving.models.source import Wish, model_of_checkpoint
from tests import tiny_models
from tests.integration._jobs import Desk
from tests.integration._serve import Served, committed, folder_with
from tests.integration._zygote import Zygote
from tests.unit.cli.terminal import Run, answer, cloudtrain


@pytest.fixture
def store(desk: Desk) -> Iterator[Desk]:
    """Whose endpoints end with the test."""
    yield desk
    for endpoint in answer("endpoint", "list")["endpoints"]:
        cloudtrain("endpoint", "delete", endpoint["name"], "--yes")


def wait_until(is_so: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def servers(port: str) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.info["cmdline"]
        and process.info["cmdline"][-2:] == ["--port", port]
        and "bash" not in process.info["cmdline"][0]
    ]


class TestLocal:
    def test_is_restarted_after_each_crash_with_its_checkpoint_and_deleted_without_a_trace(
        self, store: Desk, tmp_path: Path
    ) -> None:
        run = Run(tmp_path / "run", tmp_path / "out")
        run.begin()
        committed(run, 4)
        made = answer("endpoint", "create", "nsmc", run.url)
        assert made["state"] == "in service"
        wait_until(lambda: answer("job", "list")["jobs"][0]["state"] == "running")
        committed(run, 8)
        port = made["handle"]["url"].rpartition(":")[2]
        asked = cloudtrain("endpoint", "invoke", "nsmc", '{"inputs": ["good", "bad"]}').stdout
        assert [set(row) for row in json.loads(asked)] == [{"label", "score"}] * 2
        for times in ("1 restart", "2 restarts"):
            (server,) = servers(port)
            os.kill(server.pid, signal.SIGKILL)
            wait_until(lambda server=server: [found for found in servers(port) if found.pid != server.pid])
            wait_until(lambda: answer("endpoint", "view", "nsmc")["state"] == "in service")
            assert answer("endpoint", "view", "nsmc")["reason"] == times
            shutil.rmtree(run.folder, ignore_errors=True)  # the next start serves the verified copy
        assert cloudtrain("endpoint", "invoke", "nsmc", '{"inputs": ["good", "bad"]}').stdout == asked
        submission = Submission.load(JobStore().read(made["handle"]["job"]).home)
        assert submission.plan.grace == 80  # a request may take 60
        log = cloudtrain("job", "logs", made["handle"]["job"]).stdout
        serving = f"Serving checkpoint-4 of {run.url!r} (text-classification) at {made['handle']['url']}."
        assert (log.count(serving), log.count("Using the verified copy on this machine.")) == (3, 1)
        cloudtrain("endpoint", "delete", "nsmc", "--yes")
        assert servers(port) == []
        assert answer("endpoint", "list")["endpoints"] == []
        assert answer("job", "list")["jobs"] == []

    @pytest.mark.slow
    def test_a_server_that_cannot_start_leaves_nothing_and_its_error_is_shown(
        self, store: Desk, tmp_path: Path
    ) -> None:
        files = tiny_models.files("BertForMaskedLM")
        config = files["config.json"].replace(b"BertForMaskedLM", b"BertForSequenceClassification")
        broken = folder_with(tmp_path / "broken", {**files, "config.json": config})
        result = cloudtrain("endpoint", "create", "nsmc", str(broken), code=1)
        assert "lacks weights of a BertForSequenceClassification" in result.stderr
        assert answer("endpoint", "list")["endpoints"] == []
        assert answer("job", "list")["jobs"] == []


CODE = """
import json
from helper import double

def model_fn(folder):
    return json.load(open(folder + "/config.json"))["num_attention_heads"]

def predict_fn(data, heads):
    return {"heads": heads, "twice": double(data["inputs"])}
"""


class TestContainer:
    """As SageMaker does: unpack into /opt/ml/model, set the variables, load. The folder is an imitation."""

    @pytest.fixture
    def run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
        monkeypatch.setenv("HF_CLOUDTRAIN_CACHE", str(tmp_path / "cache"))
        run = Run(tmp_path / "run", tmp_path / "out")
        run.begin()
        return run

    def unpacked(self, run: Run, wish: Wish, tmp_path: Path) -> tuple[Path, dict[str, str]]:
        """The folder and the variables of the container."""
        model = model_of_checkpoint(run.catalog, run.catalog.read(run.catalog.checkpoints()[0]), wish)
        sagemaker.archive(model, tmp_path / "model.tar.gz")
        folder = tmp_path / "opt" / "ml" / "model"
        with tarfile.open(tmp_path / "model.tar.gz") as archive:
            archive.extractall(folder, filter="data")
        machine = sagemaker.Machine("role", "image")
        asked = sagemaker.requests("x", model, machine, "s3://x")["create_model"]["PrimaryContainer"]
        return folder, asked["Environment"]

    def test_the_archive_is_all_that_a_container_needs(
        self, zygote: Zygote, run: Run, tmp_path: Path
    ) -> None:
        committed(run, 4)
        folder, variables = self.unpacked(run, Wish(), tmp_path)
        child = zygote.start(__name__, "container", model_dir=str(folder), env=variables)
        assert child.wait() == 0, child.log
        served = Served(zygote, str(folder))
        assert served.ask({"inputs": ["a good film"]})[1][0]["label"] == child.value[0]["label"]
        served.stop()

    def test_the_code_of_a_trusted_checkpoint_answers_there_as_here(
        self, zygote: Zygote, run: Run, tmp_path: Path
    ) -> None:
        helper = b"def double(value):\n    return 2 * value\n"
        committed(run, 4, **{"code/inference.py": CODE.encode(), "code/helper.py": helper})
        folder, variables = self.unpacked(run, Wish(trust_code=True), tmp_path)
        assert variables == {}, "the code decides, and not HF_TASK"
        child = zygote.start(__name__, "container_with_code", model_dir=str(folder), body='{"inputs": 21}')
        assert child.wait() == 0, child.log
        assert child.value == {"heads": 2, "twice": 42}
        served = Served(zygote, str(folder), "--trust-code")
        assert served.ask({"inputs": 21}) == (200, child.value)
        served.stop()


def container(model_dir: str) -> Any:
    """What the container does, in a process of its own."""
    from transformers import pipeline

    make: Any = pipeline
    return make(os.environ["HF_TASK"], model=model_dir)("a good film")


def container_with_code(model_dir: str, body: str) -> Any:
    """The same with `code/inference.py`, which has no input_fn and no output_fn: JSON is read and written.

    https://github.com/aws/sagemaker-huggingface-inference-toolkit, handler_service.py
    """
    sys.path.insert(0, str(Path(model_dir, "code")))
    module = importlib.import_module("inference")
    return json.loads(json.dumps(module.predict_fn(json.loads(body), module.model_fn(model_dir))))
