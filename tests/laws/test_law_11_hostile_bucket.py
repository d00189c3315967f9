"""Law 11: an attacker writes to the bucket. Commands end with output or a clear error; no code runs and no file leaks.

The records of a run are changed at random, with names, numbers and texts that often break programs. Set
`LAW_11_EXAMPLES=2000` to try more of them.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from hf_cloudtrain.checkpoints import upload_queue
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.download import download, move_aside, verify
from hf_cloudtrain.checkpoints.exactness import Exactness
from hf_cloudtrain.checkpoints.host_parts import HostParts
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, FileEntry, Manifest, Position
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.cli import app
from hf_cloudtrain.errors import CloudTrainError, CorruptCheckpointError, ManifestError, StorageError
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.digest import file_digest
from hf_cloudtrain.storage.names import META
from hf_cloudtrain.tracking.history import read_history
from hf_cloudtrain.tracking.records import StepRecords

T = TypeVar("T")
EXAMPLES = int(os.environ.get("LAW_11_EXAMPLES", "25"))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    database=None,
)

ESC = "\x1b"
TEXTS = [
    f"{ESC}[31mred{ESC}[0m",
    f"{ESC}]0;title\x07",
    f"{ESC}]52;c;cm0gLXJm\x07",
    "\x9b31m",
    "gnp.\u202eexe",
    "\u2066hidden\u2069",
    "zero\u200bwidth",
    "two\nlines\r\x08\x08",
    "[red]markup[/red] :smile: [link=file:///etc/passwd]x[/link]",
    "{format} %s %n $(id) `id`",
    "\ud800",
    "\0",
    "x" * 10_000,
    "../../../etc/passwd",
    "/etc/passwd",
    "",
    "NaN",
    "\u0663\u0663",
]
NUMBERS = [
    -1,
    0,
    1.5,
    True,
    2**53,
    2**63,
    10**400,
    -(10**400),
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
    1e-320,
]
hostile_value = st.recursive(
    st.sampled_from([*TEXTS, *NUMBERS, None, [], {}]) | st.text(max_size=8) | st.integers() | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TEXTS[:12]), inner, max_size=3)
    ),
    max_leaves=4,
)
BYTES = [
    b"",
    b"null",
    b"[" * 200_000,
    b'{"a":' * 100_000,
    b"1" * 20_000,
    b'{"step": 1e999, "time": 1e999}',
    b'{"format": "hf_cloudtrain.manifest/1", "format": "hf_cloudtrain.manifest/2"}',
    b'{"state": "' + b"x" * 2_000_000 + b'"}',
    b"\xff\xfe\x00",
    b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
]
NAMES = [
    "checkpoints/{digits}.json",
    "checkpoints/0000009-0000000005.json",
    "checkpoints/999999999-000000000000005.json",
    f"checkpoints/{ESC}[31m.json",
    "attempts/{digits}.json",
    "attempts/999999998.json",
    "attempts/0000007.json",
    f"folders/{ESC}[31mfinal-000001.json",
    "folders/\u202efinal-000001.json",
    "folders/final-0000003.json",
    "steps/000001-99999999999999999999.jsonl",
    "progress/x.json",
    "parts/x",
]
ARABIC = {ord("0") + digit: 0x660 + digit for digit in range(10)}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, the best among them, a named folder, heartbeats and steps."""
    folder = tmp_path_factory.mktemp("intact")
    checkpointer = Checkpointer(f"file://{folder}/run", folder / "out")
    checkpointer.begin(0)
    attempt = checkpointer.attempt
    assert attempt is not None
    for step in (5, 10):
        source = folder / "out" / f"checkpoint-{step}"
        (source / "state").mkdir(parents=True)
        (source / "model.safetensors").write_bytes(b"weights" * step)
        (source / "state/optimizer.pt").write_bytes(b"optimizer" * step)
        position = Position(global_step=step, epoch=0.5, samples_seen=8 * step, world_size=1)
        checkpointer.save(
            source, position, metrics={"loss": 0.5}, best=step == 5, exactness=Exactness.no("a test")
        )
        checkpointer.wait()
    checkpointer.save_folder(source, "final")
    beat = {
        "attempt": 1,
        "state": "training",
        "time": 1e9,
        "step": 10,
        "total_steps": 20,
        "loss": 0.5,
        "step_seconds": 0.1,
    }
    checkpointer.catalog.attempts.write_progress(1, beat)
    lines = [
        {"kind": "steps", "first": 1, "seconds": [0.1] * 10, "samples": 8, "time": 1e9},
        {"kind": "log", "step": 10, "time": 1e9, "loss": 0.5},
    ]
    StepRecords(checkpointer.catalog.storage).write(
        1, 1, "".join(json.dumps(line) + "\n" for line in lines).encode()
    )
    checkpointer.close()
    return folder / "run"


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where hostile runs are restored: the only folder of this machine that may change."""
    folder = tmp_path / "deep" / "down" / "sandbox"
    (folder / "tmp").mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(folder / "tmp"))
    monkeypatch.setattr("hf_cloudtrain.storage.retries.PAUSES", ())
    monkeypatch.setattr(upload_queue, "PAUSES", (0.01,))
    return folder


CHANGES = {f"os.{name}" for name in "link symlink rename remove mkdir rmdir utime truncate chmod".split()}


class Guard:
    """Records every file change outside a folder, every unpickling, and every started program."""

    active: Guard | None = None
    hooked = False

    def __init__(self, folder: Path) -> None:
        self.events: list[str] = []
        self._folder = str(folder)
        # A heartbeat of a different test may still write to that test's own folder in this process.
        self._test = folder.parents[2]

    def record(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in (
            "pickle.find_class",
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "subprocess.Popen",
            "os.fork",
        ):
            self.events.append(f"{event} {arguments!r}")
        elif event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            names = arguments[:1] if event == "open" else arguments[:2]
            paths = [os.fsdecode(name) for name in names if isinstance(name, (str, bytes, os.PathLike))]
            self.events += [
                f"{event} {path}"
                for path in paths
                if path != os.devnull and os.path.isabs(path) and not self._is_below(path)
            ]

    def _is_below(self, path: str) -> bool:
        real = f"{os.path.realpath(path)}/"
        ours = real.startswith(f"{self._folder}/")
        theirs = real.startswith(f"{self._test.parent}/") and not real.startswith(f"{self._test}/")
        return ours or theirs


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Fail if anything outside `folder` changes, or any program or pickle runs, during the block."""
    if not Guard.hooked:

        def listen(event: str, arguments: tuple[Any, ...]) -> None:
            if Guard.active is not None:
                Guard.active.record(event, arguments)

        sys.addaudithook(listen)  # one hook for all tests, because hooks cannot be removed
        Guard.hooked = True
    guard = Guard.active = Guard(folder)
    try:
        yield
    finally:
        Guard.active = None
    assert guard.events == []


@st.composite
def hostilities(draw: st.DrawFn, records: list[str]) -> list[Callable[[Path], None]]:
    """Changes of an attacker to a run: to a few of its records, and planted names beside them."""
    done = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["value", "value", "value", "bytes", "name", "gone"]))
        if kind == "name":
            done.append(plant(draw(st.sampled_from(NAMES)), draw(st.sampled_from(BYTES))))
        else:
            record = draw(st.sampled_from(records))
            if kind == "gone":
                done.append(removed(record))
            elif kind == "bytes":
                done.append(replaced(record, draw(st.sampled_from(BYTES))))
            else:
                path = draw(st.lists(st.integers(0, 20), min_size=1, max_size=3))
                done.append(changed(record, path, draw(hostile_value)))
    return done


def plant(name: str, data: bytes) -> Callable[[Path], None]:
    def do(run: Path) -> None:
        digits = str(CheckpointKey(7, 5)) if name.startswith("checkpoints") else f"{7:06d}"
        path = run / META / name.format(digits=digits.translate(ARABIC))
        path.parent.mkdir(parents=True, exist_ok=True)
        manifest = run / META / "checkpoints/000001-0000000005.json"
        path.write_bytes(manifest.read_bytes() if "checkpoints" in name and manifest.exists() else data)

    return do


def removed(record: str) -> Callable[[Path], None]:
    return lambda run: (run / record).unlink(missing_ok=True)


def replaced(record: str, data: bytes) -> Callable[[Path], None]:
    def do(run: Path) -> None:
        (run / record).write_bytes(data)

    return do


def changed(record: str, path: list[int], value: Any) -> Callable[[Path], None]:
    """Replace one value of a record; `path` gives its index at each level."""

    def do(run: Path) -> None:
        lines = []
        for text in (
            (run / record).read_text(errors="replace").splitlines() if (run / record).exists() else []
        ):
            try:
                lines.append(json.dumps(with_value(json.loads(text), path, value)))
            except (ValueError, RecursionError):
                lines.append(text)
        (run / record).write_text("\n".join(lines) + "\n", errors="replace")

    return do


def with_value(record: Any, path: list[int], value: Any) -> Any:
    record = copy.copy(record)
    keys = (
        list(record)
        if isinstance(record, dict)
        else list(range(len(record)))
        if isinstance(record, list)
        else []
    )
    if not keys:
        return value
    key = keys[path[0] % len(keys)]
    record[key] = with_value(record[key], path[1:], value) if path[1:] else copy.deepcopy(value)
    return record


def records_of(run: Path) -> list[str]:
    return sorted(path.relative_to(run).as_posix() for path in (run / META).rglob("*") if path.is_file())


@contextmanager
def hostile_run(intact: Path, sandbox: Path, data: st.DataObject) -> Iterator[Path]:
    run = sandbox / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.rmtree(sandbox / "out", ignore_errors=True)
    shutil.copytree(intact, run)
    for do in data.draw(hostilities(records_of(intact))):
        do(run)
    with guarded(sandbox):
        yield run


COMMANDS = [
    ["checkpoint", "list"],
    ["checkpoint", "view"],
    ["checkpoint", "view", "-c", "final"],
    ["checkpoint", "verify", "--all"],
    ["checkpoint", "download", "{out}"],
    ["checkpoint", "delete", "-c", "5", "--yes"],
    ["run", "status"],
    ["run", "list"],
]


@pytest.mark.slow
@given(data=st.data())
@settings(fuzzed, max_examples=-(-EXAMPLES // 2))  # each example runs sixteen commands
def test_law_11_every_command_ends_without_a_traceback_and_prints_no_control_characters(
    intact: Path, sandbox: Path, data: st.DataObject
) -> None:
    with hostile_run(intact, sandbox, data) as run:
        for words in COMMANDS:
            url = str(run.parent) if words == ["run", "list"] else str(run)
            for extra in ([], ["--json"]):
                given = [*words[:2], url, *(word.format(out=sandbox / "out") for word in words[2:]), *extra]
                result = CliRunner().invoke(app, given)
                assert isinstance(result.exception, (SystemExit, type(None))), (given, result.exception)
                assert result.exit_code in (0, 1), (given, result.output)
                assert "Traceback" not in result.stderr
                assert len(result.stderr) < 20_000, given
                shown = result.stderr if extra else result.output
                assert [char for char in shown if not char.isprintable() and char != "\n"] == []
                if extra and result.stdout:
                    json.loads(result.stdout)
                    assert result.stdout.isascii()


@given(data=st.data())
@fuzzed
def test_law_11_a_restore_returns_committed_bytes_or_raises_a_package_error(
    intact: Path, sandbox: Path, data: st.DataObject
) -> None:
    with hostile_run(intact, sandbox, data) as run:
        digests = {
            path.stat().st_size: file_digest(path)
            for path in intact.rglob("checkpoint-*/**/*")
            if path.is_file()
        }
        checkpointer = Checkpointer(f"file://{run}", sandbox / "out")
        restored = short_error(checkpointer.restore)
        if restored is None:
            return
        assert restored.path == sandbox / "out" / f"checkpoint-{restored.manifest.step}"
        for path in restored.path.rglob("*"):
            assert not path.is_symlink()
            if path.is_file():
                assert file_digest(path) == digests[path.stat().st_size], path


@given(data=st.data())
@fuzzed
def test_law_11_the_next_attempt_of_a_hostile_run_commits_or_raises_a_package_error(
    intact: Path, sandbox: Path, data: st.DataObject
) -> None:
    """Its threads run, too: none of them may raise an unexpected error or hang."""
    crashed: list[Any] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(threading, "excepthook", crashed.append)
        patched.setattr(
            "hf_cloudtrain.runtime.provenance._git_commit", lambda: None
        )  # it starts git, which is allowed
        with hostile_run(intact, sandbox, data) as run:
            checkpointer = Checkpointer(f"file://{run}", sandbox / "out", fresh=True)

            def train() -> None:
                checkpointer.begin(0)
                source = sandbox / "out/checkpoint-15"
                source.mkdir(parents=True)
                (source / "model.safetensors").write_bytes(b"new")
                checkpointer.save(source, Position(global_step=15), best=True)
                checkpointer.wait(20.0)
                assert checkpointer.attempt is not None
                assert CheckpointKey(checkpointer.attempt.number, 15) in checkpointer.catalog.checkpoints()
                read_history(str(run))

            try:
                short_error(train)
            finally:
                checkpointer.close()
                if checkpointer.upload_queue is not None:
                    checkpointer.upload_queue._thread.join(20.0)
    assert crashed == []


def short_error(work: Callable[[], T]) -> T | None:
    """The result of `work`; None if it raises a package error of readable length."""
    error = ""
    try:
        return work()
    except CloudTrainError as raised:
        error = str(raised)
    assert 10 < len(error) < 5_000
    return None


# Names


@pytest.mark.parametrize(
    "name",
    [
        f"{7:06d}-{5:010d}".translate(ARABIC),
        "0000007-0000000005",
        "000007-00000000005",
        "000007-0000000005\n",
    ],
)
def test_law_11_a_name_that_only_resembles_a_checkpoint_key_is_ignored(
    intact: Path, sandbox: Path, name: str
) -> None:
    """Its digits would be parsed as a number that names a different object."""
    shutil.copytree(intact, sandbox / "run")
    catalog = Catalog(Storage(f"file://{sandbox}/run"))
    before = catalog.newest()
    (sandbox / "run" / META / "checkpoints" / f"{name}.json").write_bytes(b"{}")
    assert catalog.newest() == before
    assert catalog.read(catalog.newest()).step == 10


@pytest.mark.parametrize("name", [f"{7:06d}".translate(ARABIC), "0000007", "7", "000007\n"])
def test_law_11_a_name_that_only_resembles_an_attempt_number_is_ignored(
    intact: Path, sandbox: Path, name: str
) -> None:
    shutil.copytree(intact, sandbox / "run")
    (sandbox / "run" / META / "attempts" / f"{name}.json").write_bytes(b"{}")
    assert Catalog(Storage(f"file://{sandbox}/run")).attempts.numbers() == [1]


def test_law_11_an_attempt_number_at_the_limit_raises_an_error_that_names_the_record(
    intact: Path, sandbox: Path
) -> None:
    shutil.copytree(intact, sandbox / "run")
    (sandbox / "run" / META / "attempts/999999999.json").write_bytes(b"{}")
    with pytest.raises(
        ManifestError,
        match=r"999999999, which no training can have made. Delete '.cloudtrain/attempts/999999999",
    ):
        Checkpointer(f"file://{sandbox}/run", sandbox / "out", fresh=True).begin(0)


@pytest.mark.parametrize("name", [f"{ESC}[31mfinal", "\u202efinal", "a b", "checkpoint 5"])
def test_law_11_a_named_folder_with_an_impossible_name_is_ignored(
    intact: Path, sandbox: Path, name: str
) -> None:
    shutil.copytree(intact, sandbox / "run")
    (sandbox / "run" / META / f"folders/{name}-000001.json").write_bytes(b"{}")
    assert NamedFolders(Catalog(Storage(f"file://{sandbox}/run"))).keys() == ["final-000001"]


@pytest.mark.parametrize(
    "files", ["5", "{}", '"x"', "null", "[5]", '[{"path": "../x", "size": 1, "digest": "x"}]']
)
def test_law_11_a_damaged_part_of_a_different_host_raises_a_manifest_error(sandbox: Path, files: str) -> None:
    catalog = Catalog(Storage(f"file://{sandbox}/run"))
    key = CheckpointKey(1, 5)
    for host in range(2):
        record = b'{"nonce": "nonce", "files": %s}' % files.encode()
        catalog.storage.write(f"{META}/parts/{key}/{host}-of-2.json", record)
    with pytest.raises(ManifestError, match="part "):
        HostParts(catalog, key, "nonce", save=1, hosts=2).files()


# Sizes and disks


def a_manifest(*files: FileEntry) -> Manifest:
    return Manifest("000001-0000000005", "checkpoint-5", 1, 5, "n", files, Position(global_step=5))


def test_law_11_an_object_larger_than_its_manifest_says_does_not_fill_the_disk(sandbox: Path) -> None:
    storage = Storage(f"file://{sandbox}/run")
    storage.write("checkpoint-5/model.safetensors", b"x" * 100_000)
    (sandbox / "got").touch()
    storage.download("checkpoint-5/model.safetensors", str(sandbox / "got"), 10)
    assert (sandbox / "got").stat().st_size == 11
    entry = FileEntry("model.safetensors", 10, "xxh3-128:" + "0" * 32)
    with pytest.raises(CorruptCheckpointError, match="differs from the digest"):
        download(Catalog(storage), a_manifest(entry), sandbox / "out/checkpoint-5")
    assert verify(Catalog(storage), a_manifest(entry)) == [
        "'model.safetensors' differs from the digest in its manifest"
    ]


def test_law_11_a_download_larger_than_the_disk_is_refused_before_its_first_byte(sandbox: Path) -> None:
    entry = FileEntry("model.safetensors", 2**53 - 1, "xxh3-128:" + "0" * 32)
    with pytest.raises(StorageError, match="Free some space"):
        download(Catalog(Storage(f"file://{sandbox}/run")), a_manifest(entry), sandbox / "out/checkpoint-5")
    assert list((sandbox / "out").rglob("*.safetensors")) == []


def test_law_11_two_names_of_one_file_on_this_disk_are_refused(sandbox: Path) -> None:
    """For example 'A' and 'a' on macOS: both would be verified, and one would be lost."""
    storage = Storage(f"file://{sandbox}/run")
    storage.write("checkpoint-5/a", b"first")
    digest = file_digest(sandbox / "run/checkpoint-5/a")
    twice = a_manifest(FileEntry("a", 5, digest), FileEntry("a", 5, digest))
    with pytest.raises(StorageError, match="has the same name as another of its files on this disk"):
        download(Catalog(storage), twice, sandbox / "out/checkpoint-5")


def test_law_11_the_records_folder_is_not_a_file_path_in_upper_or_lower_case() -> None:
    with pytest.raises(ManifestError, match="not a clean relative path"):
        FileEntry.parse({"path": ".CloudTrain/outbox/x", "size": 1, "digest": "xxh3-128:" + "0" * 32}, "x")


def test_law_11_links_at_checkpoint_paths_are_moved_aside_and_never_followed(
    intact: Path, sandbox: Path
) -> None:
    outside = sandbox / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    target = sandbox / "out/checkpoint-10"
    target.parent.mkdir()
    catalog = Catalog(Storage(f"file://{intact}"))
    manifest = catalog.read(CheckpointKey(1, 10))
    for destination in (outside, sandbox / "nowhere"):  # the second link is dangling
        target.symlink_to(destination)
        download(catalog, manifest, target)
        assert not target.is_symlink()
        move_aside(target)  # a real folder after a link, both to the same path
    assert [path.name for path in outside.iterdir()] == ["precious"]


# Messages


def test_law_11_a_reason_from_storage_is_logged_without_control_characters(
    intact: Path, sandbox: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(intact, sandbox / "run")
    record = sandbox / "run" / META / "checkpoints/000001-0000000010.json"
    record.write_text(
        json.dumps({**json.loads(record.read_text()), "inexact_reason": f"{ESC}]0;title\x07\u202e"})
    )
    assert Checkpointer(f"file://{sandbox}/run", sandbox / "out").restore() is not None
    assert r"will not equal an uninterrupted run: \x1b]0;title\x07\u202e" in caplog.text
