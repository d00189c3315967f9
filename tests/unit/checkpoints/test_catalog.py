"""What exists in a run, record by record. The laws about it are in tests/laws."""

from __future__ import annotations

import dataclasses
import json

import pytest

from hf_cloudtrain.checkpoints.attempts import run_urls
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.deletion import finish_retiring, retire, retiring
from hf_cloudtrain.checkpoints.host_parts import HostParts
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, FileEntry, Manifest, Position
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.checkpoints.retention import is_pinned, pin, pins, protected, unpin
from hf_cloudtrain.errors import ManifestError, NoCheckpointError, StorageUnavailableError
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.tracking.records import StepRecords
from tests.faults.runs import Machines

DIGEST = "xxh3-128:" + "0" * 32
KEY = CheckpointKey(1, 5)


def manifest_of(key: CheckpointKey, nonce: str = "nonce", **changes: object) -> Manifest:
    whole = Manifest(
        key=str(key),
        folder=f"checkpoint-{key.step}",
        attempt=key.attempt,
        step=key.step,
        nonce=nonce,
        files=(FileEntry("model", 1, DIGEST),),
        position=Position(global_step=key.step),
    )
    return dataclasses.replace(whole, **changes)


def test_attempts_are_numbered_from_1_and_remember_how_they_began(catalog: Catalog) -> None:
    first = catalog.attempts.begin(10.0, 0, None, {"host": "a"})
    second = catalog.attempts.begin(20.0, 5, KEY, {"host": "b"})
    assert (first.number, second.number) == (1, 2)
    assert catalog.attempts.read_all() == [first, second]
    assert second.resumed_from == KEY
    assert second.global_step == 5


def test_the_first_attempt_records_the_run_and_no_later_one_changes_it(catalog: Catalog) -> None:
    assert catalog.attempts.run_facts() is None
    catalog.attempts.begin(10.0, 0, None, {"host": "a"})
    catalog.attempts.begin(20.0, 0, None, {"host": "b"})
    assert catalog.attempts.run_facts() == {"created": 10.0, "host": "a"}


def test_a_lost_answer_to_the_start_takes_no_second_number(machines: Machines) -> None:
    catalog = Catalog(machines.storage)
    machines.storage.lose_answer("create", path="*/attempts/*")
    assert catalog.attempts.begin(10.0, 0, None, {}).number == 1
    assert catalog.attempts.numbers() == [1]


def test_an_attempt_whose_record_is_damaged_is_left_out_with_a_warning(
    catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    catalog.attempts.begin(10.0, 0, None, {})
    for number, data in enumerate([b"", b"[]", b'{"started": "soon"}', b'{"resumed_from": 5}'], start=2):
        catalog.storage.write(f".cloudtrain/attempts/{number:06d}.json", data)
    assert [attempt.number for attempt in catalog.attempts.read_all()] == [1]
    assert len(caplog.records) == 4
    assert catalog.attempts.begin(20.0, 0, None, {}).number == 6, "its number stays taken"


def test_a_newer_attempt_overtakes(catalog: Catalog) -> None:
    assert catalog.attempts.overtaken_by(1) is None
    for _ in range(3):
        catalog.attempts.begin(10.0, 0, None, {})
    assert catalog.attempts.overtaken_by(1) == 3
    assert catalog.attempts.overtaken_by(3) is None


def test_reading_a_checkpoint_that_is_not_there_names_it_and_the_command_that_lists(catalog: Catalog) -> None:
    with pytest.raises(NoCheckpointError, match=r"'000001-0000000005' in .*cloudtrain checkpoint list"):
        catalog.read(KEY)


def test_a_manifest_under_another_checkpoints_name_is_refused(catalog: Catalog) -> None:
    data = manifest_of(KEY, attempt=2).encode()
    catalog.storage.write(".cloudtrain/checkpoints/000001-0000000005.json", data)
    with pytest.raises(ManifestError, match="is of attempt 2, step 5"):
        catalog.read(KEY)


def test_a_manifest_that_names_the_folder_of_another_checkpoint_is_refused(catalog: Catalog) -> None:
    """What reads it would take other files, and what deletes it would delete them."""
    for folder in ("checkpoint-50", "checkpoint-5.a2", "checkpoint-5.a1x", "final"):
        data = manifest_of(KEY, folder=folder).encode()
        catalog.storage.write(".cloudtrain/checkpoints/000001-0000000005.json", data)
        with pytest.raises(ManifestError, match="belongs to another checkpoint"):
            retire(catalog, KEY)
        catalog.storage.write(f"{folder}/model", b"of another one")
        catalog.storage.write(".cloudtrain/retiring/000001-0000000006.json", data)
        assert finish_retiring(catalog, CheckpointKey(1, 6))
        assert catalog.storage.read(f"{folder}/model") == b"of another one"


def test_a_commit_is_made_once_and_repeating_it_is_no_second_one(catalog: Catalog) -> None:
    assert catalog.commit(manifest_of(KEY))
    assert catalog.commit(manifest_of(KEY)), "the same save again: its first answer may have been lost"
    assert catalog.commit(manifest_of(KEY, created=5.0)), "equal nonces are one save"
    assert not catalog.commit(manifest_of(KEY, nonce="other"))
    assert catalog.read(KEY).created == 0.0


def test_a_commit_whose_every_answer_is_lost_is_a_commit(machines: Machines) -> None:
    machines.storage.lose_answer("create", path="*/checkpoints/*", times=1)
    machines.storage.fail("create", call=2, times=100, path="*/checkpoints/*")
    assert Catalog(machines.storage).commit(manifest_of(KEY))


def test_a_commit_that_did_not_happen_is_an_error(machines: Machines) -> None:
    machines.storage.fail("create", times=100, path="*/checkpoints/*")
    with pytest.raises(StorageUnavailableError):
        Catalog(machines.storage).commit(manifest_of(KEY))
    assert machines.catalog.checkpoints() == []


def test_what_could_not_be_read_back_is_not_committed(catalog: Catalog) -> None:
    files = (FileEntry("../away", 1, DIGEST),)
    with pytest.raises(ManifestError):
        catalog.commit(manifest_of(KEY, files=files))
    assert catalog.checkpoints() == []


def claim(catalog: Catalog, attempt: int, step: int = 5, *, exclusive: bool = True) -> str:
    return catalog.claim(CheckpointKey(attempt, step), f"nonce-{attempt}", exclusive=exclusive)


def test_the_first_attempt_to_claim_a_step_gets_the_plain_name(catalog: Catalog) -> None:
    assert claim(catalog, 2) == "checkpoint-5"
    assert claim(catalog, 1) == "checkpoint-5.a1"
    assert claim(catalog, 2) == "checkpoint-5", "the same attempt goes on in its own folder"
    assert claim(catalog, 3) == "checkpoint-5.a3"
    assert claim(catalog, 3, step=6) == "checkpoint-6"


def test_without_exclusive_create_only_attempt_1_may_take_the_plain_name(catalog: Catalog) -> None:
    assert claim(catalog, 2, exclusive=False) == "checkpoint-5.a2"
    assert claim(catalog, 1, exclusive=False) == "checkpoint-5"


def test_a_retired_checkpoint_leaves_nothing_but_its_claim(catalog: Catalog) -> None:
    """Whoever still deletes in that folder, or wakes up and writes into it, must meet nobody there."""
    claim(catalog, 1)
    before = {info.path for info in catalog.storage.list("")}
    catalog.storage.write("checkpoint-5/model", b"x")
    for save in (1, 2):
        parts = HostParts(catalog, KEY, "nonce", save=save, hosts=2)
        parts.put(0, [])
        parts.elect(0)
    catalog.commit(manifest_of(KEY))
    pin(catalog, KEY)
    catalog.storage.write("checkpoint-5/from a try that failed", b"x")
    assert retire(catalog, KEY)
    assert {info.path for info in catalog.storage.list("")} == before


def test_retiring_a_suffixed_folder_leaves_the_claim_of_the_plain_one(catalog: Catalog) -> None:
    claim(catalog, 1)
    other = CheckpointKey(2, 5)
    catalog.commit(manifest_of(other, folder=claim(catalog, 2)))
    retire(catalog, other)
    assert claim(catalog, 3) == "checkpoint-5.a3"


def test_a_retirement_that_is_told_to_stop_is_finished_later(catalog: Catalog) -> None:
    files = tuple(FileEntry(f"file-{number}", 1, DIGEST) for number in range(20))
    for file in files:
        catalog.storage.write(f"checkpoint-5/{file.path}", b"x")
    catalog.storage.write("checkpoint-50/model", b"another one's")
    catalog.commit(manifest_of(KEY, files=files))
    answers = iter([True, False])
    assert not retire(catalog, KEY, proceed=lambda: next(answers))
    assert not catalog.holds(KEY)
    assert 0 < len(catalog.storage.list("checkpoint-5")) < len(files)
    assert retiring(catalog) == [KEY]
    assert finish_retiring(catalog, KEY)
    assert retiring(catalog) == []
    assert finish_retiring(catalog, KEY), "twice is fine: another process may do it too"
    assert [info.path for info in catalog.storage.list("")] == ["checkpoint-50/model"]


def test_a_retirement_that_broke_off_before_its_manifest_went_has_not_happened(catalog: Catalog) -> None:
    catalog.commit(manifest_of(KEY))
    catalog.storage.write(f".cloudtrain/retiring/{KEY}.json", manifest_of(KEY).encode())
    assert not finish_retiring(catalog, KEY)
    assert catalog.holds(KEY)


def test_pins_are_set_and_taken_away(catalog: Catalog) -> None:
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


def test_what_does_not_exist_cannot_be_pinned(catalog: Catalog) -> None:
    with pytest.raises(NoCheckpointError):
        pin(catalog, KEY)
    assert pins(catalog) == []


def test_nothing_is_protected_in_an_empty_run(catalog: Catalog) -> None:
    assert protected(catalog) == {}


def test_pointers_name_a_checkpoint_and_move(catalog: Catalog) -> None:
    assert catalog.pointer("best") is None
    catalog.point("best", KEY, 0.5)
    catalog.point("best", CheckpointKey(1, 10), 0.6)
    assert catalog.pointer("best") == CheckpointKey(1, 10)
    assert json.loads(catalog.storage.read(".cloudtrain/best.json"))["metric"] == 0.6


def test_versions_of_a_named_folder_do_not_overwrite_each_other(catalog: Catalog) -> None:
    assert NamedFolders(catalog).begin("final", "nonce-1") == ("final-000001", "final")
    assert NamedFolders(catalog).begin("final", "nonce-1") == ("final-000001", "final"), (
        "the same save tried again"
    )
    assert NamedFolders(catalog).begin("final", "nonce-2") == ("final-000002", "final.2")
    for number, folder in ((1, "final"), (2, "final.2")):
        made = manifest_of(CheckpointKey(0, 0), folder=folder)
        assert NamedFolders(catalog).commit(dataclasses.replace(made, key=f"final-{number:06d}"))
    assert NamedFolders(catalog).keys() == ["final-000001", "final-000002"]
    assert NamedFolders(catalog).read("final-000002").folder == "final.2"
    assert catalog.checkpoints() == [], "a named folder is no checkpoint"
    with pytest.raises(NoCheckpointError, match="no folder 'last-000001'"):
        NamedFolders(catalog).read("last-000001")


def test_records_of_steps_come_back_in_order_and_of_one_attempt(catalog: Catalog) -> None:
    for attempt, batch in ((1, 2), (1, 10_000), (1, 1), (2, 1)):
        StepRecords(catalog.storage).write(attempt, batch, f"{attempt}/{batch}".encode())
    catalog.storage.write(".cloudtrain/steps/000001-x.jsonl", b"no batch")
    assert StepRecords(catalog.storage).read()[1] == [b"1/1", b"1/2", b"1/10000"]
    assert StepRecords(catalog.storage).read()[2] == [b"2/1"]
    assert StepRecords(catalog.storage).read().get(3, []) == []


def test_a_heartbeat_is_read_back(catalog: Catalog) -> None:
    assert catalog.attempts.read_progress(1) is None
    catalog.attempts.write_progress(1, {"step": 5})
    catalog.attempts.write_progress(1, {"step": 6})
    assert catalog.attempts.read_progress(1) == {"step": 6}


def test_runs_below_a_folder_are_found_by_their_records(catalog: Catalog) -> None:
    catalog.attempts.begin(10.0, 0, None, {})
    above = catalog.storage.url.rpartition("/")[0]
    other = Catalog(Storage(f"{above}/deeper/run 2"))
    other.attempts.begin(10.0, 0, None, {})
    assert sorted(run_urls(Storage(above))) == ["deeper/run 2", "run"]


def test_a_damaged_record_of_a_deletion_stops_no_other_deletion(
    catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    path = f".cloudtrain/retiring/{KEY}.json"
    catalog.storage.write(path, b"{")
    assert finish_retiring(catalog, KEY)
    assert retiring(catalog) == []
    assert "cloudtrain run clean" in caplog.text
