"""Which checkpoints stay on storage (law 10), and the passes that retire the others.

    policy      the newest few, every n-th step; nothing without a limit
    protected   whatever the policy: the newest, the best, the pinned, and the one that the newest attempt resumed from
                until it has committed one of its own
    pass        after a commit, beside the thread that uploads, on rank 0's host: one checkpoint after the other, and
                before each a look whether a newer attempt has begun (law 6) and whether it was pinned

A pass is left as soon as there is something to upload or the process ends; the next one finishes it, one checkpoint
that was cut in half included.
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
    """What stays on storage beside what is protected.

    Raises:
        ConfigurationError: a number below 1, or steps to keep where everything is kept.

    Example:
        >>> CloudTrainCallback("s3://bucket/runs/mrpc", save_total_limit=3, keep_every_n_steps=10_000)
    """

    save_total_limit: int | None = None
    """How many checkpoints, the newest ones of the run, whichever attempt saved them; None keeps all."""
    keep_every_n_steps: int | None = None
    """Steps that are a multiple of this stay too; of attempts that saved the same step, the newest one's."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigurationError(f"{name}={value!r} is not a whole number above 0.")
        if self.keep_every_n_steps is not None and self.save_total_limit is None:
            raise ConfigurationError(
                f"keep_every_n_steps={self.keep_every_n_steps} says what stays beyond save_total_limit, which is not set, "
                "so everything stays. Set save_total_limit too."
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
    """Those that may go, oldest first, so that what is interrupted leaves the newer ones.

    Example:
        >>> to_retire([CheckpointKey(1, step) for step in (10, 20, 30)], Policy(save_total_limit=1), protected=[])
        [CheckpointKey(attempt=1, step=10), CheckpointKey(attempt=1, step=20)]
    """
    if policy.save_total_limit is None:
        return []
    ordered = sorted(keys)
    milestones = {
        key.step: key for key in ordered if policy.is_milestone(key.step)
    }  # the last one of a step stays
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
    """Delete a checkpoint, unless a training protects it since; the reason why it stays, None once it is gone."""
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
    """Retires, for one attempt, what a policy lets go. One pass at a time.

    Args:
        attempt: nothing is deleted once a newer one has begun. None: another process of the attempt does it.

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
        """Whether a deletion that was cut off may be waiting: an attempt before may have left one."""
        self._unreadable: set[CheckpointKey] = set()
        self._warned = False
        self._changed = threading.Condition()
        self._requested = False
        """Whether a pass was requested since the last one began."""
        self.is_running = False

    @property
    def is_active(self) -> bool:
        """Whether anything can ever go, and this process is the one that deletes it."""
        return self.policy.save_total_limit is not None and self.attempt is not None

    def note_best(self, key: CheckpointKey) -> None:
        """Note a best checkpoint when it is saved: it stays even before its pointer has moved."""
        self._best = max(key, self._best or key)

    def request(self, go_on: Callable[[], bool]) -> None:
        """Run a pass in a thread of its own, so that a slow delete holds up no upload; one that runs is repeated."""
        if not self.is_active:
            return
        with self._changed:
            self._requested = True
            if not self.is_running:
                with contextlib.suppress(RuntimeError):  # the interpreter is ending: the next attempt does it
                    threading.Thread(
                        target=self._passes, args=(go_on,), name="cloudtrain-retire", daemon=True
                    ).start()
                    self.is_running = True

    def settle(self, timeout: float | None = None) -> None:
        """Give the pass under way some time (s), `SETTLE_SECONDS` by default; the next attempt completes what is left."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self.is_running, SETTLE_SECONDS if timeout is None else timeout
            )

    def _passes(self, go_on: Callable[[], bool]) -> None:
        while True:
            with self._changed:
                if not self._requested:
                    self.is_running = False
                    self._changed.notify_all()
                    return
                self._requested = False
            self.run(go_on)

    def run(self, go_on: Callable[[], bool] = lambda: True) -> None:
        """One pass; never raises. Trouble is warned about once, and the next pass tries again.

        Args:
            go_on: asked between requests; at the first no the rest is left to the next pass.
        """
        if not self.is_active:
            return
        try:
            self._finish_others(go_on)
            self._retire(go_on)
        except Exception as error:  # noqa: BLE001 - a pass that fails must not end the thread that uploads
            say = logger.debug if self._warned else logger.warning
            say(
                "Old checkpoints could not be deleted from %r, which is tried again after the next commit: %s",
                self._catalog.storage.url,
                error,
            )
            self._warned = True

    def _finish_others(self, go_on: Callable[[], bool]) -> None:
        if not self._unfinished:
            return
        for key in retiring(self._catalog):
            if not self._may_delete(go_on):
                return
            if finish_retiring(self._catalog, key, go_on=go_on):
                logger.info("%s was half deleted, and is gone now.", key)
        self._unfinished = not go_on()

    def _retire(self, go_on: Callable[[], bool]) -> None:
        for key in self._due():
            if not self._may_delete(go_on):
                return
            if is_pinned(self._catalog, key):
                continue  # since the listing
            self._unfinished = True
            try:
                if not retire(self._catalog, key, go_on=go_on):
                    return
                logger.info("%s was deleted from %r: newer ones are there.", key, self._catalog.storage.url)
            except NoCheckpointError:
                pass  # somebody else did it
            except ManifestError as error:
                # Nobody knows which files are its own. A person may.
                self._unreadable.add(key)
                logger.warning("%s stays on storage: %s", key, error)
            self._unfinished = False

    def _due(self) -> list[CheckpointKey]:
        keys = [key for key in self._catalog.checkpoints() if key not in self._unreadable]
        if not to_retire(keys, self.policy, protected=()):
            return []  # one request after most commits
        kept = {*protected(self._catalog), *([self._best] if self._best else [])}
        return to_retire(keys, self.policy, kept)

    def _may_delete(self, go_on: Callable[[], bool]) -> bool:
        if self.attempt is None or not go_on():
            return False
        # Not by the attempt's fence: that one rests once the attempt is over, and a pass may still be under way.
        if self._catalog.attempts.overtaken_by(
            self.attempt.number
        ) is None and self._catalog.attempts.is_holder(self.attempt):
            return True
        logger.info("Attempt %d deletes nothing any more: it was overtaken.", self.attempt.number)
        return False


def _pin_path(key: CheckpointKey) -> str:
    return f"{PINS}/{key}.json"
