"""What every test gets: an environment that says nothing about clouds or launchers, and real servers on request."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import AzuriteServer, MotoServer, RcloneServer, Server, ServerMissingError
from tests.slurm_cluster import SlurmCluster

TESTS = Path(__file__).resolve().parent
SHARED_DATA = TESTS.parent.parent / "shared" / "data"

# huggingface_hub and datasets read these once, at their import.
SESSION_FOLDER = tempfile.mkdtemp(prefix="cloudtrain-tests-")
SESSION_ENVIRONMENT = {
    "HF_HOME": os.path.join(SESSION_FOLDER, "hf"),
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
FOREIGN = (
    *("AWS_", "AZURE_", "GOOGLE_", "CLOUDSDK_", "GCSFS_", "FSSPEC_", "HF_", "HUGGING_FACE_"),
    *(
        "ACCELERATE_",
        "TORCHELASTIC_",
        "SLURM_",
        "MASTER_",
        "GROUP_",
        "ROLE_",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
    ),
)
FOREIGN_NAMES = {"RANK", "WORLD_SIZE"} | {
    f"{scheme}_proxy" for scheme in ("http", "https", "all", "no", "HTTP", "HTTPS", "ALL", "NO")
}


RUN_ONCE_MORE = {"integration", "faults", "unit", "laws", "contract"}
"""Folders whose tests start processes, threads and servers. tests/chaos is not one of them: it counts each loss once."""


def foreign(name: str) -> bool:
    """Whether a variable of the machine would change what a test sees."""
    return name.startswith(FOREIGN) or name in FOREIGN_NAMES or name.lower() in FOREIGN_NAMES


for _name in filter(foreign, list(os.environ)):
    del os.environ[_name]
os.environ.update(SESSION_ENVIRONMENT)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test of real processes that fails is run once more, and the summary names it: docs/testing.md."""
    for item in items:
        if not RUN_ONCE_MORE.isdisjoint(item.path.relative_to(TESTS).parts[:-1]):
            item.add_marker(pytest.mark.flaky(reruns=1))


def pytest_unconfigure() -> None:
    shutil.rmtree(SESSION_FOLDER, ignore_errors=True)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials, endpoints, proxies or ranks: neither the machine's nor those a test before this one left."""
    for name in filter(foreign, list(os.environ)):
        monkeypatch.delenv(name)
    nowhere = os.path.join(SESSION_FOLDER, "nowhere")
    isolated = {
        "AWS_CONFIG_FILE": nowhere,
        "AWS_SHARED_CREDENTIALS_FILE": nowhere,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AZURE_CONFIG_DIR": nowhere,
        "CLOUDSDK_CONFIG": nowhere,
        # CI's own machines are in a cloud, too.
        "HF_CLOUDTRAIN_CLOUD_NOTICES": "off",
    }
    for name, value in {**SESSION_ENVIRONMENT, **isolated}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def no_run_of_the_functions_is_left() -> Iterator[None]:
    """They have one run a process, and the next test is in this one."""
    yield
    functional = sys.modules.get("hf_cloudtrain.integrations.functions.api")
    if functional is not None and functional._Current.run is not None:
        functional._Current.run.close()
        functional._Current.run = None


def missing(reason: str) -> None:
    """Skip here; fail on CI, where a skipped suite would look green."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


def running(server: Server) -> Iterator[Server]:
    with contextlib.ExitStack() as until_the_end:
        try:
            until_the_end.enter_context(server)
        except ServerMissingError as error:
            missing(str(error))
        yield server


@pytest.fixture(scope="session")
def moto() -> Iterator[Server]:
    yield from running(MotoServer())


@pytest.fixture(scope="session")
def rclone() -> Iterator[Server]:
    yield from running(RcloneServer())


@pytest.fixture(scope="session")
def azurite() -> Iterator[Server]:
    yield from running(AzuriteServer())


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A real Slurm of two nodes."""
    with contextlib.ExitStack() as until_the_end:
        try:
            cluster = until_the_end.enter_context(SlurmCluster())
        except ServerMissingError as error:
            missing(str(error))
        yield cluster


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real GLUE data beside the checkout."""
    if not SHARED_DATA.is_dir():
        missing(f"no data at {SHARED_DATA}")
    return SHARED_DATA
