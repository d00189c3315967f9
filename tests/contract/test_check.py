"""Problems that `check` finds before the first step: the error says what to do, without a retry."""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain import errors
from hf_cloudtrain.storage.client import Storage
from tests.proxy import Answer, Call, Forward, Proxy, Rule, s3_error
from tests.servers import Server


@pytest.fixture(autouse=True)
def no_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(seconds: float) -> None:
        raise AssertionError("tried again where a retry cannot help")

    monkeypatch.setattr("time.sleep", fail)


@pytest.fixture
def proxy(moto: Server) -> Iterator[Proxy]:
    bucket = moto.bucket  # created before sleeping is forbidden
    with Proxy(moto.endpoint) as proxy:
        proxy.url = f"s3://{bucket}/check-{secrets.token_hex(4)}"  # type: ignore[attr-defined]
        yield proxy


@pytest.fixture
def storage(proxy: Proxy) -> Storage:
    return Storage(proxy.url, options_for(proxy))  # type: ignore[attr-defined]


def test_missing_bucket(moto: Server) -> None:
    with pytest.raises(errors.ObjectNotFoundError, match=r"'s3://no-such-bucket/run'.*Create the bucket"):
        Storage("s3://no-such-bucket/run", moto.storage_options).check()


def test_missing_container(azurite: Server) -> None:
    with pytest.raises(
        errors.ObjectNotFoundError, match=r"(?s)'az://no-such-one/run'.*[Cc]reate the (bucket|cont)"
    ):
        Storage("az://no-such-one/run", azurite.storage_options).check()


def test_wrong_secret(rclone: Server) -> None:
    options = {**rclone.storage_options, "secret": "wrong-secret-value"}
    with pytest.raises(errors.StoragePermissionError, match="Check the credentials") as raised:
        Storage(f"s3://{rclone.bucket}/run", options).check()
    assert "wrong-secret-value" not in str(raised.value)


def test_wrong_azure_key(azurite: Server) -> None:
    wrong = azurite.storage_options["connection_string"].replace("AccountKey=E", "AccountKey=F")
    with pytest.raises(errors.StoragePermissionError, match="Check the credentials") as raised:
        Storage(f"az://{azurite.bucket}/run", {"connection_string": wrong}).check()
    assert wrong.partition("AccountKey=")[2][:20] not in str(raised.value)


@pytest.mark.parametrize(
    "code", ["AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"]
)
def test_credentials_without_permission_to_write(storage: Storage, proxy: Proxy, code: str) -> None:
    proxy.rules.append(only("PUT", s3_error(400 if code == "ExpiredToken" else 403, code)))
    with pytest.raises(
        errors.StoragePermissionError, match=rf"write to '{storage.url}'.*Check the credentials"
    ):
        storage.check()


def test_credentials_without_permission_to_read(storage: Storage, proxy: Proxy) -> None:
    proxy.rules.append(only("GET", s3_error(403, "AccessDenied")))
    with pytest.raises(errors.StoragePermissionError, match=r"download .*Check the credentials"):
        storage.check()


def test_credentials_without_permission_to_list(storage: Storage, proxy: Proxy) -> None:
    proxy.rules.append(
        lambda call, forward: s3_error(403, "AccessDenied") if "list-type" in call.path else None
    )
    with pytest.raises(errors.StoragePermissionError, match=r"list .*Check the credentials"):
        storage.check()


def test_listing_that_shows_nothing(storage: Storage, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_cloudtrain.storage.client.LISTED_AFTER", ())
    empty = Answer(200, b"<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>")
    proxy.rules.append(lambda call, forward: empty if "list-type" in call.path else None)
    with pytest.raises(errors.StorageError, match=r"does not list an object"):
        storage.check()


def test_credentials_without_permission_to_delete(storage: Storage, proxy: Proxy) -> None:
    proxy.rules.append(only("DELETE", s3_error(403, "AccessDenied")))
    with pytest.raises(errors.StoragePermissionError, match=r"delete .*Check the credentials"):
        storage.check()


def test_only_the_native_client_is_refused(storage: Storage, proxy: Proxy) -> None:
    """The probe uses each client that will move bytes."""

    def refuse(call: Call, forward: Forward) -> Answer | None:
        return s3_error(403, "AccessDenied") if call.native else None

    proxy.rules.append(refuse)
    with pytest.raises(errors.StoragePermissionError, match="Check the credentials"):
        storage.check()


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (301, "PermanentRedirect"),
        (400, "AuthorizationHeaderMalformed"),
        (400, "IllegalLocationConstraintException"),
    ],
)
@pytest.mark.parametrize("both", [True, False], ids=["every-client", "native-client"])
def test_bucket_in_another_region(storage: Storage, proxy: Proxy, status: int, code: str, both: bool) -> None:
    elsewhere = s3_error(status, code, **{"x-amz-bucket-region": "eu-central-1"})
    proxy.rules.append(lambda call, forward: elsewhere if both or call.native else None)
    with pytest.raises(errors.StorageError, match=r"(?s)another region.*AWS_REGION") as raised:
        storage.check()
    assert not isinstance(raised.value, errors.StorageUnavailableError)


@pytest.mark.parametrize("native", [True, False])
def test_storage_that_returns_different_bytes(storage: Storage, proxy: Proxy, native: bool) -> None:
    def flip(call: Call, forward: Forward) -> Answer | None:
        if call.method != "GET" or call.native is not native:
            return None
        answer = forward()
        unsigned = {name: value for name, value in answer.headers.items() if "checksum" not in name.lower()}
        return dataclasses.replace(
            answer, body=bytes([answer.body[0] ^ 1]) + answer.body[1:], headers=unsigned
        )

    proxy.rules.append(flip)
    with pytest.raises(errors.StorageError, match="different bytes"):
        storage.check()


def test_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(errors.StorageError, match=str(tmp_path)) as raised:
        Storage(str(tmp_path / "file" / "run")).check()
    assert not isinstance(raised.value, errors.StorageUnavailableError)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(errors.StoragePermissionError, match=str(tmp_path)):
        Storage(str(tmp_path / "closed" / "run")).check()


def options_for(proxy: Proxy) -> dict[str, Any]:
    return {"key": "testing", "secret": "testing-secret", "endpoint_url": proxy.endpoint}


def only(method: str, answer: Answer) -> Rule:
    return lambda call, forward: answer if call.method == method else None
