"""Kill, resume, compare: whether what a manifest says about a resume is what the weights say.

    outcome = measure(zygote, "a list of samples", folder)
    outcome.difference    # of the weights, between an uninterrupted run and a killed and resumed one
    outcome.recorded      # what the manifest said that the resume began from
    outcome.fault         # "false true", "false reason" or None

Whether a set-up is really exact is never written down by hand: it is measured here, each time.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.exactness import Exactness
from hf_cloudtrain.storage.client import Storage
from tests.integration._zygote import Child, Zygote
from tests.servers import free_port

ATTEMPTS = "tests.corpus._attempt"


@dataclass(frozen=True)
class Outcome:
    """What came of one set-up."""

    difference: float
    """Max |difference| of the weights: uninterrupted, and killed and resumed."""
    recorded: Exactness
    by_itself: float = 0.0
    """The same between two uninterrupted runs. A set-up that differs by itself says nothing about a resume."""

    @property
    def is_exact(self) -> bool:
        return self.difference == 0.0

    @property
    def fault(self) -> str | None:
        """What is wrong with the record. Not verified is never wrong, but an exact set-up should not be."""
        if self.by_itself:
            return "differs by itself"
        if self.recorded.exact and not self.is_exact:
            return "false true"
        if self.recorded.exact is False and self.is_exact:
            return "false reason"
        return None


def measure(zygote: Zygote, name: str, folder: Path, *, twin: bool = False, plant: str = "") -> Outcome:
    """Train uninterrupted without our callbacks; kill and resume with them, each on an empty machine.

    Args:
        twin: train uninterrupted once more, to see whether the set-up differs by itself.
        plant: an answer that the killed attempt records whatever is true, to test this harness.
    """
    lab = _Lab(zygote, name, folder, ranks=2 if name.startswith("two processes") else 1)
    whole = lab.train("uninterrupted")
    again = lab.train("again") if twin else whole
    lab.killed(plant=plant)
    resumed = lab.train("resumed", url=lab.url, resumes=True)
    return Outcome(difference(whole, resumed), lab.recorded(), difference(whole, again))


class _Lab:
    """The attempts of one set-up."""

    def __init__(self, zygote: Zygote, name: str, folder: Path, *, ranks: int) -> None:
        self.url = (folder / "run").as_uri()
        self._zygote, self._name, self._folder, self._ranks = zygote, name, folder, ranks
        self._restored: int = -1

    def train(self, machine: str, *, resumes: bool = False, **arguments: Any) -> Path:
        """An attempt that succeeds; returns the file of its weights."""
        children = self._start(machine, **arguments)
        for child in children:
            assert child.wait() == 0, f"{machine}: {child.log}"
        if resumes:
            self._restored = children[0].value
        return self._folder / f"{machine}.safetensors"

    def killed(self, **arguments: Any) -> None:
        """An attempt that ends with SIGKILL in the step after the one that is to be resumed from."""
        for child in self._start("killed", url=self.url, kills=True, **arguments):
            assert child.wait() == -signal.SIGKILL, f"killed: {child.log}"

    def recorded(self) -> Exactness:
        """What the checkpoint says that the resumed attempt began from."""
        catalog = Catalog(Storage(self.url))
        keys = [key for key in catalog.checkpoints() if key.attempt == 1]
        assert self._restored == max(key.step for key in keys), f"{self._restored} of {keys}"
        return catalog.read(max(keys)).exactness

    def _start(self, machine: str, **arguments: Any) -> list[Child]:
        return [
            self._zygote.start(
                ATTEMPTS,
                "attempt",
                name=self._name,
                folder=str(self._folder / machine),
                weights=str(self._folder / f"{machine}.safetensors"),
                env=env,
                **arguments,
            )
            for env in self._environments()
        ]

    def _environments(self) -> list[dict[str, str]]:
        """What torchrun would set; nothing for a single process."""
        if self._ranks == 1:
            return [{}]
        size = str(self._ranks)
        shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
        shared["MASTER_PORT"] = str(free_port())
        return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(self._ranks)]


def difference(one: Path, other: Path) -> float:
    """Max |difference| over all tensors of two files; infinite where one has other tensors, or no number."""
    ours, theirs = load_file(one), load_file(other)
    if ours.keys() != theirs.keys() or not ours:
        return float("inf")
    found = max(
        float(np.abs(ours[name].astype("f8") - theirs[name].astype("f8")).max(initial=0)) for name in ours
    )
    return float("inf") if np.isnan(found) else found
