"""The request as data: golden files, SageMaker's own model, and what is refused before SageMaker would."""

from __future__ import annotations

import difflib
import re
from typing import Any

import pytest
import yaml

from hf_cloudtrain.jobs.engines.sagemaker.request import INSTANCES, problems, request, training_job_name
from tests.unit.jobs.engines.sagemaker._requests import (
    DATA,
    MANIFEST,
    SMALL,
    STORE,
    WHOLE,
    breaches,
    model,
    periflow,
    submission,
)


@pytest.mark.parametrize("name", ["whole", "glue", "cifar"])
def test_the_request_is_the_golden_file(name: str) -> None:
    if name == "whole":
        found = request(submission(WHOLE, has_workspace=True), dataset=MANIFEST)
    else:
        found = request(periflow(name))
    text = yaml.safe_dump(found, sort_keys=False, width=110)
    golden = (DATA / f"sagemaker_{name}_request.yml").read_text()
    assert text == golden, "".join(difflib.unified_diff(golden.splitlines(True), text.splitlines(True)))


def test_sagemakers_own_model_allows_the_whole_request() -> None:
    """Its sizes, patterns and enumerations too, which botocore does not check."""
    found = request(submission(WHOLE), variables={"WANDB_API_KEY": "x", "MODE": "fast"}, dataset=MANIFEST)
    assert list(breaches(found)) == []
    assert list(breaches(request(submission(SMALL)))) == []


@pytest.mark.parametrize(
    ("change", "breach"),
    [
        ({"TrainingJobName": "a_b"}, "TrainingJobName: 'a_b' is not"),
        ({"Environment": {"A": "x" * 513}}, "513 is out of"),
        ({"Surprise": 1}, "Surprise is unknown"),
        ({"ResourceConfig": {"InstanceType": "ml.x"}}, "must be one of"),
    ],
)
def test_a_planted_breach_of_the_model_is_found(change: dict[str, Any], breach: str) -> None:
    assert breach in "\n".join(breaches({**request(submission(SMALL)), **change}))


def test_sagemaker_has_every_machine_of_the_table() -> None:
    known = set(model().shape_for("TrainingInstanceType").enum)
    if "ml.p5.4xlarge" not in known:
        pytest.skip("this botocore is older than the newest of them")
    assert {name for machines in INSTANCES.values() for name in machines.values()} <= known


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (("role: arn:aws:iam::111122223333:role/training", "role: training"), "not the ARN"),
        (("-spot", ""), "`max_wait` is only for spot"),
        (("max_wait: 7200", "max_wait: 60"), "less than the 3600 seconds"),
        (("40gb-a100-8g", "40gb-a100-3g"), "Write the machine as `instance_type`"),
        (("num_devices: 16\nengine", "engine"), None),
        (("MODE: fast", "HF_CLOUDTRAIN_GRACE: 300"), "kills a container after 120 s"),
        (("/workspace/data", "/opt/ml/input/data/x"), "is a folder of SageMaker"),
        (("extra:", "dataset:"), "is reserved"),
        (("run_url: s3://bucket/runs/mnli", "run_url: /runs/mnli"), "which containers cannot see"),
        (("111122223333.dkr.ecr.us-west-2.amazonaws.com/", "docker.io/"), "not in ECR"),
    ],
)
def test_what_sagemaker_would_refuse_is_refused_before_the_request(
    changed: tuple[str, str], problem: str | None
) -> None:
    assert changed[0] in WHOLE
    text = WHOLE.replace(*changed)
    if "a100-3g" in text:
        text = text.replace("num_devices: 16", "num_devices: 6")
    found = list(problems(submission(text)))
    assert ([] if problem is None else [True]) == [problem in line for line in found if problem]
    assert len(found) == (problem is not None)


@pytest.mark.parametrize("name", ["a", "mnli.v2_final", "x" * 63, "a--b..c__d", "A-" * 30 + "b"])
def test_a_name_is_valid_for_sagemaker_and_unique_to_the_store(name: str) -> None:
    pattern = model().shape_for("TrainingJobName").metadata["pattern"]
    names = [training_job_name(STORE, f"{name}-12", number) for number in (1, 2, 1000)]
    names.append(training_job_name("s3://other/store", f"{name}-12"))
    names.append(training_job_name(STORE, f"{name}-13"))
    assert len(set(names)) == len(names)
    for found in names:
        assert re.fullmatch(pattern, found), found
        assert len(found) <= 63


def test_the_grace_is_sagemakers_unless_the_job_sets_one() -> None:
    assert request(submission(SMALL))["Environment"]["HF_CLOUDTRAIN_GRACE"] == "105"
    named = submission(SMALL + "env: {HF_CLOUDTRAIN_GRACE: '40'}")
    assert request(named)["Environment"]["HF_CLOUDTRAIN_GRACE"] == "40"
