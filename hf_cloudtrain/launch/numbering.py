"""Which run a training belongs to, where one command trains several times.

The first training has the run URL of the launch, the n-th one `<run URL>/trainer-<n>`. A restart must give each of them the
same number again, although a script may skip what it finds done, or name its output folders by the time of day:

    the same output folder as a training of this process that an error has ended     its number again
    the run of a number was in this output folder                                    that number
    else                                                                             the lowest number that is not used

A number is used if this process has trained with it, or a different process of the launch with a different command line and
output folder: a shell script may train one stage after the other.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any, ClassVar

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.launch.notes import note, read_notes
from hf_cloudtrain.preemption.preemption import in_notebook
from hf_cloudtrain.runtime.provenance import shown_command
from hf_cloudtrain.runtime.redaction import redact
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.urls import normal_url

MOST = 1000
"""Trainings of one launch."""


@dataclasses.dataclass
class Training:
    """A training of this process."""

    number: int
    output_dir: str
    """Absolute."""
    is_over: bool = False
    """Whether it came to its end, and was not ended by an error."""


class Numbers:
    """The trainings of this process, in their order.

    Example:
        >>> training = Numbers("s3://bucket/runs/sft").begin("/home/me/out")
        >>> training.number
        1
    """

    _of_processes: ClassVar[dict[tuple[int, str], Numbers]] = {}

    def __init__(self, run_url: str) -> None:
        self._run_url = run_url
        self._here: list[Training] = []

    @classmethod
    def of_this_process(cls, run_url: str) -> Numbers:
        """The trainings of this process with a run URL; a forked child has its own."""
        return cls._of_processes.setdefault((os.getpid(), run_url), cls(run_url))

    @property
    def any_here(self) -> bool:
        """Whether this process has trained."""
        return bool(self._here)

    def begin(self, output_dir: str) -> Training:
        """A training that begins now, on rank 0. In a notebook, the same cell may run again and again."""
        again = [
            one for one in self._here if one.output_dir == output_dir and (in_notebook() or not one.is_over)
        ]
        if again:
            return again[-1]
        return Training(self._next(output_dir), output_dir)

    def began(self, training: Training) -> Training:
        """Remember a training, on all ranks; gives the one that is remembered."""
        for one in self._here:
            if one.number == training.number:
                return one
        self._here.append(training)
        return training

    def url_of(self, number: int) -> str:
        """The run URL of the n-th training, such as `s3://bucket/runs/sft/trainer-2`."""
        return self._run_url if number == 1 else f"{normal_url(self._run_url)}/trainer-{number}"

    def tell(self, training: Training) -> None:
        """Tell the launch, and so its other processes."""
        record = {"number": training.number, "output_dir": training.output_dir, "command": _command()}
        note("trains", json.dumps(record))

    def _next(self, output_dir: str) -> int:
        used = {one.number for one in self._here} | _used_elsewhere(output_dir)
        for number in range(1, MOST):
            folder = self._recorded(number)
            if folder is None:
                break
            if number not in used and folder == redact(output_dir):
                return number
        return next(number for number in range(1, MOST) if number not in used)

    def _recorded(self, number: int) -> str | None:
        """The output folder of the newest attempt of a run; "" where it does not say; None where the run does not exist."""
        attempts = Catalog(Storage(self.url_of(number), env.storage_options(None))).attempts
        numbers = attempts.numbers()
        return attempts.read(numbers[-1]).facts.get("output_dir", "") if numbers else None


def _used_elsewhere(output_dir: str) -> set[int]:
    """The numbers of different stages that other processes of the launch have trained."""
    if env.is_restart():
        return set()
    found = set()
    for one in read_notes(env.launch_notes()):
        if one.what == "trains" and one.pid != os.getpid():
            record: dict[str, Any] = json.loads(one.value)
            if record["output_dir"] != output_dir and record["command"] != _command():
                found.add(int(record["number"]))
    return found


def _command() -> str:
    return shown_command(sys.argv)
