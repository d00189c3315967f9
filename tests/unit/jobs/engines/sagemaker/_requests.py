"""Jobs for SageMaker, and SageMaker's own model of a request, for the tests."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_cloudtrain.checkpoints.manifest import FileEntry, Manifest, Position
from hf_cloudtrain.jobs.records import JobRecord
from hf_cloudtrain.jobs.spec.job_file import parse_job, read_job
from hf_cloudtrain.jobs.submission import Submission

DATA = Path(__file__).resolve().parents[4] / "data"
STORE = "s3://bucket/store"
DIGEST = f"xxh3-128:{'0' * 32}"
MANIFEST = Manifest(
    "mnli-000002", "mnli.2", 0, 0, "n" * 16, (FileEntry("a", 2_500_000_000, DIGEST),), Position(0)
)
WHOLE = (DATA / "sagemaker_whole.yml").read_text()
SMALL = """
name: small
run_url: s3://bucket/runs/small
job_setting: {docker: {image: 111122223333.dkr.ecr.us-east-1.amazonaws.com/t, command: "true"}}
sagemaker: {role: "arn:aws:iam::111122223333:role/training", instance_type: ml.m5.large}
"""


def submission(text: str, tmp_path: Path = Path("/nowhere"), **changes: Any) -> Submission:
    job = parse_job(text.encode())
    given: dict[str, Any] = {
        "job": job,
        "plan": job.plan("sagemaker"),
        "id": f"{job.name}-1",
        "run_url": job.run_url,
        "store": STORE,
        "home": tmp_path / "home",
    }
    return Submission(**{**given, **changes})


def periflow(name: str) -> Submission:
    """Only what PeriFlow's file says, with the default store."""
    job = read_job(DATA / f"periflow_{name}.yml")
    store = "/home/me/.hf_cloudtrain"
    run_url = f"{store}/runs/{job.name}-1"
    return Submission(
        job, job.plan("sagemaker"), f"{job.name}-1", run_url, store, Path(store, "jobs", f"{job.name}-1")
    )


def record_of(item: Submission, **changes: Any) -> JobRecord:
    return JobRecord(
        id=item.id,
        name=item.job.name,
        engine="sagemaker",
        run_url=item.run_url,
        home=str(item.home),
        nodes=item.plan.nodes,
        nproc_per_node=item.plan.nproc_per_node,
        max_restarts=item.job.max_restarts,
        created=0.0,
        **changes,
    )


@functools.cache
def session() -> Any:
    """One for all tests: it keeps the models, which are megabytes of JSON."""
    import botocore.session

    return botocore.session.Session()


@functools.cache
def model() -> Any:
    return session().get_service_model("sagemaker")


def breaches(found: dict[str, Any]) -> Iterator[str]:
    """Where a request goes against the model of CreateTrainingJob that botocore has, one sentence each."""
    yield from against(found, model().operation_model("CreateTrainingJob").input_shape, "")


def against(value: Any, shape: Any, name: str) -> Iterator[str]:
    yield from sized(value, shape, name)
    if shape.type_name == "structure":
        yield from (f"{name} lacks {key}" for key in set(shape.required_members) - set(value))
        for key, item in value.items():
            if key not in shape.members:
                yield f"{name}.{key} is unknown"
            else:
                yield from against(item, shape.members[key], f"{name}.{key}")
    elif shape.type_name == "list":
        for item in value:
            yield from against(item, shape.member, f"{name}[]")
    elif shape.type_name == "map":
        for key, item in value.items():
            yield from against(key, shape.key, f"{name}.{key}")
            yield from against(item, shape.value, f"{name}.{key}")


def sized(value: Any, shape: Any, name: str) -> Iterator[str]:
    limits = shape.metadata
    size = value if shape.type_name in ("integer", "long") else len(value) if hasattr(value, "__len__") else 0
    if not limits.get("min", size) <= size <= limits.get("max", size):
        yield f"{name}: {size} is out of {limits}"
    if shape.type_name == "string":
        pattern = limits.get("pattern", "(?s:.*)").replace(r"\p{Alnum}", "A-Za-z0-9")
        if not re.fullmatch(pattern, value):
            yield f"{name}: {value!r} is not {pattern}"
        if shape.enum and value not in shape.enum:
            yield f"{name}: {value!r} must be one of {shape.enum}"
