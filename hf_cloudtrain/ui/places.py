"""The folders whose runs are shown, what each run is called on the pages, and its job."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from hf_cloudtrain import env
from hf_cloudtrain.errors import CloudTrainError, ManifestError, NoCheckpointError
from hf_cloudtrain.jobs.records import KnownJobs
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.names import clean_path


class Places:
    """The folders whose runs are shown.

    Args:
        urls: of runs, or of folders with runs below them.
    """

    def __init__(self, urls: Iterable[str]) -> None:
        self.roots = [Storage(url, env.storage_options(None)) for url in urls]
        self._jobs: KnownJobs | None = None
        self._lock = threading.Lock()

    def find(self, run_id: str) -> tuple[Storage, str]:
        """The storage and the name below it of a run, by what the list calls it: '0/mnli'. Raises NoCheckpointError."""
        root, _, name = run_id.partition("/")
        if re.fullmatch(r"\d{1,4}", root) and int(root) < len(self.roots):
            with contextlib.suppress(ManifestError):
                return self.roots[int(root)], name and clean_path(name)
        raise NoCheckpointError(f"There is no run {run_id[:200]!r} on this page.")

    def id_of(self, run_url: str) -> str | None:
        """The id of the run at a URL; None where it is not below the folders that are shown."""
        for index, root in enumerate(self.roots):
            above = root.url.rstrip("/")
            for prefix in {above, above.removeprefix("file://")}:
                if run_url.rstrip("/") == prefix:
                    return f"{index}/"
                if run_url.startswith(f"{prefix}/"):
                    return f"{index}/{run_url[len(prefix) + 1 :].rstrip('/')}"
        return None

    def job_of(self, run_id: str) -> tuple[str, Path] | None:
        """The newest job that writes to a run, and the folder of its log on this machine; None without one."""
        try:
            with self._lock:
                self._jobs = self._jobs or KnownJobs()
                self._jobs.mirror.refresh()
                found = [record.id for record in self._jobs.records() if self.id_of(record.run_url) == run_id]
                return (found[-1], self._jobs.home(found[-1]) / "log") if found else None
        except (CloudTrainError, OSError):  # without a store the run can still be shown
            return None


def address(kind: str, what: str) -> str:
    """The address of a page, for a link."""
    return f"#/{kind}/{quote(what, safe='')}"
