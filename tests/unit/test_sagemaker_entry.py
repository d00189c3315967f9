"""The entry point of SageMaker's containers: what it finds, what it makes, and how it ends."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain import node
from hf_cloudtrain.datasets import DatasetStore
from hf_cloudtrain.engines import sagemaker_entry
from hf_cloudtrain.engines.sagemaker_entry import Container, main, unpack, wait_for_name, write_failure
from hf_cloudtrain.job import parse_job
from hf_cloudtrain.submission import Submission

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
    """Stands for `run_node`: ends as it is told to, and leaves behind what a node would."""

    def __init__(self, *endings: str | int) -> None:
        self.endings = list(endings)
        self.calls: list[dict[str, Any]] = []

    def __call__(self, submission: Submission, **given: Any) -> int:
        self.calls.append({"submission": submission, "environment": dict(os.environ), **given})
        ending = self.endings.pop(0)
        rank, start = given["node_rank"], given["start"]
        outcome = ending if isinstance(ending, str) else None
        status = {"finished": 0, "preempted": 75, "told": 75}.get(str(ending), 1) if outcome else ending
        for path, content in (
            (
                submission.exit_file(rank, start),
                {"outcome": {"told": "preempted"}.get(str(outcome), outcome)},
            ),
            (submission.node_file(rank, start), {"exit_code": status, "stopped": ending == "told"}),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            if outcome or "stopped" in content:
                path.write_text(json.dumps(content))
        assert isinstance(status, int)
        return status


@dataclasses.dataclass
class Image:
    """A container's folders."""

    root: Path
    place: Path

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
    found = Image(tmp_path / "ml", tmp_path / "place")
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
    monkeypatch.setattr(sagemaker_entry, "PAUSE", 0.0)
    monkeypatch.setattr(sagemaker_entry, "wait_for_name", lambda host: None)
    sagemaker_entry._heard.clear()
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
    submission = Submission(
        read, plan, "small-1", "s3://b/runs/small", "s3://b/store", image.root, has_workspace
    )
    image.bring("data/cloudtrain/job.json", json.dumps(submission.encode()))


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeNode]:
    def give(*endings: str | int) -> FakeNode:
        fake = FakeNode(*endings)
        monkeypatch.setattr(node, "run_node", fake)
        return fake

    return give


# --- What it makes ---------------------------------------------------------------------------------------------------


def test_the_job_finds_everything_at_its_paths(image: Image, ends: Callable[..., FakeNode]) -> None:
    fake = ends("finished")
    assert main(image.root) == 0
    assert os.access(image.place / "workspace/run.sh", os.X_OK)
    assert (image.place / "data/a.txt").read_text() == "1 2 3\n"
    assert (image.place / "workspace/ckpt").resolve() == (image.root / "checkpoints").resolve()
    assert not os.path.lexists(image.place / "workspace/out")  # it leads to another machine's file
    call = fake.calls[0]
    assert (call["node_rank"], call["master_addr"], call["master_port"], call["start"]) == (
        0,
        "algo-1",
        7777,
        1,
    )
    assert call["submission"].job.data is None  # it is there: nothing is downloaded a second time
    assert call["submission"].plan.grace == 105.0
    assert call["wrap"](None, (), ["true"]) == ["true"]  # nothing is mounted
    assert node.real_checkpoint_dir(call["submission"]).resolve() == (image.root / "checkpoints").resolve()
    kept = image.root / "output/data/cloudtrain/algo-1/0/exit-1.json"
    assert json.loads(kept.read_text()) == {"outcome": "finished"}
    assert image.failure() is None


def test_scripts_for_sagemaker_find_their_variables(image: Image, ends: Callable[..., FakeNode]) -> None:
    hosts(image, ["algo-2", "algo-10", "algo-1"], "algo-2")
    job(image, 3)
    os.environ["AWS_REGION"] = "eu-west-1"
    fake = ends("finished")
    assert main(image.root) == 0
    found = fake.calls[0]["environment"]
    assert json.loads(found["SM_HOSTS"]) == ["algo-1", "algo-10", "algo-2"]
    assert found["SM_CURRENT_HOST"] == "algo-2"
    assert found["SM_CURRENT_HOST_RANK"] == "2"
    assert fake.calls[0]["node_rank"] == 2
    assert json.loads(found["SM_CHANNELS"]) == ["dataset", "train"]
    assert Path(found["SM_CHANNEL_TRAIN"], "b.txt").read_text() == "4\n"
    assert found["SM_MODEL_DIR"] == str(image.root / "model")
    assert json.loads(found["SM_HPS"]) == {"lr": 0.1, "name": "x y"}
    assert (found["SM_HP_LR"], found["SM_HP_NAME"]) == ("0.1", "x y")
    assert found["NCCL_SOCKET_IFNAME"] == found["GLOO_SOCKET_IFNAME"] == "eth7"
    assert found["AWS_DEFAULT_REGION"] == "eu-west-1"
    assert int(found["SM_NUM_GPUS"]) >= 0


def test_records_that_sagemaker_has_brought_back_are_no_records(
    image: Image, ends: Callable[..., FakeNode]
) -> None:
    """S3 gives files other inodes and times, so an outbox of before is no longer what it says."""
    for path in (
        "checkpoints/.cloudtrain/outbox/x",
        "checkpoints/out/.cloudtrain/y",
        "checkpoints/out/model",
    ):
        (image.root / path).parent.mkdir(parents=True, exist_ok=True)
        (image.root / path).write_text("z")
    ends("finished")
    assert main(image.root) == 0
    assert [path.name for path in (image.root / "checkpoints").rglob("*") if path.is_file()] == ["model"]


def test_a_dataset_that_arrived_damaged_is_not_trained_on(
    image: Image, ends: Callable[..., FakeNode]
) -> None:
    fake = ends("finished")
    image.bring("data/dataset/a.txt", "1 2 4\n")
    assert main(image.root) == 1
    assert fake.calls == []
    assert "'numbers' is not what was stored" in (image.failure() or "")
    assert not (image.place / "data").exists()


def test_what_the_image_has_at_a_mount_path_is_not_hidden(
    image: Image, ends: Callable[..., FakeNode]
) -> None:
    fake = ends("finished")
    (image.place / "workspace").mkdir()
    (image.place / "workspace/README").write_text("of the image")
    assert main(image.root) == 1
    assert fake.calls == []
    assert "would hide" in (image.failure() or "")
    assert (image.place / "workspace/README").exists()


def test_without_a_workspace_the_image_s_own_is_the_job_s(
    image: Image, ends: Callable[..., FakeNode]
) -> None:
    job(image, 1, has_workspace=False)
    (image.place / "workspace").mkdir()
    (image.place / "workspace/main.py").write_text("of the image")
    fake = ends("finished")
    assert main(image.root) == 0
    assert (fake.calls[0]["submission"].workspace / "main.py").read_text() == "of the image"


def test_a_checkpoint_folder_that_the_workspace_brings_stays(
    image: Image, ends: Callable[..., FakeNode], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "code/ckpt").mkdir()
    (tmp_path / "code/ckpt/old.pt").write_text("old")
    with tarfile.open(image.root / "input/data/cloudtrain/workspace.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "code", arcname=".")
    ends("finished")
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
    ("nodes", "endings", "code", "failure"),
    [
        (1, ["finished"], 0, None),
        (1, [1, "finished"], 0, None),
        (1, ["failed", 1, 3], 1, "failed: The command of node 0 ended with exit code 3."),
        (2, [1], 1, "failed: The command of node 0 ended with exit code 1."),
        (1, ["told"], 75, "preempted: Stopped by SageMaker. Nothing was saved."),
        (1, ["preempted"], 75, "preempted: Saved and stopped by None."),
        (1, [0], 1, "failed: The command ended with exit code 0 and trained nothing"),
    ],
)
def test_the_end_of_a_node_is_told_to_sagemaker(
    image: Image,
    ends: Callable[..., FakeNode],
    nodes: int,
    endings: list[str | int],
    code: int,
    failure: str | None,
) -> None:
    """A node that is alone is started again after a crash, `max_restarts` times (2 here)."""
    hosts(image, [f"algo-{number + 1}" for number in range(nodes)], "algo-1")
    job(image, nodes)
    fake = ends(*endings)
    assert main(image.root) == code
    assert [call["start"] for call in fake.calls] == list(range(1, len(endings) + 1))
    assert (image.failure() or "").startswith(failure or "")
    assert (image.failure() is None) == (failure is None)


def test_another_number_of_hosts_than_the_job_has_is_refused(
    image: Image, ends: Callable[..., FakeNode]
) -> None:
    ends("finished")
    hosts(image, ["algo-1", "algo-2"], "algo-1")
    assert main(image.root) == 1
    assert image.failure() == "failed: The job has 1 nodes, and SageMaker started 2."


def test_a_container_without_its_channel_says_so(image: Image, ends: Callable[..., FakeNode]) -> None:
    ends("finished")
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
    monkeypatch.setattr(sagemaker_entry, "PAUSE", 0.0)
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
        "import sys; from pathlib import Path; from hf_cloudtrain.engines import sagemaker_entry as entry\n"
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
