"""A user's script on trial: started in a scratch folder, watched through its run, killed, and started again.

<scratch>/now/       the trial under way; every start sees the same paths, so paths are no difference
    start/work       current folder of the script: links to what is in ours
    start/output     where the command says `{output_dir}`
    runs/…           the run
<scratch>/whole/     a trial that is over; its `start-1/` is what the killed start left
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints import rehearsal
from hf_cloudtrain.checkpoints.attempts import run_urls
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError, NoCheckpointError
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.names import META

POLL = 0.05
"""Seconds between two looks at a run."""
GRACE = 120.0
"""Seconds that a script may take to end after SIGTERM; most clouds give less."""
DELIVERY = 1.0
"""Seconds that a signal may take through a launcher to the processes that train, which wait meanwhile."""
RECORDS = 3.0
"""Seconds to wait for a heartbeat, which comes twice a second, before the kill."""
LAST_LINES = 20
"""Lines of a script's output that tell why it failed."""


class ScriptError(CloudTrainError):
    """The script did not do what can be compared."""


class Trial:
    """One run of the script, in one start or in several.

    Args:
        command: words; `{output_dir}` in one stands for the output folder.
        told: hears of the newest heartbeat while the script runs.
    """

    def __init__(self, scratch: Path, command: Sequence[str], told: Callable[[dict[str, Any]], None]) -> None:
        self.folder = scratch / "now"
        self.folder.mkdir()
        self.seen: dict[CheckpointKey, Manifest] = {}
        """Every checkpoint that was committed, those that were retired since included."""
        self.newest_when_killed: CheckpointKey | None = None
        self._command = command
        self._told = told
        self._starts = 0

    @property
    def catalog(self) -> Catalog:
        """The records of the run. Raises ScriptError where there is not exactly one."""
        runs = self.folder / "runs"
        names = run_urls(Storage(str(runs))) if runs.is_dir() else []
        if not names:
            raise ScriptError(
                "The script started no run. It must train with CloudTrainCallback, TrainLoop or hf_cloudtrain.init, with a "
                f"run URL from the code or from {env.RUN_URL}."
            )
        if len(names) > 1:
            raise ScriptError(
                f"The script named {len(names)} run URLs, and one run can be compared. Where the URL has a time or a random "
                "part, no start finds what the one before has saved."
            )
        return Catalog(Storage(str(runs / names[0])))

    def run(self) -> int:
        """Start it and wait for its end; gives the exit code."""
        with self._started() as process:
            while process.poll() is None:
                self._look()
                time.sleep(POLL)
        self._look()
        return process.returncode

    def run_until(self, step: int, number: signal.Signals) -> None:
        """Start it, and end it by a signal once the checkpoint of a step is committed. Raises ScriptError if it ends first."""
        rehearsal.write_hold(self.folder, step)
        with self._started() as process:
            while not any(key.step >= step for key in self.seen):
                if process.poll() is not None:
                    raise ScriptError(
                        f"The second start ended before it had saved step {step}, where the first one did.\n{self.tail()}"
                    )
                time.sleep(POLL)
                self._look()
            self._wait_for_records(step)
            if number == signal.SIGTERM:
                os.killpg(process.pid, signal.SIGTERM)
                time.sleep(DELIVERY)
                rehearsal.let_go(self.folder)
                self._wait_for_end(process)
        self._look()
        self.newest_when_killed = max(self.seen)
        (self.folder / "hold").unlink()
        (self.folder / "start").rename(self.folder / f"start-{self._starts}")

    def finish(self, name: str) -> None:
        """Put the folder where the next trial does not meet it."""
        self.folder = self.folder.rename(self.folder.with_name(name))

    def tail(self) -> str:
        """The last lines that the script said."""
        lines = self._log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-LAST_LINES:])

    @property
    def _log(self) -> Path:
        return self.folder / f"output-{self._starts}.log"

    @contextmanager
    def _started(self) -> Iterator[subprocess.Popen[bytes]]:
        self._starts += 1
        start = self.folder / "start"
        work, output = start / "work", start / "output"
        output.mkdir(parents=True)
        make_work_folder(Path.cwd(), work)
        words = [word.replace("{output_dir}", str(output)) for word in self._command]
        given = {
            env.VERIFY_FOLDER: str(self.folder),
            env.RUN_URL: f"{self.folder}/runs/run",
            env.CHECKPOINT_DIR: str(start / "checkpoint"),
            env.HEARTBEAT: "0.5",
            "PWD": str(work),
        }
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in (env.RESTORED_CHECKPOINT, env.EXIT_FILE, env.STOP_FILE)
        }
        with open(self._log, "wb") as log:
            try:
                process = subprocess.Popen(
                    words,
                    cwd=work,
                    env={**inherited, **given},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is for us, and a signal to its group for all of it
                )
            except OSError as error:
                raise ConfigurationError(f"{words[0]!r} cannot be started ({error.strerror}).") from error
        try:
            yield process
        finally:
            kill_family(process)

    def _look(self) -> None:
        """Note what was committed since, and how far it is."""
        try:
            catalog = self.catalog
            for key in catalog.checkpoints():
                if key not in self.seen:
                    self.seen[key] = catalog.read(key)
        except (ScriptError, NoCheckpointError):
            return  # not yet, or not any more
        numbers = catalog.attempts.numbers()
        self._told((catalog.attempts.read_progress(numbers[-1]) if numbers else None) or {})

    def _wait_for_records(self, step: int) -> None:
        """What was logged before the kill shows whether the script repeats itself; not every script logs."""
        deadline = time.monotonic() + RECORDS
        while time.monotonic() < deadline:
            catalog = self.catalog
            progress = catalog.attempts.read_progress(catalog.attempts.numbers()[-1]) or {}
            if progress.get("step", -1) >= step:
                return
            time.sleep(POLL)

    def _wait_for_end(self, process: subprocess.Popen[bytes]) -> None:
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            raise ScriptError(
                f"The script did not end within {GRACE:.0f} s after SIGTERM.\n{self.tail()}"
            ) from None


def make_work_folder(original: Path, work: Path) -> None:
    """A folder that looks like `original` by links, without what trainings have left in it: those start empty."""
    work.mkdir()
    for path in original.iterdir():
        if path.name != META and not (path / META).is_dir():
            (work / path.name).symlink_to(path)


def kill_family(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and all below it: workers of torchrun are in sessions of their own."""
    import psutil  # comes with accelerate

    if process.poll() is None:
        launcher = psutil.Process(process.pid)
        launcher.suspend()  # it must not start anything while we look
        for one in [*launcher.children(recursive=True), launcher]:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue
    process.wait()
