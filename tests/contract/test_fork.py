"""A child of a process that has used a storage must not hang (`notebook_launcher`, `datasets.map(num_proc)`)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.contract.conftest import Location
from tests.servers import REPOSITORY

SCRIPT = """
import json, os, signal, sys, tempfile, time, traceback

from hf_cloudtrain.storage.backend import PART_SIZE
from hf_cloudtrain.storage.client import Storage

url, options = json.loads(sys.stdin.read())


def use(storage, name):
    with tempfile.TemporaryDirectory() as folder:
        for size in (10, PART_SIZE + 1):
            with open(f"{folder}/sent", "wb") as file:
                file.truncate(size)
            digest = storage.upload(f"{folder}/sent", f"{name}/file")
            assert storage.download(f"{name}/file", f"{folder}/got", size) == digest
        assert storage.create(f"{name}/claim", b"1") and not storage.create(f"{name}/claim", b"2")
        assert len(storage.list(name)) == 2
        storage.delete([f"{name}/file"])
        assert storage.read(f"{name}/claim") == b"1"


storage = Storage(url, options)
use(storage, "parent-before")
child = os.fork()
if child == 0:
    try:
        use(storage, "child-inherited")
        use(Storage(url, options), "child-new")
        print("child done", flush=True)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
use(storage, "parent-after")
deadline = time.monotonic() + 90
while os.waitpid(child, os.WNOHANG) == (0, 0):
    if time.monotonic() > deadline:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        sys.exit("the child hangs")
    time.sleep(0.05)
print("parent done")
"""


@pytest.mark.parametrize("location", ["file", "memory", "moto", "moto-fsspec", "azurite"], indirect=True)
def test_storage_works_in_a_forked_child_and_in_its_parent(location: Location) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([location.url, location.options]),
        capture_output=True,
        text=True,
        timeout=150,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n") == ["child done", "parent done", ""]
