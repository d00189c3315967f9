"""Endpoints of SageMaker: the requests as data, checked by a file and by botocore, and sent to moto."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from botocore.validate import ParamValidator

from hf_cloudtrain.errors import CloudTrainError, ConfigurationError
from hf_cloudtrain.jobs.engines.sagemaker import api
from hf_cloudtrain.serving.endpoints import sagemaker
from hf_cloudtrain.serving.endpoints.records import Endpoint, Endpoints, State
from hf_cloudtrain.serving.models.source import Model
from hf_cloudtrain.serving.models.tasks import task_named
from tests.unit.cli.terminal import answer, cloudtrain, sentence
from tests.unit.jobs.engines.sagemaker._requests import session

GOLDEN = Path(__file__).parents[3] / "data" / "sagemaker_endpoint_requests.yml"
ROLE = "arn:aws:iam::111122223333:role/serving"
IMAGE = "763104351884.dkr.ecr.us-east-1.amazonaws.com/huggingface-pytorch-inference:2.6.0"
URL = "s3://bucket/store/endpoints/nsmc/model.tar.gz"
MACHINES = {
    "instances": sagemaker.Machine(ROLE, IMAGE, "ml.g5.xlarge", 2),
    "serverless": sagemaker.Machine(ROLE, IMAGE, serverless_mb=3072),
}


@pytest.fixture
def model(tmp_path: Path) -> Model:
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "deep" / "more.json").write_text("{}")
    return Model(folder, "checkpoint-5", task_named("text-classification"))


@pytest.mark.parametrize("kind", MACHINES)
def test_the_requests_are_those_of_the_file(model: Model, kind: str) -> None:
    assert (
        sagemaker.requests("nsmc-1", model, MACHINES[kind], URL) == yaml.safe_load(GOLDEN.read_text())[kind]
    )


@pytest.mark.parametrize("kind", MACHINES)
def test_botocore_accepts_the_requests(model: Model, kind: str) -> None:
    service = session().get_service_model("sagemaker")
    for operation, request in sagemaker.requests("nsmc-1", model, MACHINES[kind], URL).items():
        shape = service.operation_model("".join(map(str.capitalize, operation.split("_")))).input_shape
        assert ParamValidator().validate(request, shape).generate_report() == ""


def test_the_archive_is_the_same_whenever_it_is_made(model: Model, tmp_path: Path) -> None:
    sagemaker.archive(model, tmp_path / "a.tar.gz")
    (model.folder / "config.json").touch()
    sagemaker.archive(model, tmp_path / "b.tar.gz")
    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tar.gz").read_bytes()
    with tarfile.open(tmp_path / "a.tar.gz") as archive:
        assert archive.getnames() == ["config.json", "deep/more.json", "model.safetensors", "tokenizer.json"]


def test_everything_that_is_wrong_is_said_at_once(model: Model) -> None:
    bad = sagemaker.Machine("me", "ubuntu")
    adapter = Model(model.folder, "checkpoint-5", model.task, base="bert", processor="bert")
    with pytest.raises(ConfigurationError) as caught:
        sagemaker.check(bad, "/home/me/store", None, adapter)
    lines = str(caught.value).splitlines()
    assert lines[0] == "SageMaker cannot serve checkpoint-5:"
    for said in (
        "--role 'me'",
        "--image 'ubuntu'",
        "export HF_CLOUDTRAIN_STORE",
        "merge_and_unload",
        "--processor",
        "No AWS region",
    ):
        assert any(said in line for line in lines), said


class TestMoto:
    """moto keeps what is created, and answers an invocation with fixed bytes."""

    @pytest.fixture
    def aws(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        moto = pytest.importorskip("moto")
        for name, value in {
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
            "HF_CLOUDTRAIN_STORE": str(tmp_path / "store"),
            "HF_CLOUDTRAIN_CACHE": str(tmp_path / "cache"),
        }.items():
            monkeypatch.setenv(name, value)
        # The store is a folder here: moto's S3 is in this process, and not reached by our client.
        monkeypatch.setattr(sagemaker, "_problems", lambda *given: iter(()))
        monkeypatch.setattr(sagemaker, "data_url", lambda *given: URL)
        with moto.mock_aws():
            import boto3

            yield boto3.client("sagemaker", region_name="us-east-1")

    def create(self, model: Model, **more: str) -> dict[str, Any]:
        found: dict[str, Any] = answer(
            *("endpoint", "create", "nsmc", str(model.folder), "--engine", "sagemaker", "--role", ROLE),
            *("--image", IMAGE),
        )
        return found

    def test_from_create_to_delete(self, aws: Any, model: Model, tmp_path: Path) -> None:
        made = self.create(model)
        name = made["handle"]["name"]
        assert (made["state"], name.startswith("nsmc-")) == ("in service", True)
        assert aws.describe_endpoint(EndpointName=name)["EndpointStatus"] == "InService"
        container = aws.describe_model(ModelName=name)["PrimaryContainer"]
        assert container["Environment"] == {"HF_TASK": "text-classification"}
        assert answer("endpoint", "list")["endpoints"][0]["state"] == "in service"
        assert cloudtrain("endpoint", "invoke", "nsmc", '{"inputs": "a"}').stdout == "body\n"
        stored = tmp_path / "store" / "endpoints" / "nsmc" / "model.tar.gz"
        assert stored.is_file()
        cloudtrain("endpoint", "delete", "nsmc", "--yes")
        assert not stored.exists()
        assert [aws.list_endpoints()["Endpoints"], aws.list_models()["Models"]] == [[], []]
        assert aws.list_endpoint_configs()["EndpointConfigs"] == []
        assert answer("endpoint", "list")["endpoints"] == []

    @pytest.mark.parametrize("step", ["create_model", "create_endpoint_config", "create_endpoint"])
    def test_what_was_made_is_deleted_if_a_step_fails(
        self, aws: Any, model: Model, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        ask = api.ask

        def fails(service: str, region: str, operation: str, what: str, **given: Any) -> Any:
            if operation == step:
                raise CloudTrainError(f"Could not {what}: no machine is free.")
            return ask(service, region, operation, what, **given)

        monkeypatch.setattr(api, "ask", fails)
        words = ["endpoint", "create", "nsmc", str(model.folder), "--engine", "sagemaker"]
        result = cloudtrain(*words, "--role", ROLE, "--image", IMAGE, code=1)
        assert "no machine is free" in result.stderr
        monkeypatch.setattr(api, "ask", ask)
        assert [aws.list_endpoints()["Endpoints"], aws.list_models()["Models"]] == [[], []]
        assert aws.list_endpoint_configs()["EndpointConfigs"] == []
        assert Endpoints().names() == []

    def test_an_endpoint_that_fails_is_deleted_with_its_reason(
        self, aws: Any, model: Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        states = iter([State("starting"), State("failed", "The container did not pass the ping.")])
        monkeypatch.setattr(sagemaker, "look", lambda endpoint: next(states))
        monkeypatch.setattr(sagemaker, "POLL", 0.0)
        words = ["endpoint", "create", "nsmc", str(model.folder), "--engine", "sagemaker"]
        result = cloudtrain(*words, "--role", ROLE, "--image", IMAGE, code=1)
        assert "is failed. The container did not pass the ping." in result.stderr
        assert aws.list_models()["Models"] == []

    def test_an_endpoint_that_is_gone_at_aws_is_deleted_here(self, aws: Any, model: Model) -> None:
        name = self.create(model)["handle"]["name"]
        aws.delete_endpoint(EndpointName=name)
        assert answer("endpoint", "view", "nsmc")["state"] == "gone"
        cloudtrain("endpoint", "delete", "nsmc", "--yes")
        assert aws.list_models()["Models"] == []

    def test_a_name_is_used_once(self, aws: Any, model: Model) -> None:
        self.create(model)
        words = ["endpoint", "create", "nsmc", str(model.folder), "--engine", "sagemaker", "--role", ROLE]
        result = cloudtrain(*words, "--image", IMAGE, code=1)
        assert "There is an endpoint 'nsmc' already" in result.stderr
        assert len(aws.list_models()["Models"]) == 1


def test_dry_run_prints_the_requests(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", "s3://bucket/store")
    words = [
        "endpoint",
        "create",
        "nsmc",
        str(model.folder),
        "--engine",
        "sagemaker",
        "--role",
        ROLE,
        "--image",
        IMAGE,
    ]
    shown = yaml.safe_load(cloudtrain(*words, "--dry-run").stdout)
    assert shown["create_model"]["PrimaryContainer"]["ModelDataUrl"] == URL
    assert json.dumps(shown).count("nsmc") >= 4


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["view", "nsmc"], "There is no endpoint 'nsmc'"),
        (["delete", "../x", "--yes"], "There is no endpoint '../x'"),
        (["invoke", "nsmc", "{}"], "List them with `cloudtrain endpoint list`"),
    ],
)
def test_an_unknown_endpoint_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: str
) -> None:
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path / "store"))
    assert expected in sentence("endpoint", *words)


def test_a_name_must_be_one_of_sagemakers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path / "store"))
    with pytest.raises(ConfigurationError, match="'a_b' is not a valid name"):
        Endpoints().add(Endpoint("a_b", "local", "x", 0.0))
