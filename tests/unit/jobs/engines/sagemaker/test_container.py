"""One container: the variables of its scripts, and the name of the first one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hf_cloudtrain.jobs.engines.sagemaker import container
from hf_cloudtrain.jobs.engines.sagemaker.container import Container, wait_for_name
from hf_cloudtrain.jobs.engines.sagemaker.container_main import main
from hf_cloudtrain.jobs.engines.sagemaker.stop_signal import StopSignal
from tests.unit.jobs.engines.sagemaker._container import FakeNode, Image, hosts


def test_scripts_for_sagemaker_find_the_toolkits_variables(image: Image) -> None:
    hosts(image, ["algo-2", "algo-10", "algo-1"], "algo-2")
    one = Container(image.root, StopSignal())
    found = one.variables()
    assert json.loads(found["SM_HOSTS"]) == ["algo-1", "algo-10", "algo-2"]
    assert found["SM_CURRENT_HOST"] == "algo-2"
    assert found["SM_CURRENT_HOST_RANK"] == "2"
    assert json.loads(found["SM_CHANNELS"]) == ["dataset", "train"]
    assert Path(found["SM_CHANNEL_TRAIN"], "b.txt").read_text() == "4\n"
    assert found["SM_MODEL_DIR"] == str(image.root / "model")
    assert json.loads(found["SM_HPS"]) == {"lr": 0.1, "name": "x y"}
    assert (found["SM_HP_LR"], found["SM_HP_NAME"]) == ("0.1", "x y")
    assert int(found["SM_NUM_GPUS"]) >= 0
    os.environ["AWS_REGION"] = "eu-west-1"
    one._set_network()
    assert os.environ["NCCL_SOCKET_IFNAME"] == os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    assert os.environ["AWS_DEFAULT_REGION"] == "eu-west-1"


def test_the_command_receives_the_variables(image: Image) -> None:
    assert main(image.root) == 0
    assert FakeNode.environment["SM_CURRENT_HOST"] == "algo-1"
    assert "NCCL_SOCKET_IFNAME" not in FakeNode.environment  # it is alone


def test_a_host_whose_name_never_resolves_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "PAUSE", 0.0)
    with pytest.raises(TimeoutError, match=r"'algo-1\.invalid' of node 0 does not resolve"):
        wait_for_name("algo-1.invalid", patience=0.0)
    wait_for_name("localhost")


def test_a_hyperparameter_file_without_an_object_is_refused(image: Image) -> None:
    image.write("config/hyperparameters.json", "[]")
    with pytest.raises(ValueError, match="not a JSON object"):
        Container(image.root, StopSignal()).variables()
