"""Kills runs repeatedly, and checks after each kill that every promise still holds."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.download import verify
from hf_cloudtrain.checkpoints.frozen import OutboxEntry
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.outbox import Outbox
from hf_cloudtrain.errors import ManifestError
from hf_cloudtrain.storage.client import Storage
from tests.chaos._kill import Aim
from tests.faults.staged import wait_for_no_writer
from tests.integration._zygote import Child, Zygote

PATIENCE = 3
"""Attempts in a row without a new checkpoint, after which one may train for longer."""
PREFIX = "machine-"
STAGED, KILLED = "staged", "writer-killed"
"""Files that an attempt with staged saves leaves: a line for each save that was handed over; that the writer was killed."""
KEPT = 2
"""The newest checkpoints, which are never deleted; nor is the one resumed from, until there is a newer one."""
LONGEST = 5_000
"""Most Python calls and returns in a phase, if they were not counted."""


@dataclass
class Run:
    """One run, and the machines that it was on."""

    url: str
    options: dict[str, Any]
    folder: Path
    machine: Path
    left: list[Path] = field(default_factory=list)
    """Machines that it moved away from; it may return."""
    relieved: Path | None = None
    """The machine to which it returns next: its outbox has several entries."""
    seen: set[CheckpointKey] = field(default_factory=set)
    stuck: int = 0

    @property
    def catalog(self) -> Catalog:
        return Catalog(Storage(self.url, self.options))


@dataclass
class Tally:
    """The results."""

    title: str
    kills: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    runs: int = 0
    checkpoints: int = 0
    staged: int = 0
    """Saves that were handed over to a writer process."""
    writers: int = 0
    """Killed writers."""
    overtaken: int = 0
    """Restores while an older attempt had a higher step: it was committed late and must not be chosen."""
    wrong_picks: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)

    def table(self) -> str:
        """As text."""
        rows = [f"{self.kills} SIGKILLs of {self.title}, in {self.attempts} attempts of {self.runs} runs"]
        rows += ["by phase (a process may be in several at once):"]
        rows += [f"  {count:5d}  {phase}" for phase, count in self.phases.most_common()]
        rows += [f"checkpoints committed: {self.checkpoints}"]
        rows += [f"saves staged: {self.staged}, writers killed: {self.writers}"]
        rows += [f"restores while an older attempt had a higher step: {self.overtaken}"]
        rows += [f"wrong checkpoints restored: {len(self.wrong_picks)}", f"lost commits: {len(self.lost)}"]
        rows += [f"broken checkpoints: {len(self.broken)}", f"attempts that failed: {len(self.stuck)}"]
        rows += [f"max |difference|: {max(self.differences, default=float('nan'))}"]
        return "\n".join(rows)

    def wrong(self) -> list[str]:
        """Every broken promise, as text."""
        apart = [f"the weights of a run differ by {value}" for value in self.differences if value != 0.0]
        return [*self.wrong_picks, *self.lost, *self.broken, *self.stuck, *apart]


def _whole_in(outbox: Path) -> set[CheckpointKey]:
    """Entries that a killed process left whole and without their name.

    The next start adopts one if its maker has ended. The number of that process may be in use again by then: no promise.
    """
    found = set()
    for left in outbox.glob(".*"):
        with contextlib.suppress(OSError, ManifestError):
            found.add(OutboxEntry.read(left).key)
    return found


class Chaos:
    """Kills one run after the other, until `kills` kills are done and the last run is finished.

    Args:
        victim: module with `attempt`, `plain`, `difference` and `PHASES`.
        folder: for this test only; nothing outside of it is deleted.
        location: (URL of a new run, storage options) by its number.
        alone: share of the kills that kill one of several processes.
    """

    def __init__(
        self,
        victim: ModuleType,
        zygote: Zygote,
        folder: Path,
        location: Callable[[int], tuple[str, dict[str, Any]]],
        *,
        kills: int,
        seed: int,
        ranks: int = 1,
        alone: float = 0.0,
    ) -> None:
        name = "small runs" if ranks == 1 else f"complete torchrun jobs of {ranks} ranks"
        name += " with staged saves" if hasattr(victim, "WRITER") else ""
        self.tally = Tally(f"{name} (CHAOS_SEED={seed})")
        self._victim = victim
        self._zygote = zygote
        self._folder = folder.resolve(strict=True)
        self._location = location
        self._kills = kills
        self._chance = random.Random(seed)
        self._ranks = ranks
        self._alone = alone
        self._aims: list[str] = []
        self._writer = getattr(victim, "WRITER", {})
        self._events: dict[str, int] = {}
        self._visits: dict[str, int] = {}
        self._seconds = 0.0
        self._plain = self._folder / "plain.result"

    def go(self) -> Tally:
        self._measure()
        while self.tally.kills < self._kills:
            self._live(self._new_run())
        return self.tally

    def _measure(self) -> None:
        """Run an uninterrupted plain training, and one with hf_cloudtrain to measure its phases."""
        plain = self._zygote.start(self._victim.__name__, "plain", result=self._plain)
        assert plain.wait() == 0, plain.log
        run = self._new_run()
        began = time.monotonic()
        child = self._start(run, hurry=0.0)
        assert child.wait() == 0, child.log
        self._seconds = time.monotonic() - began
        for name, found in (child.value or {}).items():
            getattr(self, f"_{name}").update(found)
        if self._visits:
            unreached = self._victim.PHASES.keys() - self._visits.keys() - {"download"}
            assert not unreached, f"no process is ever killed in {sorted(unreached)}: see PHASES"
        self._remove(run.folder)
        self.tally.runs = 0

    def _new_run(self) -> Run:
        self.tally.runs += 1
        url, options = self._location(self.tally.runs)
        folder = self._folder / f"run-{self._chance.randrange(10**9)}"
        folder.mkdir()
        return Run(url, options, folder, machine=self._new_machine(folder))

    def _new_machine(self, folder: Path) -> Path:
        return folder / f"{PREFIX}{self._chance.randrange(10**9)}"

    def _live(self, run: Run) -> None:
        """Run all attempts, from the first one to the end of the training."""
        while not self._attempt(run):
            self._move(run)
        self.tally.differences.append(self._victim.difference(run.folder / "final.result", self._plain))
        self._remove(run.folder)

    def _move(self, run: Run) -> None:
        """Stay on the same machine, return to an earlier one, or move to an empty one."""
        if run.relieved:  # the machine in between is done
            run.left.append(run.machine)
            run.machine, run.relieved = run.relieved, None
            return
        if len(Outbox(run.machine).entries()) > 1 and self._chance.random() < 0.7:
            # An attempt elsewhere is killed early; then this outbox commits higher steps of an older attempt: must not be chosen.
            run.relieved, run.machine = run.machine, self._new_machine(run.folder)
            return
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
        """Delete a folder that this test has created; any other folder is an error."""
        if not folder.is_absolute() or self._folder not in folder.resolve().parents or folder.is_symlink():
            raise ValueError(f"'{folder}' is not below '{self._folder}'; not deleting it")
        if folder.exists():
            shutil.rmtree(folder)

    def _attempt(self, run: Run) -> bool:
        """Run one attempt; returns whether it reached the end of the training."""
        accepted = {entry.key for entry in Outbox(run.machine).entries()}
        whole = _whole_in(Outbox(run.machine).folder)
        before = run.catalog.attempts.numbers()
        state = run.folder / "state"
        for path in (state, run.folder / STAGED, run.folder / KILLED):
            path.unlink(missing_ok=True)
        aim = self._draw(run, accepted) if self.tally.kills < self._kills else None
        given = self._aim(aim)
        child = self._start(run, aim=given, hurry=0.0 if run.relieved else self._chance.random())
        if aim == "any":
            self._wait_and_kill(child)
        code = child.wait()
        wait_for_no_writer(run.machine)
        self.tally.attempts += 1
        killed_alone = code == 1 and given is not None and not given["whole_job"]
        if (code not in (0, -signal.SIGKILL) and not killed_alone) or any(
            text in child.log for text in (" cannot be committed: ", "Cannot read")
        ):
            self.tally.stuck.append(f"aim {given}, exit code {code}:\n{child.log}")
            raise AssertionError(f"{self.tally.table()}\n{self.tally.stuck[-1]}")
        writer_killed = (run.folder / KILLED).exists()
        if code or writer_killed:
            self.tally.kills += 1
            self.tally.writers += writer_killed
            self.tally.phases.update([given["phase"]] if writer_killed and given else phases_of(state))
        self._check_staged(run, may_lose=bool(code) and writer_killed)
        self._check(run, accepted, whole, before, child.log)
        return code == 0

    def _draw(self, run: Run, accepted: set[CheckpointKey]) -> str:
        """A phase that can occur, to be killed in; or `any` moment."""
        if run.stuck >= PATIENCE or run.relieved:
            return "commit"  # not in its first visit: see _aim
        if not self._aims:
            self._aims = ["any"] * 2 + [*self._victim.PHASES, *self._writer, *self._writer] * 2
            self._chance.shuffle(self._aims)
        never = {"flush"} if not accepted else set()
        never |= {"download", "restore"} if not run.seen and not accepted else set()
        at = next((at for at, aim in enumerate(self._aims) if aim not in never), None)
        return "any" if at is None else self._aims.pop(at)

    def _aim(self, aim: str | None) -> dict[str, Any] | None:
        if aim is None or aim == "any":
            return None
        first = 2 if aim == "commit" else 1
        visit = max(first, self._chance.randint(1, min(3, self._visits.get(aim, 3))))
        if aim in self._events:
            event = self._chance.randint(1, int(1.1 * self._events[aim]))
        else:
            event = int(LONGEST ** self._chance.random())
        given = Aim(aim, visit, event, self._chance.random() >= self._alone).given()
        return given if self._ranks == 1 else {**given, "rank": self._chance.choice(self._ranks_in(aim))}

    def _ranks_in(self, aim: str) -> list[int]:
        moves_bytes = aim in ("flush", "download", "upload", "commit")
        return [0] if moves_bytes else list(range(self._ranks))

    def _wait_and_kill(self, child: Child) -> None:
        deadline = time.monotonic() + self._chance.uniform(0.0, self._seconds)
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has no process group of its own yet
                os.killpg(child.pid, signal.SIGKILL)
        child.kill()

    def _check_staged(self, run: Run, *, may_lose: bool) -> None:
        """What was handed over to a writer is kept, unless it was killed together with the training."""
        handed = (run.folder / STAGED).read_text().splitlines() if (run.folder / STAGED).exists() else []
        self.tally.staged += len(handed)
        if handed and not may_lose:
            last = CheckpointKey(*map(int, handed[-1].split()))
            kept = {*run.catalog.checkpoints(), *(entry.key for entry in Outbox(run.machine).entries())}
            if not any(key >= last for key in kept):
                self.tally.lost.append(f"{last} was handed over to the writer")

    def _check(
        self,
        run: Run,
        accepted: set[CheckpointKey],
        whole: set[CheckpointKey],
        before: list[int],
        log: str,
    ) -> None:
        tally, catalog = self.tally, run.catalog
        keys = set(catalog.checkpoints())
        new = keys - run.seen
        tally.checkpoints += len(new)
        attempts = catalog.attempts.read_all()
        resumed_from = attempts[-1].resumed_from if attempts else None
        kept = sorted(keys)[-KEPT:][0] if keys else CheckpointKey(0, 0)

        # The checkpoint resumed from may be deleted once the attempt has committed its own.
        alone = not any(attempts and key.attempt == attempts[-1].number for key in keys)

        def stays(key: CheckpointKey) -> bool:
            return len(keys) < KEPT or key >= kept or (alone and key == resumed_from)

        tally.lost += [f"{key} was deleted" for key in sorted(run.seen - keys) if stays(key)]
        for key in sorted(keys):
            tally.broken += [f"{key}: {problem}" for problem in verify(catalog, catalog.read(key))]
        progress = max((key.step for key in new), default=0) > max((key.step for key in run.seen), default=0)
        run.stuck = 0 if progress else run.stuck + 1
        seen, before_this = run.seen, run.seen | accepted
        run.seen = keys
        if [attempt.number for attempt in attempts] == before:
            return  # it was killed before it began an attempt
        attempt = attempts[-1]
        tally.lost += [
            f"{key} was accepted and not committed" for key in sorted(accepted - keys) if stays(key)
        ]
        # The one it chose may be deleted by now, and accepted ones may have been committed before it chose.
        there = seen | keys | ((accepted | whole) & {attempt.resumed_from})
        newest = max((key for key in there if key.attempt < attempt.number), default=None)
        if newest is not None:
            tally.overtaken += any(key < newest and key.step > newest.step for key in before_this)
        if attempt.resumed_from != newest:
            tally.wrong_picks.append(
                f"attempt {attempt.number} restored {attempt.resumed_from}, newest {newest}\n{log}"
            )

    def _start(self, run: Run, **arguments: Any) -> Child:
        return self._zygote.start(
            self._victim.__name__,
            "attempt",
            env={"HF_CLOUDTRAIN_STORAGE_OPTIONS": json.dumps(run.options)},
            output_dir=run.machine,
            run_url=run.url,
            state=run.folder / "state",
            result=run.folder / "final.result",
            **arguments,
        )


def phases_of(state: Path) -> list[str]:
    """The phases of a process when it was killed; `training` is the step loop with nothing in the background."""
    if not state.exists():
        return ["start"]
    found = state.read_text().strip(" \0")
    return found.split("+") if found else ["training"]
