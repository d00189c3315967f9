"""Which checkpoints stay on storage (law 10), and the passes that retire the others.

    policy      keeps the newest few and every n-th step; without a limit, everything
    protected   kept by any policy: the newest, the best, the pinned, and the checkpoint that the newest attempt resumed from,
                until it has committed one of its own
    pass        after a commit, in a thread on rank 0's host: one checkpoint after the other, and before each a check whether
                a newer attempt has begun (law 6) and whether it was pinned

A pass stops as soon as there is something to upload, or when the process ends; the next one completes it, and also the
deletion that was interrupted.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from hf_cloudtrain.checkpoints.attempts import Attempt
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.deletion import finish_retiring, retire, retiring
from hf_cloudtrain.checkpoints.frozen import OutboxEntry
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, encode_record
from hf_cloudtrain.checkpoints.paths import PINS
from hf_cloudtrain.errors import ConfigurationError, ManifestError, NoCheckpointError

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 5.0
"""Seconds that the end of training gives the deletion of old checkpoints."""


@dataclass(frozen=True)
class Policy:
    """What stays on storage besides what is protected.

    Raises:
        ConfigurationError: a number below 1, or steps to keep although everything is kept.

    Example:
        >>> CloudTrainCallback("s3://bucket/runs/mrpc", save_total_limit=3, keep_every_n_steps=10_000)
    """

    save_total_limit: int | None = None
    """How many checkpoints stay, the newest of the run, of any attempt; None keeps all."""
    keep_every_n_steps: int | None = None
    """Steps that are a multiple of this stay too; if several attempts saved such a step, that of the newest."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigurationError(f"{name}={value!r} must be a positive integer.")
        if self.keep_every_n_steps is not None and self.save_total_limit is None:
            raise ConfigurationError(
                f"keep_every_n_steps={self.keep_every_n_steps} needs save_total_limit, which is not set: without a limit "
                "everything is kept. Set save_total_limit too."
            )

    def is_milestone(self, step: int) -> bool:
        """Whether a step is one of every n."""
        return self.keep_every_n_steps is not None and step % self.keep_every_n_steps == 0

    def superseded(
        self, waiting: Collection[OutboxEntry], newest: OutboxEntry, limit: int
    ) -> list[OutboxEntry]:
        """Saves beyond the `limit` newest that wait for their upload and that a newer one of their attempt makes useless."""
        best = max((entry.key for entry in waiting if entry.best), default=None)
        return [
            entry
            for entry in sorted(waiting, key=lambda entry: entry.key, reverse=True)[limit:]
            if entry.key.attempt == newest.key.attempt
            and entry.key < newest.key
            and entry.name is None
            and entry.hosts == 1  # other hosts may have begun to send it
            and entry.key != best
            and not self.is_milestone(entry.key.step)
        ]


def to_retire(
    keys: Iterable[CheckpointKey], policy: Policy, protected: Collection[CheckpointKey]
) -> list[CheckpointKey]:
    """Checkpoints that a policy does not keep, oldest first, so that an interrupted pass leaves the newer ones.

    Example:
        >>> to_retire([CheckpointKey(1, step) for step in (10, 20, 30)], Policy(save_total_limit=1), protected=[])
        [CheckpointKey(attempt=1, step=10), CheckpointKey(attempt=1, step=20)]
    """
    if policy.save_total_limit is None:
        return []
    ordered = sorted(keys)
    milestones = {key.step: key for key in ordered if policy.is_milestone(key.step)}  # the last one of a step
    kept = {*protected, *milestones.values(), *ordered[-policy.save_total_limit :]}
    return [key for key in ordered if key not in kept]


def protected(catalog: Catalog) -> dict[CheckpointKey, str]:
    """Checkpoints that no automatic deletion touches, each with the reason (law 10)."""
    keys = catalog.checkpoints()
    reasons: dict[CheckpointKey, str] = {}
    for attempt in catalog.attempts.read_all(last=1):
        # Once the attempt has committed a checkpoint of its own, the run resumes from that.
        if attempt.resumed_from is not None and not any(key.attempt >= attempt.number for key in keys):
            reasons[attempt.resumed_from] = f"attempt {attempt.number} resumed from it"
    reasons |= dict.fromkeys(pins(catalog), "it is pinned")
    best = catalog.pointer("best")
    if best is not None:
        reasons[best] = "it is the best one"
    if keys:
        reasons[keys[-1]] = "it is the newest one"
    return reasons


def pins(catalog: Catalog) -> list[CheckpointKey]:
    """Checkpoints that a user wants to keep, oldest first."""
    return catalog.keys_in(PINS)


def pin(catalog: Catalog, key: CheckpointKey) -> None:
    """Keep a checkpoint from every automatic deletion. Raises NoCheckpointError if it does not exist."""
    catalog.storage.write(_pin_path(key), encode_record({"attempt": key.attempt, "step": key.step}))
    try:
        catalog.read(key)  # after the pin is written: a process that deletes looks for pins first
    except NoCheckpointError:
        unpin(catalog, key)
        raise


def unpin(catalog: Catalog, key: CheckpointKey) -> None:
    """Remove a pin, if there is one."""
    catalog.storage.delete([_pin_path(key)])


def is_pinned(catalog: Catalog, key: CheckpointKey) -> bool:
    """Whether a checkpoint is pinned; one small request."""
    return catalog.exists(_pin_path(key))


def prunable(catalog: Catalog, policy: Policy) -> tuple[list[CheckpointKey], dict[CheckpointKey, str]]:
    """What a policy lets go of a run as it is now, oldest first, and what only its protection keeps, with the reasons."""
    keys, kept = catalog.checkpoints(), protected(catalog)
    by_number = to_retire(keys, policy, protected=())
    return to_retire(keys, policy, kept), {key: kept[key] for key in by_number if key in kept}


def retire_unprotected(catalog: Catalog, key: CheckpointKey) -> str | None:
    """Delete a checkpoint, unless it is protected by now; the reason why it stays, None once it is deleted."""
    reason = protected(catalog).get(key)
    if reason is not None:
        return f"{reason} since the command started."
    try:
        retire(catalog, key)
    except NoCheckpointError:
        return None  # the training's own limit was faster
    except ManifestError as error:
        return str(error)
    return None


class Retention:
    """Retires, for one attempt, what a policy does not keep. One pass at a time.

    Args:
        attempt: nothing is deleted once a newer one has begun. None: a different process of the attempt deletes.

    Example:
        >>> retention = Retention(catalog, Policy(save_total_limit=3), attempt)
        >>> retention.run(lambda: not hurry)
    """

    def __init__(self, catalog: Catalog, policy: Policy, attempt: Attempt | None) -> None:
        self.policy = policy
        self.attempt = attempt
        self._catalog = catalog
        self._best: CheckpointKey | None = None
        self._unfinished = True
        """Whether there may be a deletion that was interrupted: an earlier attempt may have left one."""
        self._unreadable: set[CheckpointKey] = set()
        self._warned = False
        self._changed = threading.Condition()
        self._requested = False
        """Whether a pass was requested since the last one began."""
        self.is_running = False

    @property
    def is_active(self) -> bool:
        """Whether anything can ever be deleted, and this process deletes it."""
        return self.policy.save_total_limit is not None and self.attempt is not None

    def note_best(self, key: CheckpointKey) -> None:
        """Note a best checkpoint when it is saved: it stays even before its pointer has moved."""
        self._best = max(key, self._best or key)

    def request(self, proceed: Callable[[], bool]) -> None:
        """Run a pass in a thread of its own, so that a slow delete holds up no upload; one that runs is repeated."""
        if not self.is_active:
            return
        with self._changed:
            self._requested = True
            if not self.is_running:
                with contextlib.suppress(RuntimeError):  # the interpreter is ending: the next attempt does it
                    threading.Thread(
                        target=self._passes, args=(proceed,), name="cloudtrain-retire", daemon=True
                    ).start()
                    self.is_running = True

    def settle(self, timeout: float | None = None) -> None:
        """Give the pass under way some time (s), `SETTLE_SECONDS` by default; the next attempt completes what is left."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self.is_running, SETTLE_SECONDS if timeout is None else timeout
            )

    def _passes(self, proceed: Callable[[], bool]) -> None:
        while True:
            with self._changed:
                if not self._requested:
                    self.is_running = False
                    self._changed.notify_all()
                    return
                self._requested = False
            self.run(proceed)

    def run(self, proceed: Callable[[], bool] = lambda: True) -> None:
        """One pass; never raises. The first error is a warning, and the next pass tries again.

        Args:
            proceed: called between requests; once it returns False, the rest is left to the next pass.
        """
        if not self.is_active:
            return
        try:
            self._finish_others(proceed)
            self._retire(proceed)
        except Exception as error:  # noqa: BLE001 - a pass that fails must not end its thread
            say = logger.debug if self._warned else logger.warning
            say(
                "Old checkpoints could not be deleted from %r; trying again after the next commit: %s",
                self._catalog.storage.url,
                error,
            )
            self._warned = True

    def _finish_others(self, proceed: Callable[[], bool]) -> None:
        if not self._unfinished:
            return
        for key in retiring(self._catalog):
            if not self._may_delete(proceed):
                return
            if finish_retiring(self._catalog, key, proceed=proceed):
                logger.info("%s: finished deleting (a previous deletion was interrupted).", key.title)
        self._unfinished = not proceed()

    def _retire(self, proceed: Callable[[], bool]) -> None:
        for key in self._due():
            if not self._may_delete(proceed):
                return
            if is_pinned(self._catalog, key):  # since the listing
                continue
            self._unfinished = True
            try:
                if not retire(self._catalog, key, proceed=proceed):
                    return
                logger.info(
                    "%s was deleted from %r: save_total_limit keeps newer ones.",
                    key.title,
                    self._catalog.storage.url,
                )
            except NoCheckpointError:
                pass  # another process deleted it
            except ManifestError as error:
                # Which files are its own is unknown here; a user may know.
                self._unreadable.add(key)
                logger.warning("%s stays on storage: %s", key.title, error)
            self._unfinished = False

    def _due(self) -> list[CheckpointKey]:
        keys = [key for key in self._catalog.checkpoints() if key not in self._unreadable]
        if not to_retire(keys, self.policy, protected=()):
            return []  # one request after most commits
        kept = {*protected(self._catalog), *([self._best] if self._best else [])}
        return to_retire(keys, self.policy, kept)

    def _may_delete(self, proceed: Callable[[], bool]) -> bool:
        if self.attempt is None or not proceed():
            return False
        # Not by the attempt's ownership: its checks stop when the attempt ends, and a pass may still be under way.
        attempts = self._catalog.attempts
        if attempts.overtaken_by(self.attempt.number) is None and attempts.is_holder(self.attempt):
            return True
        logger.info("Attempt %d was overtaken; it will not delete any more checkpoints.", self.attempt.number)
        return False


def _pin_path(key: CheckpointKey) -> str:
    return f"{PINS}/{key}.json"
