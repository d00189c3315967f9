"""`cloudtrain endpoint`: what the server of a local endpoint is called with, what is checked first, and the list."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.errors import (
    CloudTrainError,
    ConfigurationError,
    NoCheckpointError,
    StorageUnavailableError,
)
from hf_cloudtrain.serving.endpoints import local, sagemaker
from hf_cloudtrain.serving.endpoints.records import Endpoint, Endpoints, State
from tests.unit.cli.terminal import Run, answer, cloudtrain, sentence

FILES = {
    "config.json": json.dumps({"architectures": ["BertForSequenceClassification"]}).encode(),
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path))
    monkeypatch.setenv("HF_CLOUDTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The words of each server that would be started."""
    found: list[list[str]] = []

    def refuse(endpoints: object, made: object, words: list[str], *more: Any) -> None:
        found.append(words)
        raise ConfigurationError("Enough.")

    monkeypatch.setattr(local, "create_local", refuse)
    return found


@pytest.fixture
def trained(empty: Run) -> Run:
    empty.begin()
    empty.save(1, 4, FILES, best=True, metrics={"eval_loss": 0.5})
    empty.save(1, 8, FILES)
    return empty


@pytest.mark.parametrize(
    ("choice", "step"), [([], 8), (["--best"], 4), (["-c", "4"], 4), (["-c", "checkpoint-8"], 8)]
)
def test_a_server_is_given_the_checkpoint_that_was_found(
    trained: Run, called: list[list[str]], choice: list[str], step: int
) -> None:
    """After a restart, the newest or the best checkpoint may be a different one, and a folder here may have the run's name."""
    Path("mrpc").mkdir()
    cloudtrain("endpoint", "create", "nsmc", "mrpc", *choice, code=1)
    assert called == [[f"{trained.folder}", "--checkpoint", str(CheckpointKey(1, step))]]


def test_only_folders_become_absolute_paths(tmp_path: Path, called: list[list[str]]) -> None:
    for name in ("model", "base", "text-classification"):
        Path(name).mkdir()
    for name, data in FILES.items():
        Path("model", name).write_bytes(data)
    options = ["--task", "text-classification", "--base", "base", "--processor", "on-the-hub"]
    cloudtrain("endpoint", "create", "nsmc", "model", *options, code=1)
    (words,) = called
    assert words[0] == str(tmp_path / "here" / "model")
    assert dict(zip(words[1::2], words[2::2], strict=True)) == {
        "--task": "text-classification",
        "--base": str(tmp_path / "here" / "base"),
        "--processor": "on-the-hub",
    }


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a b", [], "'a b' is not a valid name of an endpoint"),
        ("a b", ["--engine", "sagemaker", "--dry-run"], "'a b' is not a valid name of an endpoint"),
        ("taken", [], "There is an endpoint 'taken' already"),
        ("new", ["--engine", "sagemaker", "--image", "x"], "--role '' is not the ARN of a role"),
    ],
)
def test_what_the_user_typed_is_checked_before_a_model_is_downloaded(
    name: str, options: list[str], message: str
) -> None:
    Endpoints().add(Endpoint("taken", "local", "x", 0.0))
    assert message in cloudtrain("endpoint", "create", name, "s3://nobucket/x", *options, code=1).stderr


class TestList:
    def test_shows_an_endpoint_whose_record_is_damaged(self, store: Path) -> None:
        Endpoints().add(Endpoint("good", "local", "x", 1.0))
        (store / "endpoints" / "bad.json").write_text("{")
        (store / "endpoints" / "worse.json").write_text('{"name": "good"}')
        found = answer("endpoint", "list")["endpoints"]
        assert [(one["name"], one["state"], one["model"]) for one in found] == [
            ("bad", "unknown", None),
            ("good", "gone", "x"),
            ("worse", "unknown", None),
        ]
        assert "The record of the endpoint 'worse' is damaged" in found[2]["reason"]
        assert "unknown" in cloudtrain("endpoint", "list").stdout

    def test_shows_an_endpoint_of_sagemaker_without_boto3(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "boto3", None)
        handle = {"name": "nsmc-0123abcd", "region": "eu-west-1"}
        Endpoints().add(Endpoint("nsmc", "sagemaker", "x", 1.0, handle))
        (found,) = answer("endpoint", "list")["endpoints"]
        assert (found["state"], found["engine"], "boto3" in found["reason"]) == ("unknown", "sagemaker", True)


def test_a_port_is_not_asked_when_the_server_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A different program may listen there."""
    Endpoints().add(Endpoint("nsmc", "local", "x", 1.0, {"url": "http://127.0.0.1:9"}))
    asked: list[object] = []
    monkeypatch.setattr(local, "_request", lambda *given: asked.append(given))
    assert "does not run. Its job was deleted." in sentence("endpoint", "invoke", "nsmc", "{}")
    assert asked == []


def test_ctrl_c_names_the_command_that_deletes_a_paid_endpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupted(endpoint: Endpoint) -> State:
        raise KeyboardInterrupt

    monkeypatch.setattr(sagemaker, "look", interrupted)
    (tmp_path / "packed").touch()
    with pytest.raises(KeyboardInterrupt):
        sagemaker.create(Endpoints(), Endpoint("nsmc", "sagemaker", "x", 1.0), {}, tmp_path / "packed", print)
    assert "delete it with `cloudtrain endpoint delete nsmc`" in caplog.text
    assert Endpoints().names() == ["nsmc"]


def test_ctrl_c_during_the_clean_up_names_the_command_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupted(endpoints: Endpoints, endpoint: Endpoint) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sagemaker, "look", lambda endpoint: State("failed"))
    monkeypatch.setattr(sagemaker, "delete", interrupted)
    (tmp_path / "packed").touch()
    with pytest.raises(KeyboardInterrupt):
        sagemaker.create(Endpoints(), Endpoint("nsmc", "sagemaker", "x", 1.0), {}, tmp_path / "packed", print)
    assert "may still exist at AWS and incur cost." in caplog.text


def test_a_run_with_a_password_in_its_url_has_no_endpoint(called: list[list[str]]) -> None:
    """The server would be started with '***' in place of the password."""
    text = sentence("endpoint", "create", "nsmc", "sftp://me:pw@host/runs/x")
    assert "RUN contains a user and a password" in text
    assert "HF_CLOUDTRAIN_STORAGE_OPTIONS" in text
    assert (called, Endpoints().names()) == ([], [])


class TestServe:
    """What `serve`, `predict` and `endpoint create` say of a run, before anything is loaded."""

    def test_a_run_that_was_deleted_is_served_from_the_verified_copy(
        self, trained: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from hf_cloudtrain.cli.commands import serve
        from hf_cloudtrain.serving.models.source import Wish

        said: list[str] = []
        monkeypatch.setattr(serve, "say", said.append)
        key = str(CheckpointKey(1, 4))
        first = serve.found_model(trained.url, key, False, Wish())
        trained.folder.rename(trained.folder.with_name("deleted"))
        assert serve.found_model(trained.url, key, False, Wish()) == first
        assert said[1].endswith("Using the verified copy on this machine.")
        with pytest.raises(NoCheckpointError):
            serve.found_model(trained.url, str(CheckpointKey(1, 8)), False, Wish())
        with pytest.raises(NoCheckpointError):
            serve.found_model(trained.url, None, False, Wish())

    def test_a_copy_is_chosen_by_the_wish_and_named_once_it_is_verified(
        self, trained: Run, store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from hf_cloudtrain.cli.commands import serve
        from hf_cloudtrain.serving.models.source import Wish

        said: list[str] = []
        monkeypatch.setattr(serve, "say", said.append)
        key = str(CheckpointKey(1, 8))
        first = serve.found_model(trained.url, key, False, Wish())
        trained.folder.rename(trained.folder.with_name("deleted"))
        with pytest.raises(NoCheckpointError):
            serve.found_model(trained.url, key, False, Wish(trust_code=True))
        first.folder.chmod(0o700)
        (first.folder / "model.safetensors").chmod(0o600)
        (first.folder / "model.safetensors").write_bytes(b"changed")
        with pytest.raises(CloudTrainError):
            serve.found_model(trained.url, key, False, Wish())
        assert said == [f"Verified {first.title}."]

    @pytest.mark.parametrize("key", ["000001-0000000008", "final-000001"])
    def test_while_the_storage_fails_the_verified_copy_is_served(
        self, trained: Run, monkeypatch: pytest.MonkeyPatch, key: str
    ) -> None:
        from hf_cloudtrain.checkpoints.catalog import Catalog
        from hf_cloudtrain.cli.commands import serve
        from hf_cloudtrain.serving.models.source import Wish

        trained.save(1, 8, FILES, name="final")
        said: list[str] = []
        monkeypatch.setattr(serve, "say", said.append)
        first = serve.found_model(trained.url, key, False, Wish())

        def fail(*given: object, **more: object) -> None:
            raise StorageUnavailableError("The storage does not answer.")

        for name in ("read", "checkpoints", "names_in"):
            monkeypatch.setattr(Catalog, name, fail)
        assert serve.found_model(trained.url, key, False, Wish()) == first
        assert said[1] == "The storage does not answer. Using the verified copy on this machine."
        with pytest.raises(StorageUnavailableError):
            serve.found_model(trained.url, "8", False, Wish())

    @pytest.mark.parametrize("name", ["/foo", "../models", "*", "a/b", "000001-*", ""])
    def test_a_mistyped_checkpoint_is_not_looked_for_outside_of_the_copies(
        self, trained: Run, name: str
    ) -> None:
        assert f"No checkpoint {name!r} in " in sentence("serve", trained.url, "--port", "0", "-c", name)

    def test_a_damaged_folder_that_was_saved_by_name_names_the_newest_checkpoint(self, trained: Run) -> None:
        trained.save(1, 8, FILES, name="final")
        (record,) = trained.folder.rglob("final-000001.json")
        record.write_text("{")
        assert sentence("serve", trained.url, "--port", "0", "-c", "final").endswith(
            "Nothing is served in its place. To serve the newest checkpoint, pass -c 000001-0000000008.\n"
        )

    def test_a_damaged_manifest_names_the_checkpoint_before(self, trained: Run) -> None:
        key = CheckpointKey(1, 8)
        (trained.folder / ".cloudtrain" / "checkpoints" / f"{key}.json").write_text("{")
        for choice in ([], ["-c", "8"], ["-c", "checkpoint-8"], ["-c", str(key)]):
            text = sentence("serve", trained.url, "--port", "0", *choice)
            assert text.endswith(
                "Nothing is served in its place. To serve the one before, pass -c 000001-0000000004.\n"
            )

    def test_a_job_that_has_not_begun_to_train_is_named(self, tmp_path: Path) -> None:
        from hf_cloudtrain.jobs.records import JobStore
        from hf_cloudtrain.runtime.process_tree import this_process

        facts = {"engine": "local", "nodes": 1, "nproc_per_node": 1, "max_restarts": 3}
        JobStore().create("glue", submitter=this_process(), **facts)
        text = sentence("serve", "glue", "--port", "0")
        assert text == (
            f"Error: Job glue-1 is queued, and has no checkpoint yet. Watch it with `cloudtrain run watch {tmp_path}/runs/glue-1`; "
            "its log: `cloudtrain job logs -f glue-1`.\n"
        )
