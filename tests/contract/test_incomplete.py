"""Incomplete uploads, which no listing shows and which are billed."""

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
from tests.contract.conftest import Location

PART = 5 * 2**20
"""Bytes of the smallest part that S3 accepts."""


@contextlib.contextmanager
def client_of(location: Location) -> Iterator[Any]:
    import botocore.session

    client = botocore.session.Session().create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=location.options["endpoint_url"],
        aws_access_key_id=location.options["key"],
        aws_secret_access_key=location.options["secret"],
    )
    with contextlib.closing(client):
        yield client


def begin(location: Location, path: str, parts: int = 0) -> str:
    """Begin a multipart upload, as a process does that is killed later."""
    bucket, _, prefix = location.url.removeprefix("s3://").partition("/")
    with client_of(location) as client:
        key = f"{prefix}/{path}"
        token = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
        for number in range(1, parts + 1):
            client.upload_part(Bucket=bucket, Key=key, UploadId=token, PartNumber=number, Body=b"x" * PART)
    return str(token)


@pytest.mark.parametrize("location", ["moto", "rclone"], indirect=True)
def test_multipart_uploads_are_found_with_their_size_and_aborted(
    location: Location, storage: Storage
) -> None:
    storage.write("checkpoint-1/config.json", b"{}")
    tokens = [begin(location, "checkpoint-1/model", parts) for parts in (2, 0)]
    beside = location.open("-and-more")  # a run whose name begins with the name of this one
    begin(Location("beside", beside.url, location.options), "checkpoint-1/model")
    found = storage.incomplete()
    assert sorted(found, key=lambda upload: -upload.size) == [
        IncompleteUpload("checkpoint-1/model", tokens[0], 2 * PART),
        IncompleteUpload("checkpoint-1/model", tokens[1], 0),
    ]
    storage.abort([*found, IncompleteUpload("checkpoint-1/model", tokens[0], 0)])
    assert not storage.incomplete()
    assert [info.path for info in storage.list("")] == ["checkpoint-1/config.json"]
    assert len(beside.incomplete()) == 1


@pytest.mark.parametrize("location", ["moto"], indirect=True)
def test_all_pages_of_a_long_response_are_read(
    location: Location, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server sends one page, so the test cuts it into pages, as S3 does after 1,000 entries."""
    tokens = sorted(begin(location, f"checkpoint-1/file-{number}") for number in range(3))
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


@pytest.mark.parametrize("location", ["file"], indirect=True)
def test_temporary_files_of_a_local_disk_are_found_and_removed(location: Location, storage: Storage) -> None:
    storage.write("checkpoint-1/config.json", b"{}")
    root = location.url.removeprefix("file://")
    with open(f"{root}/checkpoint-1/.cloudtrain-tmp-0123456789abcdef", "wb") as file:
        file.write(b"half")
    (found,) = storage.incomplete()
    assert (found.path, found.size) == ("checkpoint-1/.cloudtrain-tmp-0123456789abcdef", 4)
    storage.abort([found, found])
    assert not storage.incomplete()
    assert [info.path for info in storage.list("")] == ["checkpoint-1/config.json"]


@pytest.mark.parametrize("location", ["memory", "azurite"], indirect=True)
def test_a_storage_that_lists_no_incomplete_uploads_has_none(storage: Storage) -> None:
    storage.write("checkpoint-1/config.json", b"{}")
    assert not storage.incomplete()


@pytest.mark.parametrize("location", ["moto"], indirect=True)
def test_run_clean_aborts_the_uploads_of_a_killed_attempt_and_of_whole_folders(
    location: Location, storage: Storage
) -> None:
    catalog = Catalog(storage)
    for attempt, step in ((1, 5), (1, 10), (2, 7)):
        if attempt not in catalog.attempts.numbers():
            catalog.attempts.begin(0.0, 0, None, {})
        key = CheckpointKey(attempt, step)
        folder = catalog.claim(key, f"nonce-{key}", exclusive=True)
        begin(location, f"{folder}/model", parts=1)
        if step != 10:
            catalog.commit(Manifest(str(key), folder, attempt, step, "nonce", (), Position(step)))
    begin(location, "foreign/model")
    found = find(catalog)
    assert [(left.what, left.name, left.size, left.free) for left in found] == [
        ("upload", "checkpoint-10", PART, True),
        ("file", "checkpoint-5", PART, True),
        ("file", "checkpoint-7", PART, True),
    ]
    assert all(remove(catalog, left) for left in found)
    assert [upload.path for upload in storage.incomplete()] == ["foreign/model"]
    assert len(catalog.checkpoints()) == 2
