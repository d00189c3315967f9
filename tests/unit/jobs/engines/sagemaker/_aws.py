"""Answers of AWS for the tests: botocore checks the requests, and the test gives the answers."""

from __future__ import annotations

import datetime

from botocore.stub import Stubber

from hf_cloudtrain.jobs.engines.sagemaker.request import training_job_name
from tests.unit.jobs.engines.sagemaker._requests import STORE, session


class Stubbed:
    """A client with prepared answers, whose requests botocore checks."""

    def __init__(self, service: str) -> None:
        keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
        self.client = session().create_client(service, region_name="us-east-1", **keys)
        self.stub = Stubber(self.client)


NAME = training_job_name(STORE, "mnli.v2_final-1")
HANDLE = {"training_job": NAME, "region": "us-east-1"}
NOW = datetime.datetime(2024, 5, 1, tzinfo=datetime.timezone.utc)
DESCRIBED = {
    "TrainingJobName": NAME,
    "TrainingJobArn": f"arn:aws:sagemaker:us-east-1:111122223333:training-job/{NAME}",
    "ModelArtifacts": {"S3ModelArtifacts": "s3://bucket/x"},
    "TrainingJobStatus": "InProgress",
    "SecondaryStatus": "Training",
    "AlgorithmSpecification": {"TrainingInputMode": "File"},
    "ResourceConfig": {"VolumeSizeInGB": 1},
    "StoppingCondition": {},
    "CreationTime": NOW,
}
