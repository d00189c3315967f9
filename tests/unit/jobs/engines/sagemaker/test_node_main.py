"""A node in a process of its own, which mounts and downloads nothing."""

from __future__ import annotations

import json
import shutil
import time

from hf_cloudtrain.jobs.engines.sagemaker.container_main import main
from hf_cloudtrain.jobs.engines.sagemaker.node_main import NodeProcess
from hf_cloudtrain.jobs.submission import Submission
from tests.unit.jobs.engines.sagemaker._container import Image


def test_a_node_runs_in_the_prepared_container_without_mounts_and_downloads(image: Image) -> None:
    assert main(image.root) == 0  # makes the links
    file = image.root / "cloudtrain/job.json"
    given = json.loads(file.read_text())
    given["job"]["job_setting"]["docker"]["command"] = {
        "run": "echo $MASTER_ADDR:$MASTER_PORT $NODE_RANK > seen"
    }
    file.write_text(json.dumps(given))
    shutil.rmtree(image.store.url)  # where a download of the dataset would come from
    process = NodeProcess(Submission.load(file.parent), 0, "algo-1")
    process.start(2)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() == 0
    assert (image.mounts / "workspace/seen").read_text() == "algo-1:7777 0\n"
    written = json.loads((file.parent / "nodes/0/node-2.json").read_text())
    assert (written["exit_code"], written["problem"]) == (0, None)
