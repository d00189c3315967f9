"""Uploads that were begun and never finished: no listing shows them, and somebody pays for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.leftovers import find, remove
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest, Position
from hf_cloudtrain.storage.backend import IncompleteUpload
from hf_cloudtrain.storage.client import Storage
from tests.contract.conftest import Place

PART = 5 * 2**20
"""Bytes of the smallest part that S3 takes."""


@contextlib.contextmanager
def client_of(place: Place) -> Iterator[Any]:
    import botocore.session

    client = botocore.session.Session().create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=place.options["endpoint_url"],
        aws_access_key_id=place.options["key"],
        aws_secret_access_key=place.options["secret"],
    )
    with contextlib.closing(client):
        yield client


def begin(place: Place, path: str, parts: int = 0) -> str:
    """Begin a multipart upload below a place, as a process does that is killed then."""
    bucket, _, prefix = place.url.removeprefix("s3://").partition("/")
    with client_of(place) as client:
        key = f"{prefix}/{path}"
        token = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
        for number in range(1, parts + 1):
            client.upload_part(Bucket=bucket, Key=key, UploadId=token, PartNumber=number, Body=b"x" * PART)
    return str(token)


@pytest.mark.parametrize("place", ["moto", "rclone"], indirect=True)
def test_multipart_uploads_are_found_with_their_size_and_aborted(place: Place, storage: Storage) -> None:
    storage.write("checkpoint-1/config.json", b"{}")
    tokens = [begin(place, "checkpoint-1/model", parts) for parts in (2, 0)]
    beside = place.open("-and-more")  # a run whose name begins with that of this one
    begin(Place("beside", beside.url, place.options), "checkpoint-1/model")
    found = storage.incomplete()
    assert sorted(found, key=lambda upload: -upload.size) == [
        IncompleteUpload("checkpoint-1/model", tokens[0], 2 * PART),
        IncompleteUpload("checkpoint-1/model", tokens[1], 0),
    ]
    storage.abort([*found, IncompleteUpload("checkpoint-1/model", tokens[0], 0)])
    assert not storage.incomplete()
    assert [info.path for info in storage.list("")] == ["checkpoint-1/config.json"]
    assert len(beside.incomplete()) == 1


@pytest.mark.parametrize("place", ["moto"], indirect=True)
def test_long_answers_are_read_to_their_end(
    place: Place, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server sends all at once, so the pages are cut here, as S3 cuts them after 1,000."""
    tokens = sorted(begin(place, f"checkpoint-1/file-{number}") for number in range(3))
    fs = storage._connected()._fs  # type: ignore[attr-defined]
    whole, asked = fs.call_s3, []

    def one_at_a_time(method: str, **arguments: Any) -> Any:
        answer = whole(method, **arguments)
        if method != "list_multipart_uploads":
            return answer
        asked.append(arguments)
        uploads = sorted(answer["Uploads"], key=lambda upload: upload["Key"])
        later = [upload for upload in uploads if upload["Key"] > arguments.get("KeyMarker", "")]
        following = {"NextKeyMarker": later[0]["Key"], "NextUploadIdMarker": later[0]["UploadId"]}
        return {"Uploads": later[:1], "IsTruncated": len(later) > 1, **following}

    monkeypatch.setattr(fs, "call_s3", one_at_a_time)
    assert sorted(upload.token for upload in storage.incomplete()) == tokens
    assert [bool(arguments.get("UploadIdMarker")) for arguments in asked] == [False, True, True]


@pytest.mark.parametrize("place", ["file"], indirect=True)
def test_temporary_files_of_a_local_disk_are_found_and_removed(place: Place, storage: Storage) -> None:
    storage.write("checkpoint-1/config.json", b"{}")
    root = place.url.removeprefix("file://")
    with open(f"{root}/checkpoint-1/.cloudtrain-tmp-0123456789abcdef", "wb") as file:
        file.write(b"half")
    (found,) = storage.incomplete()
    assert (found.path, found.size) == ("checkpoint-1/.cloudtrain-tmp-0123456789abcdef", 4)
    storage.abort([found, found])
    assert not storage.incomplete()
    assert [info.path for info in storage.list("")] == ["checkpoint-1/config.json"]


@pytest.mark.parametrize("place", ["memory", "azurite"], indirect=True)
def test_where_nobody_tells_there_is_nothing_to_find(storage: Storage) -> None:
    storage.write("checkpoint-1/config.json", b"{}")
    assert not storage.incomplete()


@pytest.mark.parametrize("place", ["moto"], indirect=True)
def test_run_clean_gives_up_the_uploads_of_a_killed_attempt_and_of_whole_folders(
    place: Place, storage: Storage
) -> None:
    catalog = Catalog(storage)
    for attempt, step in ((1, 5), (1, 10), (2, 7)):
        if attempt not in catalog.attempts.numbers():
            catalog.attempts.begin(0.0, 0, None, {})
        key = CheckpointKey(attempt, step)
        folder = catalog.claim(key, f"nonce-{key}", exclusive=True)
        begin(place, f"{folder}/model", parts=1)
        if step != 10:
            catalog.commit(Manifest(str(key), folder, attempt, step, "nonce", (), Position(step)))
    begin(place, "somebody/elses")
    found = find(catalog)
    assert [(left.what, left.name, left.size, left.free) for left in found] == [
        ("upload", "checkpoint-10", PART, True),
        ("file", "checkpoint-5", PART, True),
        ("file", "checkpoint-7", PART, True),
    ]
    assert all(remove(catalog, left) for left in found)
    assert [upload.path for upload in storage.incomplete()] == ["somebody/elses"]
    assert len(catalog.checkpoints()) == 2
