"""A trial of the user's script: start it in a scratch folder, follow its run, kill it, and start it again.

<scratch>/now/       the current trial; every start sees the same paths, so paths never differ
    start/work       current folder of the script: links to the content of ours
    start/output     what `{output_dir}` in the command stands for
    runs/…           the run
<scratch>/whole/     a trial that is over; its `start-1/` holds what the killed start left
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
from hf_cloudtrain.storage.names import LOCAL, META

POLL = 0.05
"""Seconds between two looks at the run."""
GRACE = 120.0
"""Seconds in which a script must end after SIGTERM; most clouds allow less."""
DELIVERY = 1.0
"""Seconds in which a launcher passes a signal to the training processes, which are held until then."""
RECORDS = 3.0
"""Seconds to wait before the kill for a heartbeat; the script sends two a second."""
LAST_LINES = 20
"""Lines of a script's output that an error quotes."""


class ScriptError(CloudTrainError):
    """The script did something that cannot be compared."""


class Trial:
    """One run of the script, in one start or in several.

    Args:
        command: arguments; `{output_dir}` in one of them stands for the output folder.
        on_heartbeat: called with the newest heartbeat while the script runs.
    """

    def __init__(
        self, scratch: Path, command: Sequence[str], on_heartbeat: Callable[[dict[str, Any]], None]
    ) -> None:
        self.folder = scratch / "now"
        self.folder.mkdir()
        self.seen: dict[CheckpointKey, Manifest] = {}
        """Every checkpoint that was committed, those deleted since included."""
        self.newest_when_killed: CheckpointKey | None = None
        self._command = command
        self._on_heartbeat = on_heartbeat
        self._starts = 0

    @property
    def catalog(self) -> Catalog:
        """The records of the run. Raises ScriptError unless there is exactly one run."""
        runs = self.folder / "runs"
        names = run_urls(Storage(str(runs))) if runs.is_dir() else []
        if not names:
            raise ScriptError(
                "The script started no run. It must train with CloudTrainCallback, TrainLoop or hf_cloudtrain.init, and with "
                f"a run URL from its code or from {env.RUN_URL}."
            )
        if len(names) > 1:
            raise ScriptError(
                f"The script used {len(names)} run URLs, but only one run can be compared. If its URL has a time or a random "
                "part, no start finds the checkpoints of the start before."
            )
        return Catalog(Storage(str(runs / names[0])))

    def run(self) -> int:
        """Start it and wait until it ends; the exit code."""
        with self._started() as process:
            while process.poll() is None:
                self._look()
                time.sleep(POLL)
        self._look()
        return process.returncode

    def run_until(self, step: int, number: signal.Signals) -> None:
        """Start it, and kill it once the checkpoint of a step is committed. Raises ScriptError if it ends before that."""
        rehearsal.write_hold(self.folder, step)
        with self._started() as process:
            while not any(key.step >= step for key in self.seen):
                if process.poll() is not None:
                    raise ScriptError(
                        f"The second start ended without saving step {step}, which the first one saved.\n{self.tail()}"
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
        """Rename the folder, which makes room for the next trial."""
        self.folder = self.folder.rename(self.folder.with_name(name))

    def tail(self) -> str:
        """The last lines of the script's output."""
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
        argv = [word.replace("{output_dir}", str(output)) for word in self._command]
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
                    argv,
                    cwd=work,
                    env={**inherited, **given},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches only us, and a signal to its group all of it
                )
            except OSError as error:
                raise ConfigurationError(f"Cannot start {argv[0]!r} ({error.strerror}).") from error
        try:
            yield process
        finally:
            kill_family(process)

    def _look(self) -> None:
        """Note new checkpoints, and the newest heartbeat."""
        try:
            catalog = self.catalog
            for key in catalog.checkpoints():
                if key not in self.seen:
                    self.seen[key] = catalog.read(key)
        except (ScriptError, NoCheckpointError):
            return  # it does not exist yet, or no longer
        numbers = catalog.attempts.numbers()
        self._on_heartbeat((catalog.attempts.read_progress(numbers[-1]) if numbers else None) or {})

    def _wait_for_records(self, step: int) -> None:
        """Wait for values logged before the kill: they show whether the script is deterministic. Not every script logs."""
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
    """A folder with links to the content of `original`, except for the output of earlier trainings."""
    work.mkdir()
    for path in original.iterdir():
        if path.name not in (LOCAL, META) and not any((path / own).is_dir() for own in (LOCAL, META)):
            (work / path.name).symlink_to(path)


def kill_family(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all its descendants: workers of torchrun are in sessions of their own."""
    import psutil  # comes with accelerate

    if process.poll() is None:
        launcher = psutil.Process(process.pid)
        launcher.suspend()  # it must not start a child while we list them
        for one in [*launcher.children(recursive=True), launcher]:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue
    process.wait()
