"""What `cloudtrain doctor` looks at, in this order; each check has the command or setting that mends it."""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.errors import (
    CloudTrainError,
    MissingExtraError,
    StorageError,
    StoragePermissionError,
)
from hf_cloudtrain.runtime.redaction import redact
from hf_cloudtrain.runtime.text import duration_text, size_text
from hf_cloudtrain.storage import diagnosis
from hf_cloudtrain.storage.backend import PART_SIZE
from hf_cloudtrain.storage.client import PROBES, Storage
from hf_cloudtrain.storage.diagnosis import SetUp
from hf_cloudtrain.storage.failures import ASK_DOCTOR

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "not checked"

RATE_SIZES = tuple(2**20 * size for size in (1, 8, 64))
"""Bytes of the files whose transfers are timed, until one takes `RATE_SECONDS`."""
RATE_SECONDS = 1.0
CLOCK_LIMIT = 300.0
"""Seconds. S3 and Azure refuse requests that are signed 15 minutes off; heartbeats of two machines are compared sooner."""
SAVES_PER_HOUR = 6
"""Of the example on docs/cost.md."""
SMALL_FILES, LARGE_FILES = 9, 2
"""Files of a Trainer checkpoint: model and optimizer are larger than a part."""
PUT_PRICE, GET_PRICE = 0.005 / 1000, 0.0004 / 1000
"""Dollars for one PUT or LIST and for one GET or HEAD: S3 Standard in us-east-1, as on docs/cost.md."""

_IN_CREDENTIALS = re.compile(
    r"InvalidAccessKeyId|SignatureDoesNotMatch|AuthenticationFailed|ExpiredToken|InvalidToken|TokenRefreshRequired|"
    r"no credentials were found|[Uu]nauthenticated|signature we calculated|authenticate the request|[Aa]ccess [Kk]ey Id"
)


@dataclass
class Line:
    """One line of the answer."""

    check: str
    state: str
    found: str | None = None
    mend: str | None = None
    error: str | None = None
    measured: dict[str, float] = field(default_factory=dict)
    """Numbers, for `--json`."""


class Doctor:
    """The checks of one URL."""

    def __init__(self, url: str, checkpoint_size: int) -> None:
        self._options = env.storage_options(None)
        self._given = url
        self.storage = Storage(url, self._options)
        self._size = checkpoint_size
        self._path = f"{PROBES}/probe-{secrets.token_hex(8)}"
        self._data = secrets.token_bytes(32)
        self._rates: dict[str, float] = {}
        self._is_written = False

    def lines(self) -> Iterator[Line]:
        """Each line when it is known; those that need one that failed are not checked."""
        try:
            set_up = diagnosis.set_up(self._given, self._options)
        except ImportError as error:
            yield Line("packages", FAILED, mend=_install(self.storage), error=str(error))
            return
        except Exception as error:  # noqa: BLE001 - each provider's library has errors of its own
            yield Line("credentials", FAILED, mend="correct its settings", error=redact(str(error)))
            return
        try:
            yield from self._of_storage(set_up)
        except BaseException:  # Ctrl-C in a transfer: the probe may have 64 MB
            with contextlib.suppress(CloudTrainError):
                self._forget_probe()
            raise
        yield self._clock(set_up)
        yield self._disk()
        yield from self._checkpoint(set_up)

    def _of_storage(self, set_up: SetUp) -> Iterator[Line]:
        lines = self._access(set_up)
        yield from lines
        usable = {line.check for line in lines if line.state in (OK, WARNING)}
        for check, transfer in (("upload", self._upload), ("download", self._download)):
            if {"write", "read"} <= usable and "upload" in (*self._rates, check):
                yield self._line(set_up, check, transfer)
            else:
                yield Line(check, SKIPPED)
        if "write" in usable:
            deleted = self._line(set_up, "delete", self._delete)
            if deleted.state != OK:
                yield deleted

    def _access(self, set_up: SetUp) -> list[Line]:
        """Credentials, server, bucket, and what they allow."""
        if set_up.credentials is None:
            first = Line("credentials", FAILED, mend=set_up.log_in, error="No credentials were found.")
        else:
            first = Line("credentials", OK, set_up.credentials)
        place = Line("server", OK, ", ".join(filter(None, (set_up.endpoint, set_up.region))) or set_up.server)
        bucket = Line("bucket", OK, set_up.bucket)
        checks: list[tuple[str, Callable[[], str]]] = [
            ("write", self._write),
            ("read", self._read),
            ("list", self._list),
            ("conditional create", self._create),
        ]
        lines: list[Line] = []
        for check, ask in checks:
            if lines and lines[0].state == FAILED and check != "list":
                lines.append(Line(check, SKIPPED))
            else:
                lines.append(self._line(set_up, check, ask))
        written = lines[0]
        if written.state == OK and set_up.credentials is None:
            first = Line("credentials", OK, "none, and none needed")
        if written.state == FAILED:
            lines[2] = Line("list", SKIPPED) if lines[2].state == FAILED else lines[2]
            self._blame(written, first, place, bucket, set_up)
        return [first, place, *([bucket] if set_up.bucket else []), *lines]

    def _blame(self, written: Line, credentials: Line, place: Line, bucket: Line, set_up: SetUp) -> None:
        """A failed write is the fault of what comes before, where its error says so."""
        error = written.error or ""
        to_blame, mend = written, written.mend
        if "another region" in error:
            to_blame, mend = (
                place,
                f"export AWS_REGION=…  (aws s3api get-bucket-location --bucket {set_up.bucket})",
            )
        elif "Create the bucket" in error:
            to_blame, mend = bucket, f"{set_up.make_bucket}, or correct the URL"
        elif "Check the network" in error:
            to_blame, mend = (
                place,
                f"check the network and the endpoint ({set_up.endpoint_setting} or {env.STORAGE_OPTIONS})",
            )
        elif credentials.state == OK and _IN_CREDENTIALS.search(error):
            to_blame, mend = credentials, f"{set_up.log_in}, or correct the {credentials.found}"
        elif credentials.state == FAILED:
            to_blame, mend = credentials, credentials.mend
        if to_blame is not written:
            to_blame.state, to_blame.mend, to_blame.found = FAILED, mend, None
            to_blame.error = error.replace(ASK_DOCTOR, "").strip()
            written.state, written.mend, written.error = SKIPPED, None, None
            if to_blame is place:
                bucket.state, bucket.found = SKIPPED, None

    def _line(self, set_up: SetUp, check: str, ask: Callable[[], str]) -> Line:
        try:
            found = ask()
        except _Warning as warning:
            return Line(check, WARNING, mend=warning.mend, error=str(warning))
        except (CloudTrainError, OSError) as error:
            permission = set_up.permissions.get({"upload": "write", "download": "read"}.get(check, check))
            mend = f"grant {permission}" if isinstance(error, StoragePermissionError) else "see the message"
            if isinstance(error, MissingExtraError):
                mend = _install(self.storage)
            return Line(check, FAILED, mend=mend, error=str(error))
        measured = {"bytes_per_second": self._rates[check]} if check in self._rates else {}
        return Line(check, OK, found, measured=measured)

    def _write(self) -> str:
        self.storage.write(self._path, self._data)
        self._is_written = True
        return "yes"

    def _read(self) -> str:
        if self.storage.read(self._path) != self._data:
            raise StorageError("The storage returned different bytes from those written. Check the storage.")
        return "yes"

    def _list(self) -> str:
        began = time.monotonic()
        listed = [info.path for info in self.storage.list(PROBES)]
        if self._path not in listed:
            raise StorageError("The listing does not have an object that was written.")
        return f"yes, in {duration_text(time.monotonic() - began)}"

    def _create(self) -> str:
        try:
            refused = not self.storage.create(self._path, secrets.token_bytes(32))
        except StorageError as error:
            if type(error) is not StorageError:  # not found, no permission, unavailable
                raise
            refused = False  # its file system cannot create
        if not refused:
            raise _Warning(
                "The storage does not refuse to create an object that exists, so it cannot tell two writers apart.",
                "start each run from one place at a time",
            )
        return "yes"

    def _upload(self) -> str:
        with tempfile.NamedTemporaryFile() as file:
            block = secrets.token_bytes(2**20)
            for size in RATE_SIZES:
                while file.tell() < size:
                    file.write(block)
                file.flush()
                began = time.monotonic()
                self.storage.upload(file.name, self._path)
                seconds = time.monotonic() - began
                self._measured = size
                if seconds >= RATE_SECONDS:
                    break
        return self._rate("upload", seconds)

    def _download(self) -> str:
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            self.storage.download(self._path, os.path.join(folder, "got"), self._measured)
            return self._rate("download", time.monotonic() - began)

    def _rate(self, check: str, seconds: float) -> str:
        self._rates[check] = self._measured / max(seconds, 1e-6)
        return f"{size_text(int(self._rates[check]))}/s ({size_text(self._measured)})"

    def _delete(self) -> str:
        self.storage.delete([self._path])
        return "yes"

    def _forget_probe(self) -> None:
        """Delete what an interrupted check has written: parts of an upload are billed, too."""
        if self._is_written:
            self._delete()
            parts = [upload for upload in self.storage.incomplete() if upload.path == self._path]
            self.storage.abort(parts)

    def _clock(self, set_up: SetUp) -> Line:
        offset = diagnosis.clock_offset(set_up.endpoint) if set_up.endpoint else None
        if offset is None:
            return Line(
                "clock",
                OK if set_up.is_here else SKIPPED,
                "no server to compare with" if set_up.is_here else None,
            )
        shown = f"{duration_text(abs(offset))} {'ahead' if offset > 0 else 'behind'}"
        if abs(offset) > CLOCK_LIMIT:
            error = f"The clock of this machine is {shown} of the server's; storage refuses requests that are 15 minutes off."
            return Line(
                "clock",
                FAILED,
                mend="sudo timedatectl set-ntp true",
                error=error,
                measured={"offset": offset},
            )
        return Line("clock", OK, "right" if abs(offset) < 2 else shown, measured={"offset": offset})

    def _disk(self) -> Line:
        free = shutil.disk_usage(Path.cwd()).free
        found, measured = f"{size_text(free)} in this folder", {"free_bytes": float(free)}
        if free < self._size:
            error = f"{found} are less than one checkpoint of {size_text(self._size)}."
            mend = "free some, or train in a folder on another disk"
            return Line("free disk", FAILED, mend=mend, error=error, measured=measured)
        return Line("free disk", OK, found, measured=measured)

    def _checkpoint(self, set_up: SetUp) -> Iterator[Line]:
        check = f"{size_text(self._size)} checkpoint"
        if len(self._rates) < 2:
            yield Line(check, SKIPPED)
        else:
            up, down = (self._size / self._rates[way] for way in ("upload", "download"))
            measured = {"upload_seconds": up, "download_seconds": down}
            yield Line(check, OK, f"up {duration_text(up)}, down {duration_text(down)}", measured=measured)
        if set_up.is_billed:
            dollars = dollars_a_day(self._size, env.heartbeat())
            found = f"${dollars:.2f} a day, with {SAVES_PER_HOUR} saves an hour"
            yield Line("requests", OK, found, measured={"dollars_a_day": dollars})


class _Warning(Exception):  # noqa: N818 - not an error
    def __init__(self, text: str, mend: str) -> None:
        super().__init__(text)
        self.mend = mend


def dollars_a_day(size: int, heartbeat: float) -> float:
    """What the requests of a run cost, by the formula of docs/cost.md, with a save every ten minutes.

    Args:
        size: bytes of a checkpoint.
        heartbeat: seconds between two heartbeats.
    """
    parts = max(LARGE_FILES, math.ceil(size / PART_SIZE))
    puts = 3600 / heartbeat * 4 + SAVES_PER_HOUR * (10 + SMALL_FILES + parts + 2 * LARGE_FILES)
    gets = 3600 / heartbeat * 2 + SAVES_PER_HOUR * 4
    return 24 * (puts * PUT_PRICE + gets * GET_PRICE)


def _install(storage: Storage) -> str:
    from hf_cloudtrain.storage.urls import EXTRAS, protocol_of

    extra = EXTRAS.get(protocol_of(storage.url))
    return f"pip install 'hf_cloudtrain[{extra}]'" if extra else "install the package that the message names"


def record(storage: Storage, lines: list[Line]) -> dict[str, Any]:
    """The answer, as `--json` shows it."""
    shown = [
        {
            "check": line.check,
            "state": line.state,
            "found": line.found,
            "mend": line.mend,
            "error": line.error,
            **line.measured,
        }
        for line in lines
    ]
    return {"url": storage.url, "ok": all(line.state != FAILED for line in lines), "checks": shown}
