"""The entry point of SageMaker's containers: what it finds, what it makes, and how it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from hf_cloudtrain.datasets.store import DatasetStore
from hf_cloudtrain.jobs import supervisor, verdict
from hf_cloudtrain.jobs.engines.sagemaker import container_main
from hf_cloudtrain.jobs.engines.sagemaker import gang as sagemaker_gang
from hf_cloudtrain.jobs.engines.sagemaker.container_main import (
    Container,
    main,
    unpack,
    wait_for_name,
    write_failure,
)
from hf_cloudtrain.jobs.engines.sagemaker.gang import Agent, ContainerGang, Line
from hf_cloudtrain.jobs.node.folders import real_checkpoint_dir
from hf_cloudtrain.jobs.records import JobStore
from hf_cloudtrain.jobs.spec.job_file import parse_job
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.runtime import process_tree
from tests.servers import free_port

JOB = """
name: small
job_setting:
  docker: {{command: "true"}}
  workspace: {{mount_path: {place}/workspace}}
checkpoint: {{output_checkpoint_dir: {place}/workspace/ckpt}}
data: {{name: numbers, mount_path: {place}/data}}
max_restarts: 2
num_devices: {nodes}
"""


class FakeNode:
    """Stands for `NodeProcess`: each start ends as it is told to, and leaves behind what a node would.

    An exit code; or an outcome; or "hold", which runs until it is stopped, and saves then; or "stuck", which cannot save
    without the others; or "told", which SIGTERM meets while it runs.
    """

    endings: ClassVar[dict[int, list[str | int]]] = {}
    starts: ClassVar[list[tuple[int, int]]] = []
    environment: ClassVar[dict[str, str]] = {}

    def __init__(self, submission: Submission, rank: int, master_addr: str) -> None:
        self.submission, self.rank, self.master_addr = submission, rank, master_addr
        self.code: int | None = None
        self.number = 0

    def start(self, number: int) -> None:
        FakeNode.starts.append((self.rank, number))
        FakeNode.environment = dict(os.environ)
        self.number, self.code, self.stuck = number, None, False
        ending = self.endings[self.rank].pop(0)
        if isinstance(ending, int):
            self.end(ending, None)
        elif ending == "told":
            signal.raise_signal(signal.SIGTERM)
        elif ending == "run stop":
            self.end(75, "preempted", reason=f"{verdict.RUN_STOP} by somebody")
        elif ending == "stuck":
            self.stuck = True
        elif ending != "hold":
            self.end({"finished": 0, "preempted": 75}.get(ending, 1), ending)

    def end(self, code: int, outcome: str | None, *, stopped: bool = False, reason: str = "SIGUSR1") -> None:
        written = {"node": {"exit_code": code, "problem": None, "stopped": stopped}}
        if outcome is not None:
            written["exit"] = {"outcome": outcome, "reason": reason, "committed": "000001-0000000006"}
        for name, content in written.items():
            path = self.submission.home / "nodes" / str(self.rank) / f"{name}-{self.number}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
        self.code = code

    def poll(self) -> int | None:
        return self.code

    def terminate(self) -> None:
        if self.number and self.code is None:
            code, outcome = (1, None) if self.stuck else (75, "preempted")
            self.end(code, outcome, stopped=True)

    def kill(self) -> None:
        if self.code is None:
            self.code = -9


@dataclasses.dataclass
class Image:
    """A container's folders."""

    root: Path
    place: Path
    store: JobStore

    def bring(self, name: str, text: str) -> None:
        path = self.root / "input" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def failure(self) -> str | None:
        path = self.root / "output/failure"
        return path.read_text() if path.exists() else None


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Image]:
    """A container of one node, as SageMaker makes it ready."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    environment = dict(os.environ)
    found = Image(tmp_path / "ml", tmp_path / "place", JobStore(str(tmp_path / "store")))
    facts = {"engine": "sagemaker", "nodes": 1, "nproc_per_node": 1, "max_restarts": 2}
    found.store.create("small", **facts)
    found.place.mkdir()
    (tmp_path / "numbers").mkdir()
    (tmp_path / "numbers/a.txt").write_text("1 2 3\n")
    (tmp_path / "code").mkdir()
    (tmp_path / "code/run.sh").write_text("true\n")
    (tmp_path / "code/run.sh").chmod(0o755)
    (tmp_path / "code/out").symlink_to("/etc/hosts")
    dataset, _ = DatasetStore(str(tmp_path / "store")).create("numbers", tmp_path / "numbers")
    hosts(found, ["algo-1"], "algo-1")
    job(found, 1)
    found.bring("data/cloudtrain/dataset.json", dataset.manifest.encode().decode())
    found.bring("data/dataset/a.txt", "1 2 3\n")
    found.bring("data/train/b.txt", "4\n")
    with tarfile.open(found.root / "input/data/cloudtrain/workspace.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "code", arcname=".")
    monkeypatch.setattr(container_main, "wait_for_name", lambda host: None)
    monkeypatch.setattr(container_main._Told, "told", False)
    monkeypatch.setattr(container_main._Told, "raises", True)
    monkeypatch.setattr(sagemaker_gang, "NodeProcess", FakeNode)
    monkeypatch.setattr(sagemaker_gang, "PORT", free_port())
    monkeypatch.setattr(
        process_tree, "adopt_orphans", lambda: None
    )  # it would be for all tests of this process
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(supervisor, "POLL", 0.01)
    FakeNode.starts.clear()
    FakeNode.endings = {0: ["finished"]}
    yield found
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in before.items():
        signal.signal(number, handler)


def hosts(image: Image, names: list[str], current: str) -> None:
    resources = {"current_host": current, "hosts": names, "network_interface_name": "eth7"}
    image.bring("config/resourceconfig.json", json.dumps(resources))
    channels = {name: {"TrainingInputMode": "File"} for name in ("cloudtrain", "dataset", "train")}
    image.bring("config/inputdataconfig.json", json.dumps(channels))
    image.bring("config/hyperparameters.json", json.dumps({"lr": "0.1", "name": "x y"}))


def job(image: Image, nodes: int, *, has_workspace: bool = True) -> None:
    read = parse_job(JOB.format(place=image.place, nodes=nodes).encode())
    plan = dataclasses.replace(read.plan(nodes=nodes, nproc_per_node=1), grace_seconds=105.0)
    run_url = f"{image.place}-run"
    submission = Submission(read, plan, "small-1", run_url, image.store.url, image.root, has_workspace)
    image.bring("data/cloudtrain/job.json", json.dumps(submission.encode()))


# --- What it makes ---------------------------------------------------------------------------------------------------


def test_the_job_finds_everything_at_its_paths(image: Image) -> None:
    assert main(image.root) == 0
    assert os.access(image.place / "workspace/run.sh", os.X_OK)
    assert (image.place / "data/a.txt").read_text() == "1 2 3\n"
    assert (image.place / "workspace/ckpt").resolve() == (image.root / "checkpoints").resolve()
    assert not os.path.lexists(image.place / "workspace/out")  # it leads to another machine's file
    assert FakeNode.starts == [(0, 1)]
    submission = Submission.load(image.root / "cloudtrain")
    assert submission.plan.grace == 105.0
    found = real_checkpoint_dir(submission)
    assert found is not None
    assert found.resolve() == (image.root / "checkpoints").resolve()
    kept = image.root / "output/data/cloudtrain/algo-1/0/exit-1.json"
    assert json.loads(kept.read_text())["outcome"] == "finished"
    assert image.failure() is None


def test_scripts_for_sagemaker_find_their_variables(image: Image) -> None:
    hosts(image, ["algo-2", "algo-10", "algo-1"], "algo-2")
    container = Container(image.root)
    found = container.variables()
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
    container._network()
    assert os.environ["NCCL_SOCKET_IFNAME"] == os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    assert os.environ["AWS_DEFAULT_REGION"] == "eu-west-1"


def test_the_command_sees_them(image: Image) -> None:
    assert main(image.root) == 0
    assert FakeNode.environment["SM_CURRENT_HOST"] == "algo-1"
    assert "NCCL_SOCKET_IFNAME" not in FakeNode.environment  # it is alone


def test_a_node_gets_no_mounts_and_no_download(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(image.root) == 0
    calls: list[tuple[Submission, dict[str, Any]]] = []

    def run_node(submission: Submission, **given: Any) -> int:
        calls.append((submission, given))
        return 75

    monkeypatch.setattr(sagemaker_gang, "run_node", run_node)
    home = str(image.root / "cloudtrain")
    words = ["sagemaker_gang", home, "--node-rank", "0", "--master-addr", "algo-1", "--start", "2"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        sagemaker_gang.main()
    assert ended.value.code == 75
    ((submission, given),) = calls
    assert submission.job.data is None
    assert given.pop("wrap")(submission, (), ["true"]) == ["true"]
    assert given == {"node_rank": 0, "master_addr": "algo-1", "master_port": 7777, "start": 2}


def test_records_that_sagemaker_has_brought_back_are_no_records(image: Image) -> None:
    """S3 gives files other inodes and times, so an outbox of before is no longer what it says."""
    for path in (
        "checkpoints/.cloudtrain/outbox/x",
        "checkpoints/out/.cloudtrain/y",
        "checkpoints/out/model",
    ):
        (image.root / path).parent.mkdir(parents=True, exist_ok=True)
        (image.root / path).write_text("z")
    assert main(image.root) == 0
    assert [path.name for path in (image.root / "checkpoints").rglob("*") if path.is_file()] == ["model"]


def test_a_dataset_that_arrived_damaged_is_not_trained_on(image: Image) -> None:
    image.bring("data/dataset/a.txt", "1 2 4\n")
    assert main(image.root) == 1
    assert FakeNode.starts == []
    assert "'numbers' is not what was stored" in (image.failure() or "")
    assert not (image.place / "data").exists()


def test_what_the_image_has_at_a_mount_path_is_not_hidden(image: Image) -> None:
    (image.place / "workspace").mkdir()
    (image.place / "workspace/README").write_text("of the image")
    assert main(image.root) == 1
    assert FakeNode.starts == []
    assert "would hide" in (image.failure() or "")
    assert (image.place / "workspace/README").exists()


def test_without_a_workspace_the_image_s_own_is_the_job_s(image: Image) -> None:
    job(image, 1, has_workspace=False)
    (image.place / "workspace").mkdir()
    (image.place / "workspace/main.py").write_text("of the image")
    assert main(image.root) == 0
    assert (image.root / "cloudtrain/workspace/main.py").read_text() == "of the image"


def test_a_checkpoint_folder_that_the_workspace_brings_stays(
    image: Image, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "code/ckpt").mkdir()
    (tmp_path / "code/ckpt/old.pt").write_text("old")
    with tarfile.open(image.root / "input/data/cloudtrain/workspace.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "code", arcname=".")
    assert main(image.root) == 0
    assert (image.place / "workspace/ckpt/old.pt").exists()
    assert "SageMaker does not keep it" in caplog.text


def test_an_archive_leads_nowhere_else(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../out"))
    with pytest.raises(tarfile.OutsideDestinationError):
        unpack(tmp_path / "a.tar.gz", tmp_path / "in")
    assert not (tmp_path / "out").exists()


# --- How it ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endings", "code", "failure"),
    [
        (["finished"], 0, None),
        ([1, "finished"], 0, None),
        (
            ["failed", 1, 3],
            1,
            "failed: The command of node 0 ended with exit code 3. It was restarted 2 times",
        ),
        (["told"], 75, "preempted: Stopped by SIGTERM. The newest checkpoint is 000001-0000000006."),
        (["preempted", "finished"], 0, None),
        (["run stop"], 75, f"cancelled: Saved and stopped by {verdict.RUN_STOP}"),
        ([0], 1, "failed: The command ended with exit code 0 and trained nothing"),
    ],
)
def test_the_end_of_a_job_is_told_to_sagemaker(
    image: Image, endings: list[str | int], code: int, failure: str | None
) -> None:
    """It is supervised as everywhere: started again after a crash, `max_restarts` times (2 here)."""
    starts = len(endings)
    FakeNode.endings = {0: endings}
    assert main(image.root) == code
    assert FakeNode.starts == [(0, number + 1) for number in range(starts)]
    assert (image.failure() or "").startswith(failure or "")
    assert (image.failure() is None) == (failure is None)
    assert len(image.store.read("small-1").starts) == starts


def test_what_becomes_of_a_job_that_sagemaker_stops_is_sagemaker_s_to_say(image: Image) -> None:
    """It may start other machines (spot), or not (its time is up)."""
    FakeNode.endings = {0: ["told"]}
    assert main(image.root) == 75
    record = image.store.read("small-1")
    assert not record.is_over
    assert record.reason == "Stopped by SIGTERM. The newest checkpoint is 000001-0000000006."


def test_a_cancelled_job_says_so(image: Image) -> None:
    image.store.ask_to_cancel("small-1")
    assert main(image.root) == 75
    assert FakeNode.starts == []
    assert (image.failure() or "").startswith("cancelled: ")
    assert image.store.read("small-1").state == "cancelled"


def test_another_number_of_hosts_than_the_job_has_is_refused(image: Image) -> None:
    hosts(image, ["algo-1", "algo-2"], "algo-1")
    assert main(image.root) == 1
    assert image.failure() == "failed: The job has 1 nodes, and SageMaker started 2."


def test_a_container_without_its_channel_says_so(image: Image) -> None:
    (image.root / "input/data/cloudtrain/job.json").unlink()
    assert main(image.root) == 1
    assert "the channel 'cloudtrain' brings it" in (image.failure() or "")


def test_the_failure_is_short_whole_and_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret-value")
    write_failure(tmp_path, "secret-value " + "é" * 2000)
    written = (tmp_path / "output/failure").read_bytes()
    assert 1022 <= len(written) <= 1024
    assert written.decode().startswith("*** é")


def test_a_host_that_is_never_known_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container_main, "PAUSE", 0.0)
    with pytest.raises(TimeoutError, match=r"'algo-1\.invalid' of node 0 is not known"):
        wait_for_name("algo-1.invalid", patience=0.0)
    wait_for_name("localhost")


def test_a_hyperparameter_file_that_is_no_object_is_refused(image: Image) -> None:
    image.bring("config/hyperparameters.json", "[]")
    with pytest.raises(ValueError, match="no JSON object"):
        Container(image.root).variables()


def test_sigterm_before_the_command_runs_ends_it_at_once(image: Image, tmp_path: Path) -> None:
    """A first process of a container has no default for it. Here it waits for a name that never comes."""
    hosts(image, ["algo-1.invalid"], "algo-1.invalid")
    script = (
        "import sys; from pathlib import Path; from hf_cloudtrain.jobs.engines.sagemaker import container_main as entry\n"
        "def wait(host):\n"
        "    print('waits', flush=True)\n"
        "    import time; time.sleep(60)\n"
        "entry.wait_for_name = wait\n"
        f"sys.exit(entry.main(Path({str(image.root)!r})))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("waits" in line for line in process.stdout)
        began = time.monotonic()
        process.terminate()
        assert process.wait(30) == 75
        assert time.monotonic() - began < 30
    assert image.failure() == "preempted: Stopped while no command ran."


# --- Several containers ----------------------------------------------------------------------------------------------


class Others:
    """The containers of nodes 1 and 2, each a thread."""

    def __init__(self, image: Image, tmp_path: Path) -> None:
        hosts(image, ["algo-1", "algo-2", "algo-3"], "algo-1")
        job(image, 3)
        given = json.loads((image.root / "input/data/cloudtrain/job.json").read_text())
        self.ends: dict[int, tuple[str, str | None] | Exception] = {}
        self.told: set[int] = set()
        self.nodes = {
            rank: FakeNode(Submission.decode(given, tmp_path / f"home-{rank}"), rank, "algo-1")
            for rank in (1, 2)
        }
        self._threads = [threading.Thread(target=self._run, args=(rank,)) for rank in self.nodes]

    def __enter__(self) -> Others:  # noqa: PYI034 - typing.Self came with Python 3.11
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def _run(self, rank: int) -> None:
        node = self.nodes[rank]
        agent = Agent(node.submission, rank, node, lambda: rank in self.told and bool(FakeNode.starts))  # type: ignore[arg-type]
        try:
            self.ends[rank] = agent.run("127.0.0.1", sagemaker_gang.PORT, patience=20.0)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.ends[rank] = error


def test_a_crash_of_one_node_stops_all_and_starts_all_again(image: Image, tmp_path: Path) -> None:
    FakeNode.endings = {0: ["stuck", "finished"], 1: [9, "finished"], 2: ["stuck", "finished"]}
    with Others(image, tmp_path) as others:
        assert main(image.root) == 0
    assert sorted(FakeNode.starts) == [(rank, start) for rank in range(3) for start in (1, 2)]
    assert others.ends == {1: ("finished", None), 2: ("finished", None)}
    record = image.store.read("small-1")
    assert (record.state, record.restarts) == ("finished", 1)
    assert [start.exit_codes for start in record.starts] == [(1, 9, 1), (0, 0, 0)]


def test_every_container_hears_how_the_job_ended(image: Image, tmp_path: Path) -> None:
    FakeNode.endings = {rank: [1, 1, 1] for rank in range(3)}
    with Others(image, tmp_path) as others:
        assert main(image.root) == 1
    assert set(others.ends) == {1, 2}
    for end in others.ends.values():
        assert isinstance(end, tuple)
        assert end[0] == "failed"
        assert "ended with exit code 1. It was restarted 2 times" in (end[1] or "")


def test_what_other_nodes_wrote_counts(image: Image, tmp_path: Path) -> None:
    """Only node 2 knows that the training finished: its exit file is on another machine."""
    FakeNode.endings = {0: [0], 1: [0], 2: ["finished"]}
    with Others(image, tmp_path):
        assert main(image.root) == 0


def test_a_container_that_is_told_to_stop_starts_nothing_more(image: Image, tmp_path: Path) -> None:
    """Three starts in vain are enough, as on every engine."""
    FakeNode.endings = {rank: ["hold"] * 3 for rank in range(3)}
    with Others(image, tmp_path) as others:
        others.told.add(1)
        assert main(image.root) == 75
    others_starts = sorted(start for start in FakeNode.starts if start[0] != 1)
    assert others_starts == [(rank, start) for rank in (0, 2) for start in (1, 2, 3)]
    assert (1, 2) not in FakeNode.starts
    assert image.store.read("small-1").state == "preempted"


def test_where_the_first_container_is_gone_the_others_end(image: Image, tmp_path: Path) -> None:
    FakeNode.endings = {1: ["hold"], 2: ["hold"]}
    with Others(image, tmp_path) as others:
        submission = others.nodes[1].submission
        gang = ContainerGang(submission, FakeNode(submission, 0, "algo-1"), sagemaker_gang.PORT)  # type: ignore[arg-type]
        gang.meet()
        for line in gang._lines.values():
            line.send(start=1)
        while len(FakeNode.starts) < 2:
            time.sleep(0.01)
        for line in gang._lines.values():
            line.close()
        assert gang._listener is not None
        gang._listener.close()
    assert others.ends == dict.fromkeys((1, 2), ("failed", "The first container is gone."))
    assert {node.code for node in others.nodes.values()} == {75}  # they had their grace


def test_where_another_container_is_gone_the_job_fails(image: Image, tmp_path: Path) -> None:
    """SageMaker ends the training job then; nothing is started that nobody joins."""
    FakeNode.endings = {0: ["hold"], 1: ["hold"], 2: ["hold"]}

    class Dying(FakeNode):
        def start(self, number: int) -> None:
            raise RuntimeError("killed")

    with Others(image, tmp_path) as others:
        others.nodes[2].__class__ = Dying
        assert main(image.root) == 1
    assert "The containers of these nodes are gone: 2." in (image.failure() or "")
    assert image.store.read("small-1").state == "failed"


@pytest.mark.parametrize("told", [True, False])
def test_a_container_that_never_meets_the_first_one_says_so(image: Image, told: bool) -> None:
    submission = Submission.decode(
        json.loads((image.root / "input/data/cloudtrain/job.json").read_text()), image.root
    )
    agent = Agent(submission, 1, FakeNode(submission, 1, "algo-1"), lambda: told)  # type: ignore[arg-type]
    if told:
        assert agent.run("127.0.0.1", sagemaker_gang.PORT, patience=20.0)[0] == "preempted"
    else:
        with pytest.raises(OSError, match="'127\\.0\\.0\\.1', does not answer"):
            agent.run("127.0.0.1", sagemaker_gang.PORT, patience=0.0)
    assert FakeNode.starts == []


def test_containers_that_do_not_come_are_named(image: Image, tmp_path: Path) -> None:
    hosts(image, ["algo-1", "algo-2"], "algo-1")
    job(image, 2)
    given = json.loads((image.root / "input/data/cloudtrain/job.json").read_text())
    submission = Submission.decode(given, tmp_path / "home")
    gang = ContainerGang(submission, FakeNode(submission, 0, "algo-1"), sagemaker_gang.PORT)  # type: ignore[arg-type]
    with pytest.raises(TimeoutError, match=r"nodes \[1\] have not come"):
        gang.meet(patience=0.0)
    gang.end("failed", None)


@pytest.mark.parametrize("sent", [b"[1]\n", b"{\n", b"x" * (sagemaker_gang.MAX_LINE + 2)])
def test_a_message_that_is_none_is_refused(sent: bytes) -> None:
    near, far = socket.socketpair()
    with near, far:
        thread = threading.Thread(target=far.sendall, args=(sent,))
        thread.start()
        line = Line(near)
        with pytest.raises(ValueError, match=r"object|Expecting|end"):
            all(line.messages(1.0) == [] for _ in range(100))
        near.close()
        with contextlib.suppress(OSError):
            thread.join(10)
