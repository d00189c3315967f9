"""The records of a run and their names. What a hostile one does is in the tests of law 11."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cloudtrain.checkpoints import manifest as module
from hf_cloudtrain.checkpoints.manifest import (
    CheckpointKey,
    FileEntry,
    Manifest,
    Position,
    check_paths,
    decode_record,
    encode_record,
    folder_name,
)
from hf_cloudtrain.errors import ConfigurationError, ManifestError, NewerFormatError
from hf_cloudtrain.storage.names import clean_path

DIGEST = "xxh3-128:" + "0f" * 16
MANIFEST = Manifest(
    key="000003-0000000500",
    folder="checkpoint-500.a3",
    attempt=3,
    step=500,
    nonce="6d0f-500",
    files=(FileEntry("model.safetensors", 10, DIGEST), FileEntry("state/rng é.pth", 0, DIGEST)),
    position=Position(
        global_step=500,
        epoch=1.5,
        samples_seen=16_000,
        world_size=4,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        num_train_epochs=3.0,
        max_steps=1_000,
        dataset_length=10_666,
        fingerprint="00ff00ff00ff00ff",
        epoch_steps=334,
        data_seed=-(2**63),
        lr_scheduler="LambdaLR",
    ),
    exact=False,
    inexact_reason="no grace left",
    created=1_790_000_000.5,
    metrics={"loss": 0.25, "eval_accuracy": 1.0},
    origin={"host": "node-1", "torch": "2.13.0"},
)


def test_a_manifest_reads_back_as_it_was_written() -> None:
    assert Manifest.parse(MANIFEST.encode(), MANIFEST.key) == MANIFEST


def test_a_manifest_is_one_line_of_json_that_a_person_can_read() -> None:
    data = MANIFEST.encode()
    assert data.count(b"\n") == 1
    assert "rng é.pth" in data.decode()
    assert json.loads(data)["format"] == "hf_cloudtrain.manifest/1"


def test_the_size_is_that_of_all_files_and_objects_are_below_the_folder() -> None:
    assert MANIFEST.size == 10
    assert [MANIFEST.object_path(entry) for entry in MANIFEST.files] == [
        "checkpoint-500.a3/model.safetensors",
        "checkpoint-500.a3/state/rng é.pth",
    ]


def test_only_true_is_exact() -> None:
    for value, exact in (("true", False), (1, False), (None, None), (True, True)):
        record = json.loads(MANIFEST.encode()) | {"exact": value}
        assert Manifest.parse(json.dumps(record).encode(), MANIFEST.key).exact is exact
    record = json.loads(MANIFEST.encode())
    del record["exact"]
    assert Manifest.parse(json.dumps(record).encode(), MANIFEST.key).exact is False


def test_whole_numbers_of_a_position_stay_whole() -> None:
    position = Manifest.parse(MANIFEST.encode(), MANIFEST.key).position
    for item in dataclasses.fields(position):
        value = getattr(position, item.name)
        kinds = {"epoch": float, "num_train_epochs": float, "fingerprint": str, "lr_scheduler": str}
        assert type(value) is kinds.get(item.name, int)


@pytest.mark.parametrize("value", ["00ff", 5, "00FF00FF00FF00FF", ["00ff00ff00ff00ff"]])
def test_a_fingerprint_that_is_none_is_refused(value: object) -> None:
    record = json.loads(MANIFEST.encode())
    record["position"]["fingerprint"] = value
    with pytest.raises(ManifestError, match="fingerprint"):
        Manifest.parse(json.dumps(record).encode(), MANIFEST.key)


@pytest.mark.parametrize("value", [2**64, 4.0, "42", True])
def test_a_seed_that_is_none_is_refused(value: object) -> None:
    record = json.loads(MANIFEST.encode())
    record["position"]["data_seed"] = value
    with pytest.raises(ManifestError, match="data_seed"):
        Manifest.parse(json.dumps(record).encode(), MANIFEST.key)


def test_a_position_of_before_these_facts_were_noted_still_reads() -> None:
    record = json.loads(MANIFEST.encode())
    for name in ("epoch_steps", "data_seed", "lr_scheduler"):
        del record["position"][name]
    found = Manifest.parse(json.dumps(record).encode(), MANIFEST.key).position
    assert (found.epoch_steps, found.data_seed, found.lr_scheduler) == (None, None, None)


@pytest.mark.parametrize("version", [None, 1, "hf_cloudtrain.manifest/0", "other"])
def test_another_format_is_refused_with_both_names(version: object) -> None:
    record = json.loads(MANIFEST.encode()) | {"format": version}
    with pytest.raises(ManifestError, match=rf"'{version}', not 'hf_cloudtrain.manifest/1'") as refused:
        Manifest.parse(json.dumps(record).encode(), MANIFEST.key)
    assert not isinstance(refused.value, NewerFormatError)


def test_a_newer_format_is_told_from_a_damaged_one_and_says_to_upgrade() -> None:
    record = json.loads(MANIFEST.encode()) | {"format": "hf_cloudtrain.manifest/2"}
    with pytest.raises(NewerFormatError, match="Upgrade hf_cloudtrain"):
        Manifest.parse(json.dumps(record).encode(), MANIFEST.key)


def test_a_manifest_without_files_is_one_of_an_empty_folder() -> None:
    empty = dataclasses.replace(MANIFEST, files=())
    assert Manifest.parse(empty.encode(), MANIFEST.key).size == 0


@given(attempt=st.integers(1, 10**11), step=st.integers(0, 10**14))
@settings(deadline=None)
def test_a_checkpoints_key_says_its_attempt_and_step(attempt: int, step: int) -> None:
    key = CheckpointKey(attempt, step)
    assert CheckpointKey.named(str(key)) == key


@given(st.tuples(*[st.integers(1, 999_999), st.integers(0, 10**9)] * 2))
@settings(deadline=None)
def test_keys_sort_as_text_as_they_do_as_numbers(numbers: tuple[int, int, int, int]) -> None:
    first, second = numbers[:2], numbers[2:]
    assert (str(CheckpointKey(*first)) < str(CheckpointKey(*second))) == (first < second)


@pytest.mark.parametrize(
    "name", ["", "1-1", "000001-500", "a00001-0000000500", "000001-0000000500x", "final-000001"]
)
def test_other_names_are_no_checkpoint(name: str) -> None:
    assert CheckpointKey.named(name) is None


@pytest.mark.parametrize("name", ["final", "final-model", "v1.2_b", "0", "x" * 64])
def test_a_folders_name_may_be(name: str) -> None:
    assert folder_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".cloudtrain", "a/b", "a b", "é", "-x", "checkpoint-5", "x" * 65]
)
def test_a_folders_name_may_not_be(name: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot name a folder of a run"):
        folder_name(name)


def test_a_clean_path_is_given_back() -> None:
    assert clean_path("a/b.c/d") == "a/b.c/d"


def test_a_name_that_is_a_prefix_of_another_is_not_its_folder() -> None:
    check_paths(["a", "ab", "ab.c/d", "b/a"], "folder")


@pytest.mark.parametrize("paths", [["a", "a/b"], ["a/b/c", "a"], ["x", "a/b", "a/b/c/d"]])
def test_what_is_a_file_and_a_folder_is_refused(paths: list[str]) -> None:
    with pytest.raises(ManifestError, match="as a file and as a folder"):
        check_paths(paths, "folder 'out'")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_record_with_what_json_does_not_know_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        encode_record({"loss": value})


def test_a_record_that_is_too_large_is_not_even_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RECORD_BYTES", 10)
    with pytest.raises(ManifestError, match="manifest 'x' has 11 bytes, more than the 10"):
        decode_record(b"not JSON at", "manifest 'x'")


def test_more_files_than_any_checkpoint_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FILES", 1)
    with pytest.raises(ManifestError, match="names 2 files, more than the 1"):
        Manifest.parse(MANIFEST.encode(), MANIFEST.key)
