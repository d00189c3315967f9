"""The entry point: how a job ends for SageMaker, and signals before it runs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_cloudtrain.jobs.engines.sagemaker.container_main import main, write_failure
from hf_cloudtrain.preemption.sources import RUN_STOP
from tests.unit.jobs.engines.sagemaker._container import FakeNode, Image, hosts


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
        (["SIGTERM"], 75, "preempted: Stopped by SIGTERM. The newest checkpoint is 000001-0000000006."),
        (["preempted", "finished"], 0, None),
        (["run stop"], 75, f"cancelled: Saved and stopped by {RUN_STOP}"),
        ([0], 1, "failed: The command ended with exit code 0 and trained nothing"),
    ],
)
def test_the_end_of_a_job_is_reported_to_sagemaker(
    image: Image, endings: list[str | int], code: int, failure: str | None
) -> None:
    """It is supervised as on every engine: restarted after a crash, `max_restarts` times (2 here)."""
    starts = len(endings)
    FakeNode.endings = {0: endings}
    assert main(image.root) == code
    assert FakeNode.starts == [(0, number + 1) for number in range(starts)]
    assert (image.failure() or "").startswith(failure or "")
    assert (image.failure() is None) == (failure is None)
    assert len(image.store.read("small-1").starts) == starts


def test_a_job_that_sagemaker_stops_is_not_over_in_its_record(image: Image) -> None:
    """SageMaker may start new machines (spot), or not (`max_run` is over)."""
    FakeNode.endings = {0: ["SIGTERM"]}
    assert main(image.root) == 75
    record = image.store.read("small-1")
    assert not record.is_over
    assert record.reason == "Stopped by SIGTERM. The newest checkpoint is 000001-0000000006."


def test_a_cancelled_job_starts_nothing_and_says_so(image: Image) -> None:
    image.store.ask_to_cancel("small-1")
    assert main(image.root) == 75
    assert FakeNode.starts == []
    assert (image.failure() or "").startswith("cancelled: ")
    assert image.store.read("small-1").state == "cancelled"


def test_a_wrong_number_of_hosts_is_refused(image: Image) -> None:
    hosts(image, ["algo-1", "algo-2"], "algo-1")
    assert main(image.root) == 1
    assert image.failure() == "failed: The job has 1 nodes, but SageMaker started 2."


def test_a_missing_channel_is_reported(image: Image) -> None:
    (image.root / "input/data/cloudtrain/job.json").unlink()
    assert main(image.root) == 1
    assert "the channel 'cloudtrain' must contain it" in (image.failure() or "")


def test_the_failure_is_short_ends_at_a_character_and_has_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret-value")
    write_failure(tmp_path, "secret-value " + "é" * 2000)
    written = (tmp_path / "output/failure").read_bytes()
    assert 1022 <= len(written) <= 1024
    assert written.decode().startswith("*** é")


def test_sigterm_before_the_command_runs_ends_the_container_at_once(image: Image, tmp_path: Path) -> None:
    """The first process of a container has no default handler. Here it waits for a name that never resolves."""
    hosts(image, ["algo-1.invalid"], "algo-1.invalid")
    script = (
        "import sys; from pathlib import Path\n"
        "from hf_cloudtrain.jobs.engines.sagemaker import container, container_main\n"
        "def wait(host):\n"
        "    print('waits', flush=True)\n"
        "    import time; time.sleep(60)\n"
        "container.wait_for_name = wait\n"
        f"sys.exit(container_main.main(Path({str(image.root)!r})))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("waits" in line for line in process.stdout)
        began = time.monotonic()
        process.terminate()
        assert process.wait(30) == 75
        assert time.monotonic() - began < 30
    assert image.failure() == "preempted: Stopped while no command ran."


def test_the_entry_point_installs_its_handlers_before_the_slow_imports() -> None:
    code = (
        "import sys, hf_cloudtrain.jobs.engines.sagemaker.container_main\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules} & {'pydantic', 'fsspec', 'yaml', 'boto3'}))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "\n"
    )
