"""Preemption notices of EC2, Google Compute Engine and Azure, from the metadata service of the machine.

Each service answers on a link-local address, over plain HTTP. A service is asked only where the firmware says that the
machine belongs to that cloud; no proxy and no redirect can lead a request elsewhere. The time left is counted from the
`Date` of the answer, because the clock of this machine may be hours off.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hf_cloudtrain import env

DMI = Path("/sys/class/dmi/id")
"""Where Linux shows what the firmware knows of the machine."""
TIMEOUT = 2.0
"""Seconds for one request. These services answer within milliseconds, from the machine's own host."""
MAX_ANSWER = 2**20
"""Bytes of an answer. Azure lists all events of a scale set: a hundred of them take 50 kB."""
LONGEST_GRACE = 86_400.0
"""Seconds. No cloud announces a preemption a day ahead, so a longer time is ignored."""

_AZURE_ENDS = {"Preempt": "evicted", "Terminate": "deleted"}


@dataclass(frozen=True)
class Notice:
    """A request to save and stop."""

    source: str
    """Where it comes from, for people: "SIGTERM", "EC2: the instance is reclaimed (terminate)"."""
    grace: float | None = None
    """Seconds left when it was received; None where the source names no time."""


class Ec2:
    """A Spot instance that EC2 takes back: two minutes ahead, or at once where it hibernates.

    Protocol: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html, with the session
    tokens of IMDSv2. AWS recommends to poll every 5 s.
    """

    pause = 5.0

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._token = ""

    def look(self) -> Notice | None:
        """A notice, if there is one. Raises OSError, HTTPException, ValueError."""
        answer = self._get("/latest/meta-data/spot/instance-action")
        if answer.status == 404:
            return None
        record = answer.record()
        action = record.get("action")
        if not isinstance(action, str) or not re.fullmatch("[a-z-]{1,40}", action):
            raise _UnexpectedAnswerError(f"no action in {answer.text[:200]!r}")
        return Notice(
            f"EC2: the instance is reclaimed ({action})", _left(_iso_time(record.get("time")), answer.date)
        )

    def _get(self, path: str) -> _Answer:
        answer = self._try(path) if self._token else None
        if answer is None or answer.status == 401:  # no token yet, or it has expired
            lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
            self._token = _ask(self._endpoint, "/latest/api/token", lifetime, method="PUT").ok().text.strip()
            answer = self._try(path)
        return answer if answer.status == 404 else answer.ok()

    def _try(self, path: str) -> _Answer:
        return _ask(self._endpoint, path, {"X-aws-ec2-metadata-token": self._token})


class Gce:
    """A Spot instance that Google takes back, or one whose host is maintained and that cannot move.

    Protocol: https://cloud.google.com/compute/docs/instances/preemptible (30 s) and
    https://cloud.google.com/compute/docs/gpus/gpu-host-maintenance (60 s at least, an hour with a GPU).
    """

    pause = 1.0
    PREEMPTION_SECONDS = 30.0
    MAINTENANCE_SECONDS = 60.0

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint

    def look(self) -> Notice | None:
        """A notice, if there is one. Raises OSError, HTTPException, ValueError."""
        # The notice may be as old as the pause between two looks.
        if self._get("preempted") == "TRUE":
            return Notice("GCE: the instance is preempted", self.PREEMPTION_SECONDS - self.pause)
        if self._get("maintenance-event").startswith("TERMINATE"):
            return Notice(
                "GCE: the instance is stopped for maintenance of its host",
                self.MAINTENANCE_SECONDS - self.pause,
            )
        return None

    def _get(self, key: str) -> str:
        answer = _ask(self._endpoint, f"/computeMetadata/v1/instance/{key}", {"Metadata-Flavor": "Google"})
        if answer.status == 404:
            return ""
        if answer.ok().headers.get("Metadata-Flavor") != "Google":
            raise _UnexpectedAnswerError(f"not an answer of Google's metadata service: {answer.text[:200]!r}")
        return answer.text.strip()


class Azure:
    """A Spot machine that Azure evicts (30 s ahead at least), or one of a scale set that is deleted.

    Protocol: https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events. Every machine of a set receives
    the events of all, so an event counts if it names this one. Restarts do not count: their SIGTERM comes in time, and the
    machine and its disk stay.
    """

    pause = 1.0
    ENDPOINT = "http://169.254.169.254"

    def __init__(self, endpoint: str = ENDPOINT) -> None:
        self._endpoint = endpoint
        self._name = ""

    def look(self) -> Notice | None:
        """A notice, if there is one. Raises OSError, HTTPException, ValueError."""
        answer = self._get("/metadata/scheduledevents?api-version=2020-07-01").ok()
        events = answer.record().get("Events")
        if not isinstance(events, list):
            raise _UnexpectedAnswerError(f"no events in {answer.text[:200]!r}")
        for event in events:
            kind = str(event.get("EventType")) if isinstance(event, dict) else ""
            if kind in _AZURE_ENDS and self._is_named_in(event.get("Resources")):
                # NotBefore is empty once the event has begun.
                left = _left(_http_time(event.get("NotBefore")), answer.date)
                return Notice(f"Azure: the machine is {_AZURE_ENDS[kind]} ({kind})", left)
        return None

    def _is_named_in(self, resources: Any) -> bool:
        if not isinstance(resources, list):
            raise _UnexpectedAnswerError("an event names no resources")
        if not self._name:
            path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
            self._name = self._get(path).ok().text.strip()
        return self._name.lower() in [str(name).lower() for name in resources]

    def _get(self, path: str) -> _Answer:
        return _ask(self._endpoint, path, {"Metadata": "true"})


def cloud_sources(dmi: Path | None = None) -> list[Ec2 | Gce | Azure]:
    """The metadata service to ask on this machine: the one that `HF_CLOUDTRAIN_CLOUD_NOTICES` names, else by the firmware.

    Args:
        dmi: folder of the firmware's facts, a file each; None takes `/sys/class/dmi/id`.
    """
    wanted = env.cloud_notices()
    cloud = find_cloud(dmi or DMI) if wanted == "auto" else wanted
    if cloud == "gce":
        return [Gce(env.gce_endpoint())]
    if cloud == "azure":
        return [Azure()]
    endpoint = env.ec2_endpoint()
    return [Ec2(endpoint)] if cloud == "ec2" and endpoint else []


def find_cloud(dmi: Path) -> str | None:
    """The cloud that this machine belongs to, without a request: `ec2`, `gce`, `azure`, or None.

    It uses the same facts as cloud-init's ds-identify. A vendor name alone is not enough: Google makes laptops, and Hyper-V
    runs on any PC.
    """
    if _fact(dmi, "sys_vendor") == "Amazon EC2" or "amazon" in _fact(dmi, "bios_version").lower():
        return "ec2"
    if _fact(dmi, "product_name") == "Google Compute Engine":
        return "gce"
    return "azure" if _fact(dmi, "chassis_asset_tag") == "7783-7084-3265-9085-8269-3286-77" else None


def _fact(dmi: Path, name: str) -> str:
    try:
        return (dmi / name).read_text(errors="replace").strip()
    except OSError:  # it does not exist, or a container hides it
        return ""


class _UnexpectedAnswerError(ValueError):
    """The answer differs from what the cloud documents."""


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: http.client.HTTPMessage
    text: str

    @property
    def date(self) -> datetime | None:
        """The service's own clock."""
        return _http_time(self.headers.get("Date"))

    def ok(self) -> _Answer:
        if self.status != 200:
            raise _UnexpectedAnswerError(f"the metadata service answers {self.status}: {self.text[:200]!r}")
        return self

    def record(self) -> dict[str, Any]:
        record = json.loads(self.text)
        if not isinstance(record, dict):
            raise _UnexpectedAnswerError(f"not a JSON object: {self.text[:200]!r}")
        return record


def _ask(endpoint: str, path: str, headers: dict[str, str], method: str = "GET") -> _Answer:
    """One request. `http.client` itself: urllib would take a proxy from the environment, and follow redirects."""
    parts = urlsplit(endpoint)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"{endpoint!r} is not the URL of a metadata service")
    connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=TIMEOUT)
    with contextlib.closing(connection):
        connection.request(method, parts.path.rstrip("/") + path, headers=headers)
        response = connection.getresponse()
        text = response.read(MAX_ANSWER).decode(errors="replace")
        return _Answer(response.status, response.headers, text)


def _left(end: datetime | None, now: datetime | None) -> float | None:
    if end is None or now is None:
        return None
    seconds = (end - now).total_seconds()
    return max(0.0, seconds) if seconds <= LONGEST_GRACE else None


def _iso_time(text: Any) -> datetime | None:
    """'2026-11-20T14:03:11Z', which Python 3.10 does not read whole."""
    try:
        return _in_utc(datetime.fromisoformat(str(text).removesuffix("Z")))
    except ValueError:
        return None


def _http_time(text: Any) -> datetime | None:
    """'Fri, 20 Nov 2026 14:03:11 GMT'."""
    try:
        return _in_utc(parsedate_to_datetime(text)) if isinstance(text, str) else None
    except ValueError:
        return None


def _in_utc(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=timezone.utc)
