"""Credentials and endpoints from every usual source: fsspec and the native client must use the same ones."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain import errors
from hf_cloudtrain.storage.client import Storage
from tests.proxy import Answer, Call, Forward, Proxy, s3_error
from tests.servers import Server


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of its own, whose `~/.aws` is read."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name)
    (tmp_path / ".aws").mkdir()
    return tmp_path


@pytest.fixture
def proxy(moto: Server) -> Iterator[Proxy]:
    with Proxy(moto.endpoint) as proxy:
        yield proxy


@pytest.fixture
def url(moto: Server) -> str:
    return f"s3://{moto.bucket}/credentials-{secrets.token_hex(4)}"


def test_environment(proxy: Proxy, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, AWS_ENDPOINT_URL=proxy.endpoint)
    assert keys_used(proxy, url, None, tmp_path) == both("FROMENV")


def test_environment_with_a_session_token_and_an_endpoint_for_s3_alone(
    proxy: Proxy, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(
        monkeypatch,
        AWS_SESSION_TOKEN="the-token",
        AWS_ENDPOINT_URL="http://127.0.0.1:9",
        AWS_ENDPOINT_URL_S3=proxy.endpoint,
    )
    assert keys_used(proxy, url, None, tmp_path) == both("FROMENV")
    assert tokens(proxy) == {"the-token"}


def test_default_profile(proxy: Proxy, url: str, home: Path) -> None:
    credentials_file(home, default="FROMDEFAULT", other="OTHER")
    options = {"endpoint_url": proxy.endpoint}
    assert keys_used(proxy, url, options, home) == both("FROMDEFAULT")


def test_profile_in_the_environment(
    proxy: Proxy, url: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials_file(home, default="FROMDEFAULT", training="FROMTRAINING")
    monkeypatch.setenv("AWS_PROFILE", "training")
    options = {"endpoint_url": proxy.endpoint}
    assert keys_used(proxy, url, options, home) == both("FROMTRAINING")


def test_profile_in_an_option_takes_precedence_over_the_environment(
    proxy: Proxy, url: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials_file(home, default="FROMDEFAULT", training="FROMTRAINING", other="OTHER")
    environment(monkeypatch, AWS_PROFILE="other", AWS_SESSION_TOKEN="not-this")
    options = {"endpoint_url": proxy.endpoint, "profile": "training"}
    assert keys_used(proxy, url, options, home) == both("FROMTRAINING")
    assert tokens(proxy) == {None}


def test_endpoint_and_region_of_a_profile(
    proxy: Proxy, url: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials_file(home, training="FROMTRAINING")
    config_file(home, f"[profile training]\nregion = eu-west-3\nendpoint_url = {proxy.endpoint}\n")
    monkeypatch.setenv("AWS_PROFILE", "training")
    assert keys_used(proxy, url, None, home) == both("FROMTRAINING")
    assert regions(proxy) == {"eu-west-3"}


def test_endpoint_of_a_services_section(proxy: Proxy, url: str, home: Path) -> None:
    credentials_file(home, training="FROMTRAINING")
    config_file(
        home,
        "[profile training]\nservices = minio\nregion = us-west-2\n"
        f"[services minio]\ns3 =\n  endpoint_url = {proxy.endpoint}\n",
    )
    assert keys_used(proxy, url, {"profile": "training"}, home) == both("FROMTRAINING")
    assert regions(proxy) == {"us-west-2"}


def test_options_take_precedence_over_the_environment(
    proxy: Proxy, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(monkeypatch, AWS_SESSION_TOKEN="not-this", AWS_ENDPOINT_URL="http://127.0.0.1:9")
    options = {"key": "FROMOPTIONS", "secret": "s3cret", "endpoint_url": proxy.endpoint}
    assert keys_used(proxy, url, options, tmp_path) == both("FROMOPTIONS")
    assert tokens(proxy) == {None}


def test_client_kwargs(proxy: Proxy, url: str, tmp_path: Path) -> None:
    client = {"endpoint_url": proxy.endpoint, "region_name": "ap-south-1"}
    options = {"key": "FROMOPTIONS", "secret": "s3cret", "token": "the-token", "client_kwargs": client}
    assert keys_used(proxy, url, options, tmp_path) == both("FROMOPTIONS")
    assert regions(proxy) == {"ap-south-1"}
    assert tokens(proxy) == {"the-token"}


def test_web_identity(
    moto: Server, proxy: Proxy, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a pod on EKS."""
    (tmp_path / "token").write_text("a-signed-token")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/training")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", moto.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
    used = keys_used(proxy, url, None, tmp_path)
    assert all(len(keys) == 1 and min(keys).startswith("ASIA") for keys in used.values()), used
    assert None not in tokens(proxy)


def test_expired_keys_are_read_again_from_their_file(proxy: Proxy, url: str, home: Path) -> None:
    """As when a single sign-on tool rewrites `~/.aws/credentials` every hour during training."""

    def expired(call: Call, forward: Forward) -> Answer | None:
        return s3_error(400, "ExpiredToken") if call.access_key == "OLD" and ended else None

    ended: list[bool] = []
    proxy.rules.append(expired)
    credentials_file(home, default="OLD")
    storage = Storage(url, {"endpoint_url": proxy.endpoint})
    storage.check()
    (home / "source").write_bytes(b"content")
    ended.append(True)
    with pytest.raises(errors.StoragePermissionError, match="ExpiredToken"):
        storage.upload(str(home / "source"), "model.bin")

    credentials_file(home, default="NEW")
    storage.upload(str(home / "source"), "model.bin")
    assert storage.create("claim", b"x")
    storage.download("model.bin", str(home / "target"), 7)
    assert [info.path for info in storage.list("")] == ["claim", "model.bin"]
    served = [call for call in proxy.calls if call.status == 200 and "model.bin" in call.path]
    assert {call.access_key for call in served} == {"NEW"}


def test_a_session_that_ends_within_minutes_is_renewed_by_its_provider(
    proxy: Proxy, url: str, home: Path
) -> None:
    """The provider's sessions last one minute, less than the time for which obstore would use the first one."""
    (home / "count").write_text("0")
    provider = home / "provider.py"
    provider.write_text(PROVIDER.format(home=home))
    config_file(home, f"[default]\nregion = us-east-1\ncredential_process = {sys.executable} {provider}\n")
    ended: list[str] = []
    proxy.rules.append(
        lambda call, forward: s3_error(400, "ExpiredToken") if call.access_key in ended else None
    )
    storage = Storage(url, {"endpoint_url": proxy.endpoint})
    storage.check()
    ended += {call.access_key for call in proxy.calls}
    (home / "source").write_bytes(b"content")
    storage.upload(str(home / "source"), "model.bin")
    storage.write("record", b"x")
    assert storage.read("record") == b"x"


PROVIDER = """
import datetime, json, pathlib
count = pathlib.Path("{home}/count")
number = int(count.read_text()) + 1
count.write_text(str(number))
ends = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=1)
print(json.dumps(dict(Version=1, AccessKeyId=f"SESSION{{number}}", SecretAccessKey="s", SessionToken="t",
                      Expiration=ends.isoformat())))
"""


def test_missing_credentials_are_an_error_before_any_request(proxy: Proxy, url: str, home: Path) -> None:
    with pytest.raises(errors.StoragePermissionError, match=r"[Cc]redentials"):
        Storage(url, {"endpoint_url": proxy.endpoint}).check()
    assert proxy.calls == []


def test_unknown_profile_is_an_error_that_names_it(proxy: Proxy, url: str, home: Path) -> None:
    credentials_file(home, default="FROMDEFAULT")
    with pytest.raises(errors.CloudTrainError, match="nosuch") as raised:
        Storage(url, {"endpoint_url": proxy.endpoint, "profile": "nosuch"}).check()
    assert not isinstance(raised.value, errors.StorageUnavailableError)  # a retry would not help


def test_azure_connection_string_from_the_environment(
    azurite: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in azurite.env.items():
        monkeypatch.setenv(name, value)
    storage = Storage(f"az://{azurite.bucket}/credentials-{secrets.token_hex(4)}")
    storage.check()
    assert storage.exclusive
    assert storage._transfer is not None


def environment(monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    given = {"AWS_ACCESS_KEY_ID": "FROMENV", "AWS_SECRET_ACCESS_KEY": "secret", **more}
    for name, value in given.items():
        monkeypatch.setenv(name, value)


def credentials_file(home: Path, **profiles: str) -> None:
    """Write `~/.aws/credentials`, one key per profile."""
    text = (
        f"[{profile}]\naws_access_key_id = {key}\naws_secret_access_key = secret-of-{key}\n"
        for profile, key in profiles.items()
    )
    (home / ".aws" / "credentials").write_text("\n".join(text))


def config_file(home: Path, text: str) -> None:
    (home / ".aws" / "config").write_text(text)


def keys_used(proxy: Proxy, url: str, options: dict[str, Any] | None, folder: Path) -> dict[str, set[str]]:
    """Call each method of a storage, and return the access keys in the signatures of each client's requests."""
    storage = Storage(url, options)
    storage.check()
    (folder / "source").write_bytes(b"content")
    storage.upload(str(folder / "source"), "model.bin")
    storage.download("model.bin", str(folder / "target"), 7)
    assert [info.path for info in storage.list("")] == ["model.bin"]
    storage.close()
    return {
        "native": {call.access_key for call in proxy.calls if call.native},
        "fsspec": {call.access_key for call in proxy.calls if not call.native},
    }


def both(key: str) -> dict[str, set[str]]:
    return {"native": {key}, "fsspec": {key}}


def tokens(proxy: Proxy) -> set[str | None]:
    return {call.headers.get("x-amz-security-token") for call in proxy.calls}


def regions(proxy: Proxy) -> set[str]:
    """The regions in the signatures of the requests."""

    def region(call: Call) -> str:
        return call.headers["authorization"].partition("Credential=")[2].split("/")[2]

    return {region(call) for call in proxy.calls}
