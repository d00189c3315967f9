"""`cloudtrain launch` as a user types it, with whole processes: a plain script, torchrun, a notebook."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.storage.client import Storage
from tests.integration._jobs import TRAIN, value_after
from tests.integration._lab import max_difference, problems
from tests.integration._torchrun import PATHS, kill_family
from tests.unit.cli.terminal import ENTRY_POINT

SCRIPT = str(Path(__file__).with_name("_plain_script.py"))
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes", "1"]
PATIENCE = 300.0


class Machine:
    """A folder, and the commands that run in it."""

    def __init__(self, folder: Path, run_url: str) -> None:
        self.folder = folder
        self.run_url = run_url
        folder.mkdir()

    def start(self, *command: str, launch: bool = True) -> psutil.Popen:
        front = [str(ENTRY_POINT), "launch", "--run-url", self.run_url, "--"] if launch else []
        with open(self.folder / "log", "w") as log:
            return psutil.Popen(
                [*front, sys.executable, *command],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": PATHS},
                stdout=log,
                stderr=log,
            )

    def run(self, *command: str, launch: bool = True) -> None:
        process = self.start(*command, launch=launch)
        try:
            assert process.wait(PATIENCE) == 0, self.log
        finally:
            kill_family(process)

    def run_until_killed(self, *command: str, commits: int, moment: float) -> None:
        """Kill the launch and all below it, some time after a number of further commits."""
        wanted = len(self.commits) + commits
        process = self.start(*command)
        try:
            self.wait_for_commits(process, wanted)
            time.sleep(moment)
            assert process.poll() is None, "it was too fast for the kill"
        finally:
            kill_family(process)

    def wait_for_commits(self, process: psutil.Popen, wanted: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while len(self.commits) < wanted:
            assert process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)

    @property
    def commits(self) -> list[str]:
        folder = Path(self.run_url, ".cloudtrain", "checkpoints")
        return sorted(os.listdir(folder)) if folder.is_dir() else []

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    @property
    def weights(self) -> Path:
        return self.folder / "out" / "weights.safetensors"


@pytest.fixture
def machines(tmp_path: Path) -> list[Machine]:
    return [Machine(tmp_path / name, str(tmp_path / "run")) for name in ("plain", "first", "second", "third")]


@pytest.mark.parametrize(
    "launcher", [[], pytest.param(ACCELERATE, marks=pytest.mark.slow)], ids=["python", "accelerate launch"]
)
def test_a_plain_script_is_killed_and_goes_on_in_an_empty_folder(
    machines: list[Machine], launcher: list[str]
) -> None:
    _, first, second, _ = machines
    first.run_until_killed(*launcher, SCRIPT, "out", "0.2", commits=1, moment=0.3)
    second.run(*launcher, SCRIPT, "out")
    assert "has hooked the train() of Trainer" in first.log
    assert ", attempt 2: resumes from checkpoint-" in second.log
    assert "has hooked no training" not in second.log
    catalog = Catalog(Storage(second.run_url))
    assert catalog.checkpoints()[-1].step == 48
    assert problems(catalog) == []


def test_a_training_that_the_system_kills_tells_what_is_safe(machines: list[Machine]) -> None:
    _, first, _, _ = machines
    process = first.start(SCRIPT, "out", "0.2")
    try:
        first.wait_for_commits(process, 1)
        for child in process.children():
            child.kill()
        assert process.wait(PATIENCE) == 128 + signal.SIGKILL
    finally:
        kill_family(process)
    last = first.log.splitlines()[-1]
    newest = Catalog(Storage(first.run_url)).checkpoints()[-1]
    assert last.startswith(
        f"The command was ended by SIGKILL. {newest.title} is safe in {first.run_url!r}, and the same command "
        "resumes from it."
    )


def test_a_script_with_the_functions_finds_its_checkpoint_folder_restored(
    machines: list[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first, second, _ = machines
    monkeypatch.setenv("HF_CLOUDTRAIN_CHECKPOINT_DIR", "ckpt")
    for machine in (first, second):
        (machine.folder / "train.py").write_text(TRAIN)
    first.run_until_killed("train.py", "40", "0.1", commits=1, moment=0.2)
    second.run("train.py", "40", "0")
    assert "begins at 0" not in second.log
    assert ", attempt 2: resumes from checkpoint-" in second.log
    assert f"ends with {value_after(40)!r}" in second.log
    assert "has hooked no training" not in second.log


@pytest.mark.slow
def test_law_7_torchrun_is_killed_twice_at_random_and_equals_the_uninterrupted_run(
    machines: list[Machine],
) -> None:
    plain, first, second, third = machines
    chance = random.Random(os.environ.get("CHAOS_SEED", "1"))
    plain.run(*TORCHRUN, SCRIPT, "out", launch=False)
    for machine in (first, second):
        moment = chance.uniform(0.0, 1.0)
        machine.run_until_killed(*TORCHRUN, SCRIPT, "out", "0.25", commits=1, moment=moment)
    third.run(*TORCHRUN, SCRIPT, "out")
    assert ", attempt 3: resumes from checkpoint-" in third.log
    assert max_difference(third.weights, plain.weights) == 0.0
    assert problems(Catalog(Storage(third.run_url))) == []


NOTEBOOK = """
import sys
sys.argv = ["notebook", "out"]
exec(open({script!r}).read().replace('if __name__ == "__main__":', "if True:"))
"""
RUN_NOTEBOOK = """
import nbclient, nbformat
book = nbformat.read("book.ipynb", as_version=4)
nbclient.NotebookClient(book, timeout=300, kernel_name="python3").execute()
nbformat.write(book, "book.ipynb")
"""


@pytest.mark.slow
def test_a_cell_of_a_notebook_trains_and_a_second_run_of_the_cell_is_the_same_run(
    machines: list[Machine],
) -> None:
    _, first, _, _ = machines
    cell = NOTEBOOK.format(script=SCRIPT)
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell), nbformat.v4.new_code_cell(cell)])
    nbformat.write(book, first.folder / "book.ipynb")
    (first.folder / "run.py").write_text(RUN_NOTEBOOK)
    first.run("run.py")
    cells = nbformat.read(first.folder / "book.ipynb", as_version=4).cells
    once, again = ("".join(output.get("text", "") for output in one.outputs) for one in cells)
    assert "has hooked the train() of Trainer" in once
    assert ", attempt 1: starts at step 0 of 48" in once
    assert "The run is complete" in again
    assert "trainer-2" not in again
    assert "has hooked no training" not in first.log
    assert [int(name[7:17]) for name in first.commits][-1] == 48
