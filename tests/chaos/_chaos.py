"""Kills real training runs, again and again, and looks after each kill whether all is still true."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_cloudtrain.catalog import Catalog, CheckpointKey
from hf_cloudtrain.downloader import verify
from hf_cloudtrain.outbox import Outbox
from hf_cloudtrain.storage import Storage
from tests.integration._lab import max_difference
from tests.integration._zygote import Child, Zygote

ARGUMENTS = {"num_train_epochs": 4, "save_steps": 2, "save_total_limit": 2}
VISITS = {"download": 9, "Trainer's save": 3, "save": 3, "upload": 27, "commit": 3}
"""How often an attempt gets into a phase at most, for the draw; others once."""
PATIENCE = 3
"""Attempts in a row that may bring a run no further, before one is let go on for longer."""
PREFIX = "machine-"


@dataclass
class Run:
    """One run, and the machines it has been on."""

    url: str
    options: dict[str, Any]
    folder: Path
    machine: Path
    left: list[Path] = field(default_factory=list)
    """Machines it moved away from; it may come back."""
    seen: set[CheckpointKey] = field(default_factory=set)
    stuck: int = 0

    @property
    def catalog(self) -> Catalog:
        return Catalog(Storage(self.url, self.options))


@dataclass
class Tally:
    """What came out."""

    kills: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    runs: int = 0
    checkpoints: int = 0
    wrong_picks: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)


class Chaos:
    """Alternates between storages, one run each, until so many kills are done and the last run is finished.

    Args:
        folder: of this test alone; nothing outside of it is ever removed.
        places: (URL of a new run, storage options) by its number.
    """

    def __init__(self, zygote: Zygote, folder: Path, places: Any, *, kills: int, seed: int) -> None:
        self.tally = Tally()
        self._zygote = zygote
        self._folder = folder.resolve(strict=True)
        self._places = places
        self._kills = kills
        self._seed = seed
        self._chance = random.Random(seed)
        self._aims: list[str] = []
        self._events: dict[str, int] = {}
        self._seconds = 0.0
        self._plain = self._folder / "plain.safetensors"

    def go(self) -> Tally:
        self._measure()
        while self.tally.kills < self._kills:
            self._live(self._new_run())
        return self.tally

    def table(self) -> str:
        tally = self.tally
        rows = [
            f"{tally.kills} SIGKILLs (CHAOS_SEED={self._seed}) in {tally.attempts} attempts of {tally.runs} runs"
        ]
        rows += ["in which phase (a process may be in several at once):"]
        rows += [f"  {count:5d}  {phase}" for phase, count in tally.phases.most_common()]
        rows += [f"checkpoints committed: {tally.checkpoints}, all verified"]
        rows += [f"wrong picks: {len(tally.wrong_picks)}", f"lost commits: {len(tally.lost)}"]
        rows += [f"broken checkpoints: {len(tally.broken)}"]
        rows += [f"max |difference|: {max(tally.differences, default=float('nan'))}"]
        return "\n".join(rows)

    def _measure(self) -> None:
        """An uninterrupted plain training; and two with our callbacks, for how long each phase is."""
        here = {"output_dir": self._folder / "plain", "state": self._folder / "state"}
        plain = self._zygote.start("tests.chaos._victim", "attempt", **here, result=self._plain, **ARGUMENTS)
        assert plain.wait() == 0, plain.log
        run = self._new_run()
        for _ in range(2):  # the second one restores
            began = time.monotonic()
            child = self._start(run)
            assert child.wait() == 0, child.log
            self._seconds = max(self._seconds, time.monotonic() - began)
            self._events |= child.value["events"]
            run.machine = self._new_machine(run.folder)
        self._remove(run.folder)
        self.tally = Tally()

    def _new_run(self) -> Run:
        self.tally.runs += 1
        url, options = self._places(self.tally.runs + self._seed)
        folder = self._folder / f"run-{self._chance.randrange(10**9)}"
        folder.mkdir()
        return Run(url, options, folder, machine=self._new_machine(folder))

    def _new_machine(self, folder: Path) -> Path:
        return folder / f"{PREFIX}{self._chance.randrange(10**9)}"

    def _live(self, run: Run) -> None:
        """From the first attempt to the end of the training."""
        while not self._attempt(run):
            self._move(run)
        self._check_all(run)
        self.tally.differences.append(max_difference(run.folder / "final.safetensors", self._plain))
        self._remove(run.folder)

    def _move(self, run: Run) -> None:
        """Stay on the same machine, come back to one it has been on, or go to an empty one."""
        draw = self._chance.random()
        if draw < 0.5:
            return
        before = run.machine
        if run.left and draw > 0.9:
            run.machine = run.left.pop(self._chance.randrange(len(run.left)))
        else:
            run.machine = self._new_machine(run.folder)
        if draw < 0.7 or draw > 0.9:
            run.left.append(before)
        else:
            self._remove(before)

    def _remove(self, folder: Path) -> None:
        """Delete a folder that this test has made; anything else is refused, whatever the bug that asks for it."""
        if not folder.is_absolute() or self._folder not in folder.resolve().parents or folder.is_symlink():
            raise ValueError(f"'{folder}' is not below '{self._folder}', so it is not ours to delete")
        if folder.exists():
            shutil.rmtree(folder)

    def _attempt(self, run: Run) -> bool:
        """Whether it got to the end of the training."""
        accepted = {entry.key for entry in Outbox(run.machine).entries()}
        before = run.catalog.attempt_numbers()
        state = run.folder / "state"
        state.unlink(missing_ok=True)
        aim = self._draw(run, accepted) if self.tally.kills < self._kills else None
        child = self._start(run, **self._aim(aim))
        if aim == "any":
            self._wait_and_kill(child)
        code = child.wait()
        self.tally.attempts += 1
        assert code in (0, -signal.SIGKILL), child.log
        assert " cannot be committed: " not in child.log, child.log
        assert "Cannot read" not in child.log, child.log
        if code:
            self.tally.kills += 1
            self.tally.phases.update(phases_of(state))
        self._check(run, accepted, before, child.log)
        return code == 0

    def _draw(self, run: Run, accepted: set[CheckpointKey]) -> str:
        """A phase to be killed in that can come, or `any` moment."""
        if run.stuck >= PATIENCE:
            return "commit"  # not in the first: see _aim
        if not self._aims:
            self._aims = ["any"] * 3 + [phase for phase in self._events for _ in range(2)]
            self._chance.shuffle(self._aims)
        never = {"flush"} if not accepted else set()
        never |= {"download", "restore"} if not run.seen and not accepted else set()
        at = next((at for at, aim in enumerate(self._aims) if aim not in never), None)
        return "any" if at is None else self._aims.pop(at)

    def _aim(self, aim: str | None) -> dict[str, Any]:
        if aim is None or aim == "any":
            return {}
        first = 2 if aim == "commit" else 1
        visit = self._chance.randint(1, VISITS.get(aim, 1))
        event = self._chance.randint(1, int(1.1 * self._events[aim]))
        return {"aim": aim, "visit": max(first, visit), "event": event}

    def _wait_and_kill(self, child: Child) -> None:
        deadline = time.monotonic() + self._chance.uniform(0.0, self._seconds)
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        child.kill()

    def _check(self, run: Run, accepted: set[CheckpointKey], before: list[int], log: str) -> None:
        tally, catalog = self.tally, run.catalog
        keys = set(catalog.checkpoints())
        new = keys - run.seen
        tally.checkpoints += len(new)
        tally.lost += [f"{key} is gone" for key in sorted(run.seen - keys)]
        for key in sorted(new):
            tally.broken += [f"{key}: {problem}" for problem in verify(catalog, catalog.read(key))]
        progress = max((key.step for key in new), default=0) > max((key.step for key in run.seen), default=0)
        run.stuck = 0 if progress else run.stuck + 1
        run.seen = keys
        attempts = catalog.attempts()
        if [attempt.number for attempt in attempts] == before:
            return  # it did not get so far
        attempt = attempts[-1]
        tally.lost += [f"{key} was accepted" for key in sorted(accepted - keys)]
        newest = max((key for key in keys if key.attempt < attempt.number), default=None)
        if attempt.resumed_from != newest:
            tally.wrong_picks.append(
                f"attempt {attempt.number} took {attempt.resumed_from}, newest {newest}\n{log}"
            )

    def _check_all(self, run: Run) -> None:
        catalog = run.catalog
        for key in sorted(run.seen):
            self.tally.broken += [f"{key}: {problem}" for problem in verify(catalog, catalog.read(key))]

    def _start(self, run: Run, **arguments: Any) -> Child:
        return self._zygote.start(
            "tests.chaos._victim",
            "attempt",
            env={"HF_CLOUDTRAIN_STORAGE_OPTIONS": json.dumps(run.options)},
            output_dir=run.machine,
            run_url=run.url,
            state=run.folder / "state",
            result=run.folder / "final.safetensors",
            **ARGUMENTS,
            **arguments,
        )


def phases_of(state: Path) -> list[str]:
    """Where a process was when it died: `training` is the step loop with nothing in the background."""
    if not state.exists():
        return ["start"]
    found = state.read_text().strip(" \0")
    return found.split("+") if found else ["training"]
