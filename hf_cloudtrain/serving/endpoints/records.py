"""The record of each endpoint on the user's store. It names what is asked and deleted, and other people may write to the store."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.manifest import decode_record, encode_record
from hf_cloudtrain.errors import ConfigurationError, ManifestError
from hf_cloudtrain.jobs.records import JobStore
from hf_cloudtrain.storage.client import Storage

EngineName = Literal["local", "sagemaker"]
NAME = r"[A-Za-z0-9](?:-?[A-Za-z0-9]){0,39}"
"""As SageMaker allows it, with room for what it is part of."""
HANDLES = {
    "local": {"job": r"endpoint-{name}-\d+", "url": r"http://127\.0\.0\.1:\d{{1,5}}"},
    "sagemaker": {"name": r"{name}-[0-9a-f]{{8}}", "region": r"[a-z0-9-]+"},
}
"""What a record may name, by engine: only what `create` makes for this endpoint, so that no record deletes or asks anything else."""


@dataclass(frozen=True)
class Endpoint:
    """The record of an endpoint."""

    name: str
    engine: EngineName
    model: str
    """What is served, for people."""
    created: float
    handle: dict[str, Any] = field(default_factory=dict)
    """Of the engine: the job and the URL, or the names that SageMaker knows."""


@dataclass(frozen=True)
class State:
    """How an endpoint is now."""

    word: str
    """`in service`, `starting`, `deleting`, `failed`, `gone` or `unknown`."""
    reason: str | None = None


class Endpoints:
    """The endpoints of a store."""

    def __init__(self) -> None:
        self.jobs = JobStore()
        self._storage = Storage(self.jobs.below("endpoints"), env.storage_options(None))

    def check_free(self, name: str) -> None:
        """Raise ConfigurationError if a name is taken."""
        if name in self.names():
            raise _taken(name)

    def add(self, endpoint: Endpoint) -> None:
        """Make the record. Raises ConfigurationError: the name is taken or not valid."""
        check_name(endpoint.name)
        if not self._storage.create(f"{endpoint.name}.json", encode_record(dataclasses.asdict(endpoint))):
            raise _taken(endpoint.name)

    def write(self, endpoint: Endpoint) -> None:
        """Write the record again."""
        self._storage.write(f"{endpoint.name}.json", encode_record(dataclasses.asdict(endpoint)))

    def remove(self, name: str) -> None:
        """Remove the record."""
        self._storage.delete([f"{name}.json"])

    def names(self) -> list[str]:
        """Of all endpoints, sorted."""
        found = (info.path for info in self._storage.list(""))
        return sorted(path.removesuffix(".json") for path in found if path.endswith(".json"))

    def read(self, name: str) -> Endpoint:
        """The record of an endpoint. Raises ConfigurationError, ManifestError."""
        try:
            if not re.fullmatch(NAME, name):
                raise FileNotFoundError
            found = decode_record(self._storage.read(f"{name}.json"), f"record of the endpoint {name!r}")
            known = {one.name for one in dataclasses.fields(Endpoint)}
            endpoint = Endpoint(**{key: value for key, value in found.items() if key in known})
            if endpoint.name != name or not _names_its_own(endpoint):
                raise TypeError("it is not about this endpoint.")
            if not isinstance(endpoint.created, (int, float)):
                raise TypeError("the type of 'created' is wrong.")
            return endpoint
        except FileNotFoundError:
            raise ConfigurationError(
                f"There is no endpoint {name[:100]!r} in {self.jobs.url!r}. List them with `cloudtrain endpoint list`."
            ) from None
        except (AttributeError, KeyError, TypeError) as error:
            raise ManifestError(f"The record of the endpoint {name!r} is damaged: {error}") from None


def _taken(name: str) -> ConfigurationError:
    return ConfigurationError(
        f"There is an endpoint {name!r} already. Delete it (`cloudtrain endpoint delete {name}`), or choose a different name."
    )


def check_name(name: str) -> None:
    """Raise ConfigurationError if an endpoint cannot have a name."""
    if not re.fullmatch(NAME, name):
        raise ConfigurationError(
            f"{name[:100]!r} is not a valid name of an endpoint. Use up to 40 letters, digits and single '-'."
        )


def _names_its_own(endpoint: Endpoint) -> bool:
    """Whether the handle has only what `create` has written."""
    patterns = HANDLES[endpoint.engine]
    return all(
        isinstance(value, str) and re.fullmatch(patterns[key].format(name=re.escape(endpoint.name)), value)
        for key, value in endpoint.handle.items()
    )
