"""Which checkpoints are deleted, and that the needed ones stay in every history of a run."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.deletion import retire, retiring
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, FileEntry, Manifest, Position
from hf_cloudtrain.checkpoints.retention import (
    Policy,
    Retention,
    is_pinned,
    pin,
    pins,
    protected,
    to_retire,
    unpin,
)
from hf_cloudtrain.errors import ConfigurationError, NoCheckpointError, StorageError
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.testing import FaultyStorage
from tests.unit.checkpoints.manifests import KEY, manifest_of

FILES = tuple(FileEntry(path, 1, "xxh3-128:" + "0" * 32) for path in ("model", "deep/er/optimizer"))


def keys(*texts: str) -> list[CheckpointKey]:
    """'2/500' is step 500 of attempt 2."""
    return [CheckpointKey(*map(int, text.split("/"))) for text in texts]


def save(catalog: Catalog, key: CheckpointKey) -> None:
    """Commit a checkpoint as the upload queue does, without its threads."""
    folder = catalog.claim(key, f"nonce-{key}", exclusive=True)
    for file in FILES:
        catalog.storage.write(f"{folder}/{file.path}", b"x")
    position = Position(global_step=key.step)
    catalog.commit(Manifest(str(key), folder, key.attempt, key.step, "nonce", FILES, position))


class TestPolicy:
    def test_the_newest_by_attempt_and_step_stay(self) -> None:
        there = keys("1/10", "1/900", "2/20", "2/30")
        assert to_retire(there, Policy(2), []) == keys("1/10", "1/900")
        assert to_retire(reversed(there), Policy(3), []) == keys("1/10")
        assert to_retire(there, Policy(4), []) == []

    def test_without_a_limit_everything_stays(self) -> None:
        assert to_retire(keys("1/10", "1/20"), Policy(), []) == []

    def test_protected_checkpoints_stay_and_do_not_count_for_the_limit(self) -> None:
        there = keys("1/10", "1/20", "1/30", "1/40")
        assert to_retire(there, Policy(2), keys("1/10")) == keys("1/20")

    def test_every_nth_step_stays_and_of_a_repeated_step_the_last(self) -> None:
        there = keys("1/100", "1/150", "1/200", "2/150", "2/200", "2/250", "2/260")
        assert to_retire(there, Policy(1, 100), []) == keys("1/150", "1/200", "2/150", "2/250")

    @pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
    @pytest.mark.parametrize("name", ["save_total_limit", "keep_every_n_steps"])
    def test_a_limit_that_is_not_a_positive_integer_is_refused(self, name: str, value: object) -> None:
        with pytest.raises(ConfigurationError, match=f"{name}={value!r} must be a positive integer"):
            Policy(**{"save_total_limit": 1, name: value})  # type: ignore[arg-type]

    def test_every_n_steps_without_a_limit_is_refused_because_it_has_no_effect(self) -> None:
        with pytest.raises(ConfigurationError, match="Set save_total_limit too"):
            Policy(keep_every_n_steps=100)


class TestPass:
    @pytest.fixture
    def storage(self, tmp_path: Path, no_pauses: None) -> FaultyStorage:
        return FaultyStorage(f"file://{tmp_path / 'run'}")

    @pytest.fixture
    def catalog(self, storage: FaultyStorage) -> Catalog:
        """Attempt 1 has saved the steps 1 to 5."""
        catalog = Catalog(storage)
        catalog.attempts.begin(0.0, 0, None, {})
        for step in range(1, 6):
            save(catalog, CheckpointKey(1, step))
        return catalog

    def test_a_pass_leaves_what_the_policy_keeps_and_no_files_of_the_others(self, catalog: Catalog) -> None:
        Retention(catalog, Policy(2), catalog.attempts.read(1)).run()
        assert catalog.checkpoints() == keys("1/4", "1/5")
        folders = {info.path.partition("/")[0] for info in catalog.storage.list("")}
        assert folders == {".cloudtrain", "checkpoint-4", "checkpoint-5"}

    def test_a_pass_that_has_nothing_to_do_costs_one_request(
        self, catalog: Catalog, storage: FaultyStorage
    ) -> None:
        retention = Retention(catalog, Policy(2), catalog.attempts.read(1))
        retention.run()
        storage.calls.clear()
        retention.run()
        assert [call.kind for call in storage.calls] == ["list"]

    def test_without_a_limit_or_on_another_host_no_request_is_made(
        self, catalog: Catalog, storage: FaultyStorage
    ) -> None:
        idle = Retention(catalog, Policy(), catalog.attempts.read(1)), Retention(catalog, Policy(1), None)
        storage.calls.clear()
        for retention in idle:
            retention.run()
        assert storage.calls == []

    def test_an_overtaken_attempt_deletes_nothing(self, catalog: Catalog) -> None:
        catalog.attempts.begin(0.0, 5, CheckpointKey(1, 5), {})
        Retention(catalog, Policy(1), catalog.attempts.read(1)).run()
        assert len(catalog.checkpoints()) == 5

    def test_an_attempt_whose_number_another_process_has_taken_deletes_nothing(
        self, catalog: Catalog
    ) -> None:
        """Where the storage does not honour exclusive create, the other one is the attempt."""
        attempt = dataclasses.replace(catalog.attempts.read(1), exclusive=False)
        retention = Retention(catalog, Policy(1), attempt)
        other = dataclasses.asdict(dataclasses.replace(attempt, nonce="another"))
        catalog.storage.write(".cloudtrain/attempts/000001.json", json.dumps(other).encode())
        retention.run()
        assert len(catalog.checkpoints()) == 5

    def test_before_each_deletion_a_pass_checks_whether_it_was_overtaken(self, catalog: Catalog) -> None:
        asked = 0

        def overtaken_at_the_third_request() -> bool:
            nonlocal asked
            asked += 1
            if asked == 3:
                catalog.attempts.begin(0.0, 5, CheckpointKey(1, 5), {})
            return True

        Retention(catalog, Policy(1), catalog.attempts.read(1)).run(overtaken_at_the_third_request)
        assert catalog.checkpoints() == keys("1/2", "1/3", "1/4", "1/5")

    def test_a_checkpoint_that_is_pinned_during_the_pass_stays(
        self, catalog: Catalog, storage: FaultyStorage
    ) -> None:
        asked = 0

        def pin_one() -> bool:
            nonlocal asked
            asked += 1
            if asked == 2:  # the first delete
                pin(catalog, CheckpointKey(1, 3))
            return True

        Retention(catalog, Policy(1), catalog.attempts.read(1)).run(pin_one)
        assert catalog.checkpoints() == keys("1/3", "1/5")

    def test_a_best_checkpoint_stays_before_its_pointer_has_moved(self, catalog: Catalog) -> None:
        catalog.point("best", CheckpointKey(1, 1))
        retention = Retention(catalog, Policy(1), catalog.attempts.read(1))
        retention.note_best(CheckpointKey(1, 3))
        retention.run()
        assert catalog.checkpoints() == keys("1/1", "1/3", "1/5")

    def test_a_pass_that_is_stopped_is_completed_by_the_next_one(self, catalog: Catalog) -> None:
        for stop_at in range(1, 6):
            answers = iter([True] * stop_at)
            Retention(catalog, Policy(1), catalog.attempts.read(1)).run(lambda: next(answers, False))  # noqa: B023
        assert catalog.checkpoints()[-1:] == keys("1/5")
        Retention(catalog, Policy(1), catalog.attempts.read(1)).run()
        folders = {info.path.partition("/")[0] for info in catalog.storage.list("")}
        assert folders == {".cloudtrain", "checkpoint-5"}
        assert retiring(catalog) == []

    def test_an_error_is_warned_about_once_and_the_next_pass_tries_again(
        self, catalog: Catalog, storage: FaultyStorage, caplog: pytest.LogCaptureFixture
    ) -> None:
        retention = Retention(catalog, Policy(1), catalog.attempts.read(1))
        storage.fail("delete", StorageError("not allowed"), path="checkpoint-1/*", times=100)
        retention.run()
        retention.run()
        warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(warnings) == 1
        assert "trying again after the next commit: not allowed" in warnings[0]
        storage.heal()
        retention.run()
        assert catalog.checkpoints() == keys("1/5")
        assert catalog.storage.list("checkpoint-1") == []

    def test_a_checkpoint_with_a_damaged_manifest_stays_and_the_others_are_deleted(
        self, catalog: Catalog, caplog: pytest.LogCaptureFixture
    ) -> None:
        catalog.storage.write(".cloudtrain/checkpoints/000001-0000000002.json", b"{")
        retention = Retention(catalog, Policy(1), catalog.attempts.read(1))
        retention.run()
        retention.run()
        assert catalog.checkpoints() == keys("1/2", "1/5")
        assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


@dataclass
class History:
    """A run, and what happens to it: one method an event."""

    catalog: Catalog
    attempts: int = 0
    steps: dict[int, int] = field(default_factory=dict)

    def begin(self, choice: int) -> None:
        there = self.catalog.checkpoints()
        resumed = there[choice % len(there)] if there and choice % 4 else (there or [None])[-1]
        made = self.catalog.attempts.begin(0.0, resumed.step if resumed else 0, resumed, {})
        self.steps[made.number] = made.global_step

    def save(self, choice: int) -> None:
        """By any attempt: one that was overtaken may not have noticed."""
        if self.steps:
            attempt = 1 + choice % len(self.steps)
            self.steps[attempt] += 10
            key = CheckpointKey(attempt, self.steps[attempt])
            save(self.catalog, key)
            if choice % 3 == 0 and self.catalog.attempts.overtaken_by(attempt) is None:
                self.catalog.point("best", key)

    def pin(self, choice: int) -> None:
        self.on_one(choice, partial(pin, self.catalog))

    def unpin(self, choice: int) -> None:
        self.on_one(choice, partial(unpin, self.catalog))

    def delete(self, choice: int) -> None:
        """A person deletes what is protected by nothing, and may stop in the middle."""
        needed = protected(self.catalog)
        answers = iter([True] * (choice % 3))
        self.on_one(
            choice,
            lambda key: key in needed or retire(self.catalog, key, proceed=lambda: next(answers, False)),
        )

    def on_one(self, choice: int, do: Callable[[CheckpointKey], object]) -> None:
        there = self.catalog.checkpoints()
        if there:
            do(there[choice % len(there)])

    def retire(self, choice: int) -> None:
        """A pass of any attempt, to its end or cut off."""
        if not self.steps:
            return
        attempt, policy = 1 + choice % len(self.steps), Policy(1 + choice % 3, (None, 30)[choice % 2])
        before, needed = self.catalog.checkpoints(), self.needed(policy)
        answers = iter([True] * (choice % 7))
        proceed = (lambda: True) if choice % 2 else (lambda: next(answers, False))
        Retention(self.catalog, policy, self.catalog.attempts.read(attempt)).run(proceed)
        after = self.catalog.checkpoints()
        assert needed <= set(after), "a needed checkpoint is gone"
        if self.catalog.attempts.overtaken_by(attempt) is not None:
            assert before == after, "an overtaken attempt deleted something"
        elif proceed():
            assert set(after) == needed, "a checkpoint that is not needed stayed"

    def needed(self, policy: Policy) -> set[CheckpointKey]:
        """What law 10 and the policy say, counted in another way than the code does."""
        there = self.catalog.checkpoints()
        needed = {
            key for key in there if sum(other > key for other in there) < (policy.save_total_limit or 0)
        }
        needed |= set(pins(self.catalog)) | {self.catalog.pointer("best")} - {None}
        newest = self.catalog.attempts.read_all()[-1]
        if newest.resumed_from and all(key.attempt < newest.number for key in there):
            needed.add(newest.resumed_from)
        if policy.keep_every_n_steps:
            for key in there:
                later = [other for other in there if other.step == key.step and other > key]
                needed |= {key} if key.step % policy.keep_every_n_steps == 0 and not later else set()
        return needed & set(there)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["begin", "save", "save", "save", "pin", "unpin", "delete", "retire", "retire"]),
            st.integers(0, 10_000),
        ),
        max_size=25,
    )
)
def test_law_10_protected_checkpoints_survive_in_every_history_of_a_run(
    happenings: list[tuple[str, int]],
) -> None:
    with TemporaryDirectory() as folder:
        history = History(Catalog(Storage(f"file://{folder}")))
        history.begin(0)
        for what, choice in happenings:
            getattr(history, what)(choice)
        catalog = history.catalog
        newest = max(history.steps)
        Retention(catalog, Policy(1), catalog.attempts.read(newest)).run()
        for key in catalog.checkpoints():
            manifest = catalog.read(key)
            there = {info.path for info in catalog.storage.list(manifest.folder)}
            assert there == {manifest.object_path(file) for file in manifest.files}, "it is whole"
        folders = {info.path.partition("/")[0] for info in catalog.storage.list("")} - {".cloudtrain"}
        assert folders == {catalog.read(key).folder for key in catalog.checkpoints()}, "nothing half deleted"


def test_pins_are_set_and_removed(catalog: Catalog) -> None:
    other = CheckpointKey(2, 5)
    for key in (other, KEY):
        catalog.commit(manifest_of(key, folder=f"checkpoint-5.a{key.attempt}"))
        pin(catalog, key)
        pin(catalog, key)
    assert pins(catalog) == [KEY, other]
    unpin(catalog, KEY)
    unpin(catalog, KEY)
    assert (is_pinned(catalog, KEY), is_pinned(catalog, other)) == (False, True)
    assert pins(catalog) == [other]


def test_a_checkpoint_that_does_not_exist_cannot_be_pinned(catalog: Catalog) -> None:
    with pytest.raises(NoCheckpointError):
        pin(catalog, KEY)
    assert pins(catalog) == []


def test_nothing_is_protected_in_an_empty_run(catalog: Catalog) -> None:
    assert protected(catalog) == {}
