"""A training that keeps a page beside its run: from the first minute to the end, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_cloudtrain.storage.client import Storage
from tests.servers import MotoServer

SCRIPT = """
import os, sys, time
import hf_cloudtrain as ct
ct.init(total_train_steps=int(sys.argv[2]), run_url=sys.argv[1], checkpoint_dir="ck")
ct.restore()
os.makedirs("ck", exist_ok=True)
for step in range(1, int(sys.argv[2]) + 1):
    with ct.train_step():
        time.sleep(0.02)
    ct.metric({"loss": 1 / step})
    if step % 50 == 0 or ct.is_emergency_save():
        open("ck/state", "w").write(str(step))
        ct.upload_checkpoint()
"""
WAIT_SECONDS = 120


def start(folder: Path, url: str, steps: int, **variables: str) -> subprocess.Popen[str]:
    (folder / "train.py").write_text(SCRIPT)
    ours = {"HF_CLOUDTRAIN_PAGE": "1", "HF_CLOUDTRAIN_CLOUD_NOTICES": "off", "PYTHONPATH": str(Path.cwd())}
    return subprocess.Popen(
        [sys.executable, "train.py", url, str(steps)],
        cwd=folder,
        env={**os.environ, **ours, **variables},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < until, "it does not come true"
        time.sleep(0.05)


def test_a_preempted_training_leaves_a_page_that_says_so(tmp_path: Path) -> None:
    page = tmp_path / "run" / "index.html"
    training = start(tmp_path, str(tmp_path / "run"), 100_000)
    wait_for(page.exists)
    assert 'id="live"' in page.read_text()
    training.send_signal(signal.SIGTERM)
    _, said = training.communicate(timeout=WAIT_SECONDS)
    assert training.returncode == 75
    assert "was not renewed" not in said
    # The process that writes the last page may outlive the training, which has no time to wait.
    wait_for(lambda: '<span class="state preempted">' in page.read_text())
    assert 'id="live"' in page.read_text(), "the next attempt will renew it"


def test_on_s3_a_finished_training_leaves_a_complete_page(tmp_path: Path, moto: MotoServer) -> None:
    url = f"s3://{moto.bucket}/runs/page"
    training = start(tmp_path, url, 100, **moto.env)
    _, said = training.communicate(timeout=WAIT_SECONDS)
    assert training.returncode == 0, said
    assert "was not renewed" not in said
    html = Storage(url, moto.storage_options).read("index.html").decode()
    assert "The run is complete." in html
    assert "100 / 100" in html
    for secret in (str(value) for name, value in moto.storage_options.items() if name in ("key", "secret")):
        assert secret not in html


@pytest.mark.slow
def test_a_storage_that_refuses_the_page_does_not_stop_the_training(tmp_path: Path) -> None:
    (tmp_path / "run" / "index.html").mkdir(parents=True)  # a folder cannot be replaced by a file
    training = start(tmp_path, str(tmp_path / "run"), 100)
    _, said = training.communicate(timeout=WAIT_SECONDS)
    assert training.returncode == 0, said
    assert said.count("The page of the run was not renewed; training continues.") == 1
