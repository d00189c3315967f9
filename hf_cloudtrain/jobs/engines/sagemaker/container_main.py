"""The entry point of SageMaker's containers, and their first process.

    python -m hf_cloudtrain.jobs.engines.sagemaker.container_main

    /opt/ml/input/config/    resourceconfig.json: the hosts; hyperparameters.json; inputdataconfig.json: the channels
    /opt/ml/input/data/      a folder per channel; `cloudtrain` has the job and its workspace
    /opt/ml/checkpoints/     SageMaker syncs it with a folder on S3; the job's checkpoint folder is a link to it
    /opt/ml/model/           what SageMaker packs and uploads at the end; the script decides what is in it
    /opt/ml/output/failure   why the job failed, for DescribeTrainingJob
    /opt/ml/cloudtrain/      the job's home in this container

https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo-running-container.html

The exit code is 0 after a finished training, 75 after one that saved and stopped, and else 1. For SageMaker every code
but 0 is a failure, unless SageMaker itself has stopped the job.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path

from hf_cloudtrain.errors import CloudTrainError
from hf_cloudtrain.jobs.engines.sagemaker.stop_signal import Stopped, StopSignal, outcome

logger = logging.getLogger("hf_cloudtrain.jobs.engines.sagemaker.container_main")  # not `__main__`

ROOT = Path("/opt/ml")
MAX_FAILURE = 1024
"""Bytes of the failure that DescribeTrainingJob shows."""


def main(root: Path = ROOT) -> int:
    """Run this container's part of the job; return its exit code."""
    logging.basicConfig(format="cloudtrain: %(message)s", stream=sys.stdout)
    logging.getLogger("hf_cloudtrain").setLevel(logging.INFO)
    stop = StopSignal()
    stop.install()
    try:
        # Imported late: it takes seconds, and a SIGTERM before the handler is lost.
        from hf_cloudtrain.jobs.engines.sagemaker.container import Container

        state, reason = Container(root, stop).run()
    except (Stopped, Exception) as error:
        if not isinstance(error, (Stopped, CloudTrainError, OSError)):
            logger.exception("Unexpected error.")
        state, reason = outcome(error)
    code = {"finished": 0, "preempted": 75, "cancelled": 75}.get(state, 1)
    if code != 0:
        logger.error("%s: %s", state.capitalize(), reason)
        with contextlib.suppress(OSError):
            write_failure(root, f"{state}: {reason}")
    return code


def write_failure(root: Path, text: str) -> None:
    """Write why the job failed, where SageMaker reads it."""
    from hf_cloudtrain.runtime.redaction import redact, secrets_of_environment

    (root / "output").mkdir(parents=True, exist_ok=True)
    shown = redact(text, secrets_of_environment())
    # Cut between two characters.
    whole = shown.encode()[:MAX_FAILURE].decode(errors="ignore")
    (root / "output/failure").write_text(whole, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
