"""Law 11, Distrust: data from storage is untrusted, and no file, log or error contains credentials."""

from __future__ import annotations

import copy
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.download import download
from hf_cloudtrain.checkpoints.manifest import FileEntry, Manifest, Position
from hf_cloudtrain.errors import CloudTrainError, ManifestError
from hf_cloudtrain.runtime.provenance import shown_command
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.testing import FaultyStorage
from tests.faults.runs import Machine, Machines, bytes_of, wait_until, write_files

KEY = "000001-0000000005"
DIGEST = "xxh3-128:" + "0" * 32
GOOD = json.loads(
    Manifest(
        key=KEY,
        folder="checkpoint-5",
        attempt=1,
        step=5,
        nonce="0" * 32,
        files=(FileEntry("model.safetensors", 3, DIGEST), FileEntry("state/rng.pth", 0, DIGEST)),
        position=Position(global_step=5, epoch=0.5, samples_seen=40),
        metrics={"loss": 0.5},
        origin={"host": "node-1"},
    ).encode()
)

UNSAFE_PATHS = [
    "../model.safetensors",
    "a/../../b",
    "/etc/passwd",
    "//host/share",
    "C:model",
    "C:/model",
    "a\\b",
    "..\\b",
    "a\0b",
    "a\nb",
    "a\x1b[31mb",
    "a\x85b",
    "a//b",
    "a/",
    "./a",
    "a/./b",
    ".",
    "..",
    "",
    "\ud800",
    ".cloudtrain/run.json",
    ".cloudtrain",
    "_cloudtrain/outbox/x",
    "x" * 1_025,
    "x" * 300,
    "é" * 200,
]


def parsed(change: Callable[[dict[str, Any]], object]) -> Manifest:
    record = copy.deepcopy(GOOD)
    change(record)
    return Manifest.parse(json.dumps(record).encode(), KEY)


def test_law_11_the_unchanged_manifest_is_valid() -> None:
    assert parsed(lambda record: None).files[0].path == "model.safetensors"


@pytest.mark.parametrize("path", UNSAFE_PATHS, ids=lambda path: ascii(path[:30]))
def test_law_11_a_path_that_could_leave_its_folder_is_refused(path: str) -> None:
    with pytest.raises(ManifestError, match="not a clean relative path"):
        parsed(lambda record: record["files"][0].update(path=path))
    with pytest.raises(ManifestError, match="not a clean relative path"):
        parsed(lambda record: record.update(folder=path))


@pytest.mark.parametrize(
    "name", ["modèle/权重 1.bin", "a b", "ab:c/d", "-", "~/x", "%2e%2e/x", "x" * 255, "..."]
)
def test_law_11_an_unusual_name_that_stays_below_its_folder_is_accepted(name: str) -> None:
    assert parsed(lambda record: record["files"][0].update(path=name)).files[0].path == name


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a duplicate file": (lambda r: r["files"].append(r["files"][0]), "twice"),
    "a file that is also a folder": (
        lambda r: r["files"].append({**r["files"][0], "path": "state"}),
        "as a file and as a folder",
    ),
    "a million files": (lambda r: r.update(files=[{}] * 10**6), "1000000 files"),
    "a negative size": (lambda r: r["files"][0].update(size=-1), "not a count"),
    "a huge size": (lambda r: r["files"][0].update(size=2**64), "not a count"),
    "a fractional size": (lambda r: r["files"][0].update(size=1.5), "not a count"),
    "a boolean size": (lambda r: r["files"][0].update(size=True), "not a count"),
    "a size as text": (lambda r: r["files"][0].update(size="3"), "not a count"),
    "an unknown digest": (
        lambda r: r["files"][0].update(digest="md5:" + "0" * 32),
        "only 'xxh3-128' is known",
    ),
    "a digest that is too short": (lambda r: r["files"][0].update(digest="xxh3-128:00"), "digest"),
    "a link": (lambda r: r["files"][0].update(link="/etc/passwd"), "unknown key 'link'"),
    "a file with a misspelt key": (lambda r: r["files"][0].update(digets="x"), "nearest known key: 'digest'"),
    "a misspelt key": (lambda r: r.update(positon={}), "nearest known key: 'position'"),
    "a position with a misspelt key": (
        lambda r: r["position"].update(global_steps=5),
        "nearest known key: 'global_step'",
    ),
    "no files": (lambda r: r.pop("files"), "'files' is missing"),
    "files that are not a list": (lambda r: r.update(files={}), "'files' is missing"),
    "a file that is not an object": (lambda r: r.update(files=["a"]), "a file is not an object"),
    "no position": (lambda r: r.pop("position"), "'position' is missing"),
    "a huge whole number": (lambda r: r.update(created=10**400), "'created'"),
    "a huge number of samples": (lambda r: r["position"].update(samples_seen=10**400), "'samples_seen'"),
    "a metric that is not a number": (lambda r: r.update(metrics={"loss": "low"}), "'loss'"),
    "an origin that is not an object": (lambda r: r.update(origin=[]), "'origin'"),
    "the key of a different checkpoint": (lambda r: r.update(key="000002-0000000005"), "moved or forged"),
    "a nonce that is a path": (lambda r: r.update(nonce="/../../x"), "'nonce'"),
}


@pytest.mark.parametrize("hostility", HOSTILE)
def test_law_11_a_hostile_manifest_is_refused_with_the_reason(hostility: str) -> None:
    change, message = HOSTILE[hostility]
    with pytest.raises(ManifestError, match=message):
        parsed(change)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"\x00" * 100,
        b"{" * 100_000,
        b"[" * 1_000_000,
        b'{"a":' * 50_000,
        b'{"format": NaN}',
        b"9" * 100_000,
        b'{"created": ' + b"9" * 100_000 + b"}",
    ],
    ids=lambda data: ascii(data[:12]),
)
def test_law_11_bytes_that_are_not_a_manifest_are_refused(data: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.parse(data, KEY)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
PATHS_IN_A_MANIFEST = [
    (),
    ("files",),
    ("files", 0),
    ("files", 1),
    ("position",),
    ("metrics",),
    ("origin",),
]


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_law_11_a_random_manifest_raises_a_manifest_error_or_names_only_paths_below_its_folder(
    data: st.DataObject,
) -> None:
    record = copy.deepcopy(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        target: Any = record
        for part in data.draw(st.sampled_from(PATHS_IN_A_MANIFEST)):
            try:
                target = target[part]
            except (KeyError, IndexError, TypeError):
                break
        if isinstance(target, dict):
            name = data.draw(st.sampled_from([*target, "x"]) if target else st.just("x"))
            target[name] = data.draw(JSON)
    try:
        manifest = Manifest.parse(json.dumps(record).encode(), KEY)
    except ManifestError:
        return
    for entry in manifest.files:
        assert stays_below(manifest.object_path(entry))
        assert 0 <= entry.size < 2**53
    assert Manifest.parse(manifest.encode(), KEY) == manifest


@given(path=st.text(alphabet=st.sampled_from("a./\\\0:C~\n é"), max_size=12))
@settings(max_examples=500, deadline=None)
def test_law_11_an_accepted_path_never_leaves_its_folder(path: str) -> None:
    try:
        parsed(lambda record: record["files"][0].update(path=path))
    except ManifestError:
        return
    assert stays_below(path)


def stays_below(path: str) -> bool:
    root = Path("/root/folder")
    full = (root / path).resolve()
    return root in full.parents and "\\" not in path and "\0" not in path


@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_law_11_a_flipped_bit_in_a_manifest_gives_a_manifest_error_or_safe_paths(
    position: int, bit: int
) -> None:
    data = bytearray(json.dumps(GOOD).encode())
    data[position % len(data)] ^= 1 << bit
    try:
        manifest = Manifest.parse(bytes(data), KEY)
    except ManifestError:
        return
    assert all(stays_below(manifest.object_path(entry)) for entry in manifest.files)


def test_law_11_a_record_above_its_size_limit_is_never_read_completely(machines: Machines) -> None:
    machines.storage.write(".cloudtrain/best.json", b"{}" + b" " * 2_000)
    with pytest.raises(CloudTrainError, match="larger than 1000 bytes"):
        machines.storage.read(".cloudtrain/best.json", max_bytes=1_000)


def test_law_11_names_on_storage_that_are_not_records_are_ignored(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machine.save(5)
    machine.wait()
    strange = ["x", "x.json", "1-1.json", "000001-0000000006.json.bak", "-.json", "a/000001-0000000007.json"]
    for name in strange:
        machines.storage.write(f".cloudtrain/checkpoints/{name}", b"{}")
        machines.storage.write(f".cloudtrain/attempts/{name}", b"{}")
    assert machines.committed() == [(1, 5)]
    assert machines.catalog.attempts.numbers() == [1]
    assert machines.restored("elsewhere") == bytes_of(5)


def test_law_11_a_download_never_follows_a_link_out_of_its_folder(machines: Machines, tmp_path: Path) -> None:
    """A different user of this machine created a link at the path of the checkpoint."""
    machine = machines.new()
    machine.start()
    machine.save(5)
    machine.wait()
    outside = tmp_path / "outside"
    write_files(outside, {"model.safetensors": b"precious"})
    target = tmp_path / "elsewhere/checkpoint-5"
    target.parent.mkdir()
    target.symlink_to(outside)
    manifest = machines.catalog.read(machines.catalog.newest())
    download(machines.catalog, manifest, target)
    assert (outside / "model.safetensors").read_bytes() == b"precious"
    assert not target.is_symlink()


@pytest.mark.parametrize(
    "record", ["claims/checkpoint-5.json", "last.json", "best.json", "attempts/000001.json", "run.json"]
)
@pytest.mark.parametrize("damage", [b"", b"[]", b'{"attempt": "x", "step": null}'])
def test_law_11_a_damaged_optional_record_does_not_stop_a_commit(
    machines: Machines, record: str, damage: bytes
) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.write(f".cloudtrain/{record}", damage)
    machine.save(5, best=True)
    machine.wait()
    assert machines.committed() == [(1, 5)]
    assert machines.restored("elsewhere") == bytes_of(5)


def test_law_11_an_attempt_number_that_is_too_large_is_ignored(machines: Machines) -> None:
    """The next attempt number would not fit in a key, so no checkpoint could be committed."""
    machines.storage.write(".cloudtrain/attempts/9999999999999.json", b"{}")
    machine = machines.new()
    machine.start()
    machine.save(5)
    machine.wait()
    assert machines.restored("elsewhere") == bytes_of(5)


SECRETS = ["AKIAVERYSECRET", "s3cr3t/K3y+with=", "t0k3n-of-the-session", "hunter2hunter2", "hf_SECRETTOKEN"]
OPTIONS = {
    "key": SECRETS[0],
    "token": SECRETS[2],
    "client_kwargs": {"aws_secret_access_key": SECRETS[1]},
    "connection_string": f"AccountName=a;AccountKey={SECRETS[3]}",
}
COMMANDS = [
    ["train.py", "--hub_token", SECRETS[4]],
    ["train.py", f"--hub-token={SECRETS[4]}"],
    ["train.py", f"hub_token={SECRETS[4]}"],
    ["train.py", "--run_url", f"s3://{SECRETS[0]}:{SECRETS[1]}@bucket/run"],
    ["train.py", "--storage_options", json.dumps(OPTIONS)],
    ["train.py", f"--storage_options={json.dumps(OPTIONS)}"],
    ["train.py", "--storage_options", json.dumps({"key": SECRETS[0], "secret": SECRETS[1]})],
    ["train.py", "--connection_string", str(OPTIONS["connection_string"])],
    ["train.py", "--run_url", f"https://host/container?sv=1&sig={SECRETS[3]}"],
    ["train.py", "--aws_secret_access_key", SECRETS[1], "--lr", "1e-4"],
    ["train.py", "-p", "8", "--wandb_api_key", SECRETS[4]],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda arguments: arguments[1][:30])
def test_law_11_the_command_line_is_stored_without_its_secrets(command: list[str]) -> None:
    shown = shown_command(command)
    assert [secret for secret in SECRETS if secret in shown] == []
    assert shown.startswith("train.py"), "the rest must be kept"


def test_law_11_no_file_log_or_error_contains_credentials(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(sys, "argv", ["train.py", "--storage_options", json.dumps(OPTIONS), *COMMANDS[0][1:]])
    monkeypatch.setenv("HF_CLOUDTRAIN_STORAGE_OPTIONS", json.dumps(OPTIONS))
    url = "memory://law-11-secrets"
    cloud = FaultyStorage(url)
    with cloud.everywhere():
        machine = Machine(tmp_path / "out", url)
        machine.start()
        refused = OSError(f"denied for {SECRETS[0]} with {SECRETS[1]} and {SECRETS[3]}, {SECRETS[2]}")
        cloud.fail("upload", refused, path="checkpoint-5/*", times=3)
        machine.save(5)
        wait_until(
            lambda: machine.checkpointer.upload_queue.last_error or cloud.count("upload") > 4, "a failure"
        )
        machine.wait()
        cloud.fail("list", refused, times=1_000)
        with pytest.raises(CloudTrainError) as raised:
            machine.checkpointer.restorer.newest()
        errors = [str(raised.value), repr(raised.value), *map(str, chain_of(raised.value))]
        machine.stop()

    outputs = {
        "the run": b"".join(bytes(item.getvalue()) for item in fsspec.filesystem("memory").store.values()),
        "the disk": b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()),
        "the log": caplog.text.encode(),
        "the errors": "".join(errors).encode(),
        "the terminal": "".join(capfd.readouterr()).encode(),
    }
    fsspec.filesystem("memory").store.clear()
    assert b"global_step" in outputs["the disk"]
    assert b"train.py" in outputs["the run"]
    found = [
        (output, secret) for output, data in outputs.items() for secret in SECRETS if secret.encode() in data
    ]
    assert found == []


def chain_of(error: BaseException | None) -> list[BaseException]:
    """The error and the errors that its traceback would show."""
    found = []
    while error is not None:
        found.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found


@pytest.mark.parametrize("secret", [SECRETS[1], SECRETS[3]])
def test_law_11_a_run_url_with_credentials_is_refused_without_showing_them(secret: str) -> None:
    with pytest.raises(CloudTrainError) as raised:
        Checkpointer(f"s3://{SECRETS[0]}:{secret}@bucket/run", "out")
    assert [found for found in SECRETS if found in str(raised.value)] == []


def test_law_11_a_run_url_that_may_carry_credentials_never_shows_them() -> None:
    storage = Storage(f"ftp://user:{SECRETS[3]}@host/run")
    assert storage.url == "ftp://***@host/run"
    assert SECRETS[3] not in repr(Catalog(storage).storage.url)
