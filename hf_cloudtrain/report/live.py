"""The page that lives with a run: `index.html` beside the run on storage, renewed while it trains.

    LivePage      in the training process, on rank 0: a thread that starts a process after a commit, at most once a minute
    that process  reads the records of the run that are new, writes the page, and ends: `main`

The process takes a second of a core, which the training's own process would feel in each step. Whatever happens to it, the
training continues.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.paths import PAGE, PROGRESS
from hf_cloudtrain.checkpoints.run_deletion import deleted_by, is_page
from hf_cloudtrain.checkpoints.upload_status import UploadStatus
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError
from hf_cloudtrain.report.page import PAGE_NEEDS, RENEWED_SECONDS, Report, check_extra_installed
from hf_cloudtrain.runtime import own_process
from hf_cloudtrain.runtime.redaction import redact
from hf_cloudtrain.runtime.threads import SafeTurn, before_exit
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.tracking.mirror import Mirror

logger = logging.getLogger(__name__)

CONTENT_TYPE = "text/html; charset=utf-8"
SHORTEST_SECONDS = 60.0
"""From one renewal to the next; the last page of an attempt does not wait for it."""
LOOK_SECONDS = 1.0
LIMIT_SECONDS = 120.0
"""A process that takes longer is ended."""
LAST_SECONDS = 20.0
"""The end of a training waits so long for its last page. The process that writes it may live on for `LIMIT_SECONDS`."""
NICENESS = 10
_START = f"""\
{own_process.START}\
from hf_cloudtrain.report.live import main
main()
"""


def is_wanted(argument: bool | None) -> bool:
    """Whether a page lives with the run, from the argument, else from `HF_CLOUDTRAIN_PAGE`.

    Raises:
        MissingExtraError: it is wanted, and its packages are not installed.
    """
    wanted = env.page(argument)
    if wanted:
        check_extra_installed("The page of a run", *PAGE_NEEDS)
    return wanted


class LivePage:
    """Renews the page of a run.

    Args:
        storage: of the run.
        uploads: tells of commits.

    Example:
        >>> page = LivePage(catalog.storage, checkpointer.uploads)
        >>> page.start()
        >>> page.close(last=True)      # after the last heartbeat: the page says how the attempt ended
    """

    def __init__(self, storage: Storage, uploads: UploadStatus) -> None:
        url, options = storage.connection
        self._job: dict[str, Any] = {"url": url, "options": options, "check": True, "records": None}
        self._folder = ""
        """Of the records that one process leaves for the next."""
        self._uploads = uploads
        self._turn = SafeTurn("The page of the run")
        self._told = False
        self._closing = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        """Held while `_child` is started or ended."""
        self._thread = threading.Thread(target=self._renew_again, name="cloudtrain-page", daemon=True)

    def start(self) -> None:
        """Start the thread. The first page comes at once."""
        with contextlib.suppress(OSError):  # without a folder each process reads everything
            self._folder = tempfile.mkdtemp(prefix="cloudtrain-page-")
            self._job["records"] = f"{self._folder}/records.zip"
        self._thread.start()
        before_exit(self._close_at_exit)

    def close(self, *, last: bool) -> None:
        """End the thread.

        Args:
            last: write the page again, now that the end of the attempt is recorded.
        """
        if self._closing.is_set():
            return
        with self._lock:
            self._closing.set()
            if self._child is not None:
                self._child.kill()  # what it has read is older than the end
        self._thread.join(LIMIT_SECONDS)
        if last:
            with self._turn:
                self._renew(LAST_SECONDS, kill=False)
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _close_at_exit(self) -> None:
        self.close(last=True)

    def _renew_again(self) -> None:
        shown: CheckpointKey | None = None
        began = -RENEWED_SECONDS
        while not self._closing.is_set():
            ago, committed = time.monotonic() - began, self._uploads.last_committed
            if ago >= RENEWED_SECONDS or (ago >= SHORTEST_SECONDS and committed != shown):
                began, shown = time.monotonic(), committed
                with self._turn:
                    self._renew(LIMIT_SECONDS)
            self._closing.wait(LOOK_SECONDS)

    def _renew(self, limit: float, *, kill: bool = True) -> None:
        """Let a process write the page, and wait for it."""
        try:
            job = json.dumps(self._job).encode()
        except TypeError as error:
            self._tell(f"the storage options cannot be passed to a different process ({error})")
            return
        with self._lock:
            if kill and self._closing.is_set():
                return
            child = self._child = subprocess.Popen(
                own_process.command(_START),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd="/",
                start_new_session=True,  # Ctrl-C and a killed process group pass it by
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"},
            )
        try:
            _, told = child.communicate(job, limit)
        except subprocess.TimeoutExpired:
            if kill:
                child.kill()
                child.communicate()
            self._tell(f"its process takes longer than {limit:.0f} s")
            return
        if child.returncode == 0:
            self._job["check"] = False  # the page is ours
        elif not (kill and self._closing.is_set()):
            lines = told.decode(errors="replace").strip().splitlines()
            self._tell(lines[-1] if lines else f"its process ended with exit code {child.returncode}")

    def _tell(self, reason: str) -> None:
        say = logger.debug if self._told else logger.warning
        self._told = True
        say("The page of the run was not renewed; training continues. %s", redact(reason)[:500])


def write_page(catalog: Catalog, *, check: bool = True, records: Path | None = None) -> int:
    """Write the page of a run beside it; its size in bytes.

    Args:
        check: whether to look at what is there.
        records: file with the records that the last call has read, so that only new ones are read; it is written again.

    Raises:
        ConfigurationError: there is a file of that name which this package did not write.
    """
    storage = catalog.storage
    if check and not is_page(storage):
        raise ConfigurationError(
            f"{storage.url.rstrip('/')}/{PAGE} was not written by this package. Move it, or train without page=True."
        )
    mirror = Mirror(storage)
    if records is not None:
        mirror.load(records)
    mirror.refresh()
    for beat in mirror.list(PROGRESS)[-1:]:
        mirror.fetch(beat.path)
    mirror.fetch_all(mirror.missing())
    page = Report(Catalog(mirror)).html(live=True)
    if records is not None:
        with contextlib.suppress(OSError):  # a full disk: the next call reads everything again
            mirror.save(records)
    if deleted_by(catalog) is not None:
        return 0
    storage.write(PAGE, page, page=CONTENT_TYPE)
    return len(page)


def main() -> None:
    """Run as a process of its own: URL and options of the run come through stdin."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the training decides when it ends
    signal.alarm(int(LIMIT_SECONDS))
    os.nice(NICENESS)
    logging.disable()  # the training need not know of damaged records
    job: dict[str, Any] = json.load(sys.stdin)
    records = Path(job["records"]) if job["records"] else None
    try:
        write_page(Catalog(Storage(job["url"], job["options"])), check=job["check"], records=records)
    except CloudTrainError as error:
        sys.exit(" ".join(str(error).split()))
