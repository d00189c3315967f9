"""`cloudtrain doctor` against every kind of storage, and with one fault each: the line that fails names what mends it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_cloudtrain import env
from hf_cloudtrain.cli import checkup
from hf_cloudtrain.storage import client, diagnosis, retries
from tests.contract.conftest import EVERY_SERVER, Location
from tests.contract.test_incomplete import begin
from tests.proxy import Answer, Proxy, Rule, s3_error
from tests.servers import Server, free_port
from tests.unit.cli.terminal import cloudtrain

ROOT = Path(__file__).resolve().parents[2]
ALWAYS = ["credentials", "server"]
ACCESS = ["write", "read", "list", "conditional create", "upload", "download", "clock", "free disk"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkup, "RATE_SIZES", (2**20,))
    monkeypatch.setattr(retries, "PAUSES", ())
    monkeypatch.setattr(client, "LISTED_AFTER", ())
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def examine(monkeypatch: pytest.MonkeyPatch) -> Any:
    def examine(url: str, options: dict[str, Any], code: int = 0) -> dict[str, dict[str, Any]]:
        monkeypatch.setenv(env.STORAGE_OPTIONS, json.dumps(options))
        shown = json.loads(cloudtrain("doctor", url, "--gb", "2", "--json", code=code).stdout)
        assert shown["ok"] is (code == 0)
        return {line["check"]: line for line in shown["checks"]}

    return examine


@pytest.fixture
def proxy(moto: Server) -> Iterator[Proxy]:
    with Proxy(moto.endpoint) as proxy:
        yield proxy


@pytest.mark.parametrize("location", EVERY_SERVER, indirect=True)
def test_of_a_storage_without_faults_all_is_ok(location: Location, examine: Any) -> None:
    found = examine(location.url, location.options)
    bucket = ["bucket"] if location.server else []
    assert list(found) == [
        *ALWAYS,
        *bucket,
        *ACCESS,
        "2.0 GB checkpoint",
        *(["requests"] if bucket else []),
    ]
    not_ok = {check: line["state"] for check, line in found.items() if line["state"] != "ok"}
    assert not_ok == ({} if location.exclusive else {"conditional create": "warning"})
    assert found["credentials"]["found"] == ("storage options" if location.server else "none needed")
    assert found["upload"]["bytes_per_second"] > 0
    assert found["2.0 GB checkpoint"]["upload_seconds"] == pytest.approx(
        2e9 / found["upload"]["bytes_per_second"]
    )
    assert location.open().list("") == [], "the probe is deleted"


def only_problem(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    (line,) = (line for line in found.values() if line["state"] == "failed")
    return line


@pytest.mark.parametrize(
    ("server", "url", "mend"),
    [
        ("moto", "s3://no-such-bucket/run", "aws s3 mb s3://no-such-bucket"),
        ("azurite", "az://no-such-one/run", "az storage container create --name no-such-one"),
    ],
)
def test_of_a_missing_bucket_the_command_that_creates_it(
    request: pytest.FixtureRequest, examine: Any, server: str, url: str, mend: str
) -> None:
    found = examine(url, request.getfixturevalue(server).storage_options, code=1)
    problem = only_problem(found)
    assert (problem["check"], mend in problem["mend"]) == ("bucket", True)
    assert {found[check]["state"] for check in ("write", "read", "list", "upload")} == {"not checked"}


def test_of_a_wrong_key_the_credentials(rclone: Server, examine: Any) -> None:
    options = {**rclone.storage_options, "secret": "wrong-secret-value"}
    problem = only_problem(examine(f"s3://{rclone.bucket}/run", options, code=1))
    assert (problem["check"], "aws configure" in problem["mend"]) == ("credentials", True), problem
    assert "wrong-secret-value" not in str(problem)


@pytest.mark.slow
def test_of_a_wrong_azure_key_the_credentials(azurite: Server, examine: Any) -> None:
    wrong = azurite.storage_options["connection_string"].replace("AccountKey=E", "AccountKey=F")
    problem = only_problem(examine(f"az://{azurite.bucket}/run", {"connection_string": wrong}, code=1))
    assert (problem["check"], "AZURE_STORAGE_CONNECTION_STRING" in problem["mend"]) == (
        "credentials",
        True,
    ), problem


def test_without_credentials_where_to_put_them(moto: Server, examine: Any) -> None:
    problem = only_problem(examine(f"s3://{moto.bucket}/run", {"endpoint_url": moto.endpoint}, code=1))
    assert (problem["check"], problem["mend"]) == ("credentials", "aws configure")
    assert "cloudtrain doctor" not in problem["error"]


def test_credentials_are_named_by_the_place_where_they_were_found(
    moto: Server, examine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, options = f"s3://{moto.bucket}/run", {"endpoint_url": moto.endpoint}
    (tmp_path / "keys").write_text("[training]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_PROFILE", "training")
    assert examine(url, options)["credentials"]["found"] == "~/.aws/credentials, profile 'training'"
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret")
    assert examine(url, options)["credentials"]["found"] == "environment variables (AWS_ACCESS_KEY_ID)"


@pytest.mark.parametrize(
    ("method", "part", "check", "permission"),
    [
        ("PUT", "", "write", "s3:PutObject on arn:aws:s3:::{bucket}/*"),
        ("GET", "probe-", "read", "s3:GetObject on arn:aws:s3:::{bucket}/*"),
        ("GET", "list-type", "list", "s3:ListBucket on arn:aws:s3:::{bucket}"),
        ("DELETE", "", "delete", "s3:DeleteObject on arn:aws:s3:::{bucket}/*"),
    ],
)
def test_of_a_missing_permission_its_name(
    moto: Server, proxy: Proxy, examine: Any, method: str, part: str, check: str, permission: str
) -> None:
    denied = s3_error(403, "AccessDenied")
    proxy.rules.append(lambda call, forward: denied if call.method == method and part in call.path else None)
    found = examine(f"s3://{moto.bucket}/run", options_for(proxy), code=1)
    failed = {name: line["mend"] for name, line in found.items() if line["state"] == "failed"}
    assert failed[check] == f"grant {permission.format(bucket=moto.bucket)}"
    assert set(failed) <= {check, "conditional create", "download"}


@pytest.mark.slow
def test_of_a_bucket_in_another_region_the_variable(moto: Server, proxy: Proxy, examine: Any) -> None:
    elsewhere = s3_error(400, "AuthorizationHeaderMalformed", **{"x-amz-bucket-region": "eu-central-1"})
    proxy.rules.append(lambda call, forward: elsewhere)
    problem = only_problem(examine(f"s3://{moto.bucket}/run", options_for(proxy), code=1))
    assert (problem["check"], "AWS_REGION" in problem["mend"]) == ("server", True)


def test_of_a_server_that_does_not_answer_the_endpoint(examine: Any) -> None:
    options = {"key": "a", "secret": "b", "endpoint_url": f"http://127.0.0.1:{free_port()}"}
    found = examine("s3://bucket/run", options, code=1)
    assert (only_problem(found)["check"], found["clock"]["state"]) == ("server", "not checked")
    assert "AWS_ENDPOINT_URL" in only_problem(found)["mend"]


def test_of_a_protocol_of_fsspec_alone_that_its_server_is_not_known(examine: Any) -> None:
    found = examine("sftp://host/run", {"no such option": 1}, code=1)
    assert found["server"]["found"] == "that in the URL"
    assert found["clock"]["state"] == "not checked"


def test_of_objects_that_no_listing_shows_the_listing(moto: Server, proxy: Proxy, examine: Any) -> None:
    empty = Answer(200, b"<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>")
    hidden: Rule = lambda call, forward: empty if "list-type" in call.path else None  # noqa: E731
    proxy.rules.append(hidden)
    problem = only_problem(examine(f"s3://{moto.bucket}/run", options_for(proxy), code=1))
    assert problem["check"] == "list"


def test_of_a_clock_that_is_off_the_command_that_sets_it(
    moto: Server, examine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = diagnosis._now
    monkeypatch.setattr(diagnosis, "_now", lambda: now() + 3600)
    problem = only_problem(examine(f"s3://{moto.bucket}/run", moto.storage_options, code=1))
    assert (problem["check"], problem["mend"]) == ("clock", "sudo timedatectl set-ntp true")
    assert 3590 < problem["offset"] < 3610


def test_of_a_full_disk_what_is_missing(
    tmp_path: Path, examine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    problem = only_problem(examine(str(tmp_path / "run"), {}, code=1))
    assert (problem["check"], "2.0 GB" in problem["error"]) == ("free disk", True)


@pytest.mark.parametrize("location", ["moto"], indirect=True)
def test_an_interrupted_transfer_leaves_neither_a_probe_nor_parts_of_one(
    location: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: checkup.Doctor) -> str:
        begin(location, self._path, parts=1)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkup.Doctor, "_upload", interrupted)
    monkeypatch.setenv(env.STORAGE_OPTIONS, json.dumps(location.options))
    cloudtrain("doctor", location.url, code=130)
    assert location.open().list("") == []
    assert location.open().incomplete() == []


def test_the_table_fits_a_terminal_and_what_mends_follows_it(
    moto: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.STORAGE_OPTIONS, json.dumps(moto.storage_options))
    shown = cloudtrain("doctor", "s3://no-such-bucket/run", code=1)
    *table, mend = shown.stdout.splitlines()
    assert all(len(line) <= 80 for line in table)
    assert mend == "bucket: aws s3 mb s3://no-such-bucket, or correct the URL"
    first, error = shown.stderr.splitlines()
    assert first.startswith("Checking 's3://no-such-bucket/run'")
    assert error.startswith("bucket: Could not write")


def test_the_cost_of_a_day_is_that_of_the_cost_page() -> None:
    size_of_80_parts = 80 * 16 * 2**20
    assert checkup.dollars_a_day(size_of_80_parts, heartbeat=15) == pytest.approx(0.19, abs=0.01)


def options_for(proxy: Proxy) -> dict[str, Any]:
    return {"key": "testing", "secret": "testing-secret", "endpoint_url": proxy.endpoint}


def test_every_key_of_the_json_is_in_the_documentation(tmp_path: Path, examine: Any) -> None:
    section = (ROOT / "docs" / "cli.md").read_text().split("## cloudtrain doctor\n")[1].split("\n## ")[0]
    for line in examine(str(tmp_path / "run"), {}).values():
        assert {key for key in line if f"`{key}`" not in section} == set()
