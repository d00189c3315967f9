"""What every test gets: an environment without settings of clouds or launchers, and real servers on request."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import stage_all
from tests.integration._zygote import Zygote
from tests.servers import AzuriteServer, MotoServer, RcloneServer, Server, ServerMissingError
from tests.slurm_cluster import SlurmCluster

TESTS = Path(__file__).resolve().parent
SHARED_DATA = TESTS.parent.parent / "shared" / "data"

# huggingface_hub and datasets read these once, when they are imported.
SESSION_FOLDER = tempfile.mkdtemp(prefix="cloudtrain-tests-")
NOWHERE = os.path.join(SESSION_FOLDER, "nowhere")
SESSION_ENVIRONMENT = {
    "HF_HOME": os.path.join(SESSION_FOLDER, "hf"),
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Each test has one core: threads of torch that wait for each other on a busy one take ten times as long.
    "OMP_NUM_THREADS": "1",
    "AWS_CONFIG_FILE": NOWHERE,
    "AWS_SHARED_CREDENTIALS_FILE": NOWHERE,
    "AWS_EC2_METADATA_DISABLED": "true",
    "AZURE_CONFIG_DIR": NOWHERE,
    "CLOUDSDK_CONFIG": NOWHERE,
    # CI's machines run in a cloud, too.
    "HF_CLOUDTRAIN_CLOUD_NOTICES": "off",
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


RERUN_FOLDERS = {"integration", "faults", "unit", "laws", "contract"}
"""Folders whose tests start processes, threads and servers. tests/chaos is not one of them: it must count every loss."""


def foreign(name: str) -> bool:
    """Whether an environment variable of the machine would change how a test behaves."""
    return name.startswith(FOREIGN) or name in FOREIGN_NAMES or name.lower() in FOREIGN_NAMES


for _name in filter(foreign, list(os.environ)):
    del os.environ[_name]
os.environ.update(SESSION_ENVIRONMENT)  # for fixtures of a module or a session, too


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run a failed test of these folders once more; the summary names it (docs/testing.md)."""
    if stage_all.is_on():
        items[:] = [item for item in items if item.get_closest_marker("ordinary_saves") is None]
    for item in items:
        if not RERUN_FOLDERS.isdisjoint(item.path.relative_to(TESTS).parts[:-1]):
            item.add_marker(pytest.mark.flaky(reruns=1))


def let_loader_processes_end() -> None:
    """A DataLoader that is garbage cannot reach its processes: it waits 5 s for them, and terminates them."""
    loaders = sys.modules.get("torch.utils.data._utils")
    if loaders is not None:
        loaders.MP_STATUS_CHECK_INTERVAL = 0.5


def pytest_collection_finish() -> None:
    """Exempt what is imported from garbage collection: Trainer collects at each start, a third of a second with torch."""
    gc.collect()
    gc.freeze()
    let_loader_processes_end()


def pytest_unconfigure() -> None:
    shutil.rmtree(SESSION_FOLDER, ignore_errors=True)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove credentials, endpoints, proxies and ranks, both the machine's own and those that an earlier test left."""
    for name in filter(foreign, list(os.environ)):
        monkeypatch.delenv(name)
    for name, value in SESSION_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def stage_all_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the run asks for it, trainings of a test's own process stage their saves; those of the zygote do so by themselves."""
    if stage_all.is_on():
        stage_all.stage_all(monkeypatch.setattr)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run that was to stage all saves and staged none has tested nothing."""
    if stage_all.is_on() and not hasattr(session.config, "workerinput"):
        print(f"\n{stage_all.count()} saves were staged.")
        if stage_all.count() == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def close_the_run_of_the_function_api() -> Iterator[None]:
    """The function API has one run per process, and the next test uses the same process."""
    yield
    messages = sys.modules.get("hf_cloudtrain.integrations.messages")
    if messages is not None:
        messages._unused.clear()  # what a test creates and never uses
    functional = sys.modules.get("hf_cloudtrain.integrations.functions.api")
    if functional is not None and functional._Current.run is not None:
        functional._Current.run.close()
        functional._Current.run = None


def missing(reason: str) -> None:
    """Skip here; fail on CI, where a skipped suite would look green."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def shared_models() -> None:
    """Each session of botocore parses megabytes of JSON; here they share what the first one has read."""
    from botocore.loaders import JSONFileLoader

    found: dict[str, Any] = {}
    load_file = JSONFileLoader.load_file

    def load_once(self: Any, file_path: str) -> Any:
        if file_path not in found:
            found[file_path] = load_file(self, file_path)
        return found[file_path]

    JSONFileLoader.load_file = load_once


def running(server: Server) -> Iterator[Server]:
    with contextlib.ExitStack() as until_the_end:
        try:
            until_the_end.enter_context(server)
        except ServerMissingError as error:
            missing(str(error))
        yield server


@pytest.fixture(scope="session")
def moto(shared_models: None) -> Iterator[Server]:
    yield from running(MotoServer())


@pytest.fixture(scope="session")
def rclone(shared_models: None) -> Iterator[Server]:
    yield from running(RcloneServer())


@pytest.fixture(scope="session")
def azurite() -> Iterator[Server]:
    yield from running(AzuriteServer())


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Forks processes that have torch and transformers imported already."""
    with Zygote(tmp_path_factory.mktemp("zygote"), "tests.integration._attempts") as running:
        yield running


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A real Slurm cluster of two nodes."""
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
