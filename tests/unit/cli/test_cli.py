from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints import flush
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Position
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.checkpoints.outbox import Outbox, OutboxEntry
from hf_cloudtrain.cli import app, stop
from hf_cloudtrain.runtime import text as runtime_text
from hf_cloudtrain.runtime.progress import Progress
from hf_cloudtrain.storage import retries
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.local_backend import LocalBackend
from hf_cloudtrain.testing import FaultyStorage, flip_bit
from hf_cloudtrain.tracking.records import StepRecords

ENTRY_POINT = Path(sys.executable).with_name("cloudtrain")
DOCS = Path(__file__).resolve().parents[3] / "docs" / "cli.md"
ESC = "\x1b[31m"


class Run:
    """A run as a training makes it, without the training."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.folder = folder
        self.url = f"file://{folder}"
        self.work = work
        self.outbox = Outbox(work)
        self.catalog = Catalog(Storage(self.url))

    def begin(self, *, ago: float = 0.0, resumed_from: CheckpointKey | None = None, **facts: str) -> int:
        step = resumed_from.step if resumed_from else 0
        attempt = self.catalog.attempts.begin(
            time.time() - ago, step, resumed_from, {"host": "tern", **facts}
        )
        return attempt.number

    def accept(
        self, attempt: int, step: int, files: dict[str, bytes] | None = None, **how: Any
    ) -> OutboxEntry:
        source = self.work / "saved" / str(time.monotonic_ns())
        contents = {"config.json": b"{}", "model.safetensors": b"%d of %d" % (step, attempt), **(files or {})}
        for path, data in contents.items():
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            (source / path).write_bytes(data)
        facts = {"nonce": os.urandom(8).hex(), "position": Position(step, epoch=step / 100), "created": 1.8e9}
        entry = OutboxEntry(**{"run_url": self.url, "key": CheckpointKey(attempt, step), **facts, **how})
        return self.outbox.accept(source, entry)

    def save(self, attempt: int, step: int, files: dict[str, bytes] | None = None, **how: Any) -> None:
        self.accept(attempt, step, files, **how)
        flush.flush(self.catalog, self.outbox, Progress())

    def beat(self, attempt: int, *, ago: float = 0.0, state: str = "training", **progress: Any) -> None:
        self.catalog.attempts.write_progress(attempt, {"time": time.time() - ago, "state": state, **progress})

    def committed(self) -> list[str]:
        return [str(key) for key in self.catalog.checkpoints()]


@pytest.fixture
def empty(tmp_path: Path) -> Run:
    return Run(tmp_path / "runs" / "mrpc", tmp_path / "out")


@pytest.fixture
def run(empty: Run) -> Run:
    """Killed after step 320, resumed from 200: 300 is there twice, 200 is the best, and `final` was saved twice."""
    empty.begin(ago=7200)
    empty.save(1, 100)
    empty.save(1, 200, best=True, metrics={"eval_loss": 0.25})
    empty.save(1, 300, exact=False, inexact_reason="an evaluation was dropped")
    empty.beat(1, ago=5000, step=320, total_steps=1000)
    empty.begin(ago=3600, resumed_from=CheckpointKey(1, 200))
    empty.save(2, 300)
    empty.save(2, 400, {"deep/er/rng_state_0.pth": b"x" * 1500}, origin={"torch": "2.13.0"})
    empty.save(2, 400, name="final")
    empty.save(2, 400, name="final")
    return empty


def cloudtrain(*words: str, code: int = 0, typed: str | None = None) -> Any:
    result = CliRunner().invoke(app, list(words), input=typed)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def answer(*words: str, code: int = 0) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(cloudtrain(*words, "--json", code=code).stdout)
    return record


def sentence(*words: str, code: int = 1) -> str:
    """The one line of words of a command that fails, without data."""
    result = cloudtrain(*words, code=code)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    text: str = result.stderr
    return text


def process(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ENTRY_POINT), *words],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
        check=False,
    )


class TestWhichCheckpoint:
    @pytest.mark.parametrize(
        ("which", "key"),
        [
            (None, "000002-0000000400"),
            ("100", "000001-0000000100"),
            ("checkpoint-100", "000001-0000000100"),
            ("checkpoint-300", "000001-0000000300"),
            ("checkpoint-300.a2", "000002-0000000300"),
            ("checkpoint-300.a1", "000001-0000000300"),
            ("000001-0000000300", "000001-0000000300"),
            ("final", "final-000002"),
            ("final.2", "final-000002"),
            ("final-000001", "final-000001"),
        ],
    )
    def test_is_named_by_step_folder_key_or_name(self, run: Run, which: str | None, key: str) -> None:
        chosen = answer("checkpoint", "view", run.url, *(["--checkpoint", which] if which else []))
        assert chosen["key"] == key

    def test_a_step_that_two_attempts_saved_is_the_newest_one_and_says_so(self, run: Run) -> None:
        result = cloudtrain("checkpoint", "view", run.url, "-c", "300", "--json")
        assert json.loads(result.stdout)["key"] == "000002-0000000300"
        assert "attempts 1, 2" in result.stderr
        assert "checkpoint-300.a2" in result.stderr

    @pytest.mark.parametrize(
        "which", ["500", "checkpoint-500", "checkpoint-300.a3", "000009-0000000100", "../x"]
    )
    def test_one_that_does_not_exist_is_an_error_that_names_it(self, run: Run, which: str) -> None:
        text = sentence("checkpoint", "view", run.url, "--checkpoint", which)
        assert which.removeprefix("checkpoint-").partition(".")[0] in text
        assert f"cloudtrain checkpoint list {run.url}" in text


class TestList:
    def test_shows_all_in_order_and_what_they_are(self, run: Run) -> None:
        lines = cloudtrain("checkpoint", "list", run.url).stdout.splitlines()
        names = [line.split()[0] for line in lines[1:]]
        assert names == [
            *("checkpoint-100", "checkpoint-200", "checkpoint-300", "checkpoint-300.a2", "checkpoint-400"),
            *("final", "final.2"),
        ]
        notes = [line.partition("2027-")[2].partition("  ")[2] for line in lines[1:]]
        assert notes == ["", "best", "not exact", "", "newest", "", ""]

    def test_gives_the_same_as_json(self, run: Run) -> None:
        listing = answer("checkpoint", "list", run.url)
        assert listing["run_url"] == run.url
        assert [item["key"] for item in listing["checkpoints"]] == run.committed()
        assert [item["key"] for item in listing["folders"]] == ["final-000001", "final-000002"]
        second = listing["checkpoints"][1]
        size = len("{}") + len("200 of 1")
        assert second | {"created": None} == {
            "key": "000001-0000000200",
            "folder": "checkpoint-200",
            "attempt": 1,
            "step": 200,
            "file_count": 2,
            "size": size,
            "epoch": 2.0,
            "created": None,
            "exact": True,
            "inexact_reason": None,
            "metrics": {"eval_loss": 0.25},
            "newest": False,
            "best": True,
            "pinned": False,
            "protected": "it is the best one",
            "damaged": None,
        }

    def test_takes_the_run_url_from_the_environment(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(env.RUN_URL, run.url)
        assert answer("checkpoint", "list")["run_url"] == run.url

    def test_without_any_run_url_is_wrong_usage(self) -> None:
        assert "RUN_URL" in cloudtrain("checkpoint", "list", code=2).stderr

    def test_of_no_run_is_an_error(self, empty: Run) -> None:
        assert "There is no run at" in sentence("checkpoint", "list", empty.url)

    def test_of_a_checkpoint_folder_names_what_to_type(self, run: Run) -> None:
        assert f"{run.url} --checkpoint checkpoint-400" in sentence(
            "checkpoint", "list", f"{run.url}/checkpoint-400"
        )

    def test_of_a_run_that_saved_nothing_yet_is_empty(self, empty: Run) -> None:
        empty.begin()
        result = cloudtrain("checkpoint", "list", empty.url, "--json")
        assert json.loads(result.stdout)["checkpoints"] == []
        assert "no checkpoint yet" in result.stderr

    def test_shows_a_damaged_manifest_beside_the_others(self, run: Run) -> None:
        (run.folder / ".cloudtrain/checkpoints/000001-0000000200.json").write_text("{")
        result = cloudtrain("checkpoint", "list", run.url)
        assert "000001-0000000200" in result.stdout
        assert "damaged manifest" in result.stdout
        assert result.stderr.startswith("Warning: ")
        listed = answer("checkpoint", "list", run.url)["checkpoints"]
        assert [bool(item["damaged"]) for item in listed] == [False, True, False, False, False]


class TestView:
    def test_shows_overview_tree_position_and_metadata(self, run: Run) -> None:
        text = cloudtrain("checkpoint", "view", run.url).stdout
        for shown in ("000002-0000000400", "newest", "rng_state_0.pth  1.5 kB", "er/  1.5 kB", "2.13.0"):
            assert shown in text
        assert "global_step  400" in text

    def test_shows_why_a_resume_is_not_exact(self, run: Run) -> None:
        text = cloudtrain("checkpoint", "view", run.url, "-c", "checkpoint-300").stdout
        assert "no: an evaluation was dropped" in text

    def test_gives_the_whole_manifest_as_json(self, run: Run) -> None:
        shown = answer("checkpoint", "view", run.url)
        manifest = run.catalog.read(CheckpointKey(2, 400))
        assert [entry["path"] for entry in shown["files"]] == [entry.path for entry in manifest.files]
        assert [entry["digest"] for entry in shown["files"]] == [entry.digest for entry in manifest.files]
        assert shown["position"]["global_step"] == 400
        assert shown["origin"] == {"torch": "2.13.0"}


class TestDownload:
    def test_brings_the_newest_and_prints_where_it_is(self, run: Run, tmp_path: Path) -> None:
        target = tmp_path / "here"
        result = cloudtrain("checkpoint", "download", run.url, str(target))
        assert result.stdout == f"{target}/checkpoint-400\n"
        assert (target / "checkpoint-400/model.safetensors").read_bytes() == b"400 of 2"
        assert (target / "checkpoint-400/deep/er/rng_state_0.pth").stat().st_size == 1500
        assert [path.name for path in target.iterdir()] == ["checkpoint-400"]

    def test_brings_the_best(self, run: Run, tmp_path: Path) -> None:
        brought = answer("checkpoint", "download", run.url, str(tmp_path / "here"), "--best")
        assert brought["key"] == "000001-0000000200"
        assert (Path(brought["path"]) / "model.safetensors").read_bytes() == b"200 of 1"

    def test_says_that_there_is_no_best(self, empty: Run, tmp_path: Path) -> None:
        empty.begin()
        empty.save(1, 100)
        assert "metric_for_best_model" in sentence(
            "checkpoint", "download", empty.url, str(tmp_path), "--best"
        )

    def test_gives_a_suffixed_folder_the_plain_name(self, run: Run, tmp_path: Path) -> None:
        cloudtrain("checkpoint", "download", run.url, str(tmp_path / "here"), "-c", "checkpoint-300.a2")
        assert (tmp_path / "here/checkpoint-300/model.safetensors").read_bytes() == b"300 of 2"

    def test_brings_a_folder_that_was_saved_by_name(self, run: Run, tmp_path: Path) -> None:
        cloudtrain("checkpoint", "download", run.url, str(tmp_path / "here"), "-c", "final")
        assert (tmp_path / "here/final/model.safetensors").exists()

    def test_takes_the_run_url_from_the_environment(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(env.RUN_URL, run.url)
        cloudtrain("checkpoint", "download", str(tmp_path / "here"))
        assert (tmp_path / "here/checkpoint-400").is_dir()

    @pytest.mark.parametrize(
        "words",
        [[], ["s3://bucket/run"], ["out"], ["a", "b", "c"], ["a", "b", "--best", "--checkpoint", "5"]],
    )
    def test_with_too_little_or_too_much_is_wrong_usage(self, words: list[str]) -> None:
        assert cloudtrain("checkpoint", "download", *words, code=2).stdout == ""

    def test_does_not_bring_again_what_is_here(self, run: Run, tmp_path: Path) -> None:
        command = ("checkpoint", "download", run.url, str(tmp_path / "here"))
        assert answer(*command)["downloaded"] is True
        assert answer(*command)["downloaded"] is False

    def test_leaves_another_folder_of_that_name_alone(self, run: Run, tmp_path: Path) -> None:
        mine = tmp_path / "here/checkpoint-400/model.safetensors"
        mine.parent.mkdir(parents=True)
        mine.write_text("mine")
        assert "is there already" in sentence("checkpoint", "download", run.url, str(tmp_path / "here"))
        assert mine.read_text() == "mine"

    def test_of_damaged_files_leaves_nothing(self, run: Run, tmp_path: Path) -> None:
        damage(run.folder / "checkpoint-400/config.json")
        assert "'config.json'" in sentence("checkpoint", "download", run.url, str(tmp_path / "here"))
        assert list((tmp_path / "here").iterdir()) == []


def damage(file: Path) -> None:
    file.write_bytes(flip_bit(file.read_bytes()))


class TestVerify:
    def test_of_a_whole_checkpoint_succeeds(self, run: Run) -> None:
        (verdict,) = answer("checkpoint", "verify", run.url)["checkpoints"]
        assert (verdict["key"], verdict["whole"], verdict["problems"]) == ("000002-0000000400", True, [])

    @pytest.mark.parametrize(
        ("harm", "words"),
        [
            (damage, "differs"),
            (lambda file: os.truncate(file, 3), "bytes"),
            (os.unlink, "missing"),
        ],
        ids=["flipped", "truncated", "gone"],
    )
    def test_names_the_file_that_is_not_as_promised(self, run: Run, harm: Any, words: str) -> None:
        harm(run.folder / "checkpoint-400/model.safetensors")
        result = cloudtrain("checkpoint", "verify", run.url, code=1)
        assert result.stdout.splitlines()[1].endswith("damaged")
        assert "'model.safetensors'" in result.stderr
        assert words in result.stderr
        (verdict,) = answer("checkpoint", "verify", run.url, code=1)["checkpoints"]
        assert len(verdict["problems"]) == 1

    def test_of_all_tells_them_apart(self, run: Run) -> None:
        damage(run.folder / "checkpoint-300/config.json")
        (run.folder / ".cloudtrain/folders/final-000001.json").write_text("[]")
        verdicts = answer("checkpoint", "verify", run.url, "--all", code=1)["checkpoints"]
        assert len(verdicts) == 7
        assert [verdict["key"] for verdict in verdicts if not verdict["whole"]] == [
            "000001-0000000300",
            "final-000001",
        ]

    def test_of_a_run_that_saved_nothing_is_an_error(self, empty: Run) -> None:
        empty.begin()
        assert "no checkpoint yet" in sentence("checkpoint", "verify", empty.url, "--all")


class TestDelete:
    def test_removes_the_checkpoint_and_its_files(self, run: Run) -> None:
        deleted = answer("checkpoint", "delete", run.url, "--checkpoint", "100", "--yes")
        assert (deleted["key"], deleted["losses"]) == ("000001-0000000100", [])
        assert "000001-0000000100" not in run.committed()
        assert not (run.folder / "checkpoint-100").exists()

    @pytest.mark.parametrize(
        ("which", "loss"),
        [
            ("400", "resume at step 300 instead of 400"),
            ("200", "the best one"),
        ],
    )
    def test_refuses_what_the_run_would_miss_and_names_what_is_lost(
        self, run: Run, which: str, loss: str
    ) -> None:
        before = run.committed()
        text = sentence("checkpoint", "delete", run.url, "--checkpoint", which, "--yes")
        assert loss in text
        assert "--force" in text
        assert run.committed() == before
        assert run.catalog.read(CheckpointKey(2, 400))

    def test_refuses_the_one_that_the_newest_attempt_resumed_from(self, run: Run) -> None:
        run.begin(resumed_from=CheckpointKey(2, 300))
        assert "Attempt 3 resumed from it" in sentence(
            "checkpoint", "delete", run.url, "-c", "checkpoint-300.a2", "--yes"
        )

    def test_with_force_removes_even_the_only_one_and_warns(self, empty: Run) -> None:
        empty.begin()
        empty.save(1, 100)
        result = cloudtrain("checkpoint", "delete", empty.url, "-c", "100", "--force", "--yes")
        assert "anew, at step 0" in result.stderr
        assert empty.committed() == []

    def test_needs_yes_where_nobody_can_be_asked(self, run: Run) -> None:
        assert "--yes" in sentence("checkpoint", "delete", run.url, "-c", "100")
        assert "000001-0000000100" in run.committed()

    @pytest.mark.parametrize(("typed", "code"), [("y\n", 0), ("n\n", 1), ("\n", 1), ("", 130)])
    def test_asks_on_a_terminal(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, typed: str, code: int
    ) -> None:
        terminal = SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True))
        monkeypatch.setattr("hf_cloudtrain.cli.output.sys", terminal)
        result = cloudtrain("checkpoint", "delete", run.url, "-c", "100", typed=typed, code=code)
        assert "Delete checkpoint-100 (attempt 1" in result.stderr
        assert ("000001-0000000100" in run.committed()) == (code != 0)

    def test_of_a_folder_saved_by_name_is_refused(self, run: Run) -> None:
        assert "saved by name" in sentence("checkpoint", "delete", run.url, "-c", "final", "--yes")

    def test_without_a_name_is_wrong_usage(self, run: Run) -> None:
        assert "--checkpoint" in cloudtrain("checkpoint", "delete", run.url, "--yes", code=2).stderr


class TestFlush:
    def test_finishes_after_an_outage_what_it_could_not_during_it(
        self, empty: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(retries, "PAUSES", (0.0,))
        attempt = empty.begin()
        empty.accept(attempt, 100)
        empty.accept(attempt, 200)
        faulty = FaultyStorage(empty.url)
        with faulty.everywhere():
            faulty.fail("upload", times=10**6, path="checkpoint-*")
            during = cloudtrain("checkpoint", "flush", str(empty.work), "--json", code=1)
        assert {item["state"] for item in json.loads(during.stdout)["entries"]} == {"kept"}
        assert "checkpoint-200 (kept)" in during.stderr
        after = answer("checkpoint", "flush", str(empty.work))
        assert [(item["title"], item["state"]) for item in after["entries"]] == [
            ("checkpoint-200", "committed"),
            ("checkpoint-100", "committed"),
        ]
        assert empty.committed() == ["000001-0000000100", "000001-0000000200"]

    def test_goes_on_with_the_next_run_where_one_cannot_be_reached(
        self, empty: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(retries, "PAUSES", (0.0,))
        gone = FaultyStorage(f"file://{tmp_path}/runs/gone")
        gone.fail("any", times=10**6)
        empty.accept(empty.begin(), 100)
        empty.accept(5, 100, run_url=gone.url)
        with gone.everywhere():
            report = answer("checkpoint", "flush", str(empty.work), code=1)
        assert {item["run_url"]: item["state"] for item in report["entries"]} == {
            empty.url: "committed",
            gone.url: "kept",
        }
        assert empty.committed() == ["000001-0000000100"]

    def test_commits_folders_that_were_saved_by_name(self, empty: Run) -> None:
        empty.accept(empty.begin(), 100, name="final")
        assert "final" in cloudtrain("checkpoint", "flush", str(empty.work)).stdout
        assert NamedFolders(empty.catalog).keys() == ["final-000001"]

    def test_overwrites_nothing_on_a_storage_that_ignores_exclusive_create(
        self, empty: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(LocalBackend, "create", LocalBackend.write)
        for content in (b"first", b"second"):
            empty.accept(1, 100, {"model.safetensors": content}, name="final")
            cloudtrain("checkpoint", "flush", str(empty.work))
        assert (empty.folder / "final/model.safetensors").read_bytes() == b"first"
        assert (empty.folder / "final.2/model.safetensors").read_bytes() == b"second"

    def test_says_what_is_lost(self, empty: Run) -> None:
        entry = empty.accept(empty.begin(), 100)
        entry.local_path(entry.files[0]).write_text("written again")
        result = cloudtrain("checkpoint", "flush", str(empty.work), "--json", code=1)
        assert [item["state"] for item in json.loads(result.stdout)["entries"]] == ["lost"]
        assert f"{entry.files[0].path!r} of checkpoint-100" in result.stderr

    def test_is_no_success_while_an_entry_cannot_be_read(self, empty: Run) -> None:
        entry = empty.accept(empty.begin(), 100)
        (entry.home / "entry.json").write_text("{}")
        report = answer("checkpoint", "flush", str(empty.work), code=1)
        assert report["unreadable"] == [str(entry.home)]

    def test_waits_for_the_parts_of_other_hosts(self, empty: Run) -> None:
        empty.accept(empty.begin(), 100, host=0, hosts=2)
        result = cloudtrain("checkpoint", "flush", str(empty.work))
        assert "waiting" in result.stdout
        assert "other hosts" in result.stderr
        assert empty.committed() == []

    def test_keeps_everything_while_another_process_uploads(
        self, empty: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(flush, "LOCK_PATIENCE", 0.0)
        empty.accept(empty.begin(), 100)
        with open(empty.work / ".cloudtrain/outbox.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            result = cloudtrain("checkpoint", "flush", str(empty.work), code=1)
        assert "Another process is uploading" in result.stderr
        assert len(empty.outbox.entries()) == 1

    def test_of_an_empty_outbox_succeeds(self, tmp_path: Path) -> None:
        result = cloudtrain("checkpoint", "flush", str(tmp_path), "--json")
        assert json.loads(result.stdout) == {"directory": str(tmp_path), "entries": [], "unreadable": []}
        assert "Nothing waits" in result.stderr
        assert list(tmp_path.iterdir()) == []

    def test_of_no_folder_is_an_error(self, tmp_path: Path) -> None:
        assert "output_dir" in sentence("checkpoint", "flush", str(tmp_path / "nowhere"))


class TestRunStatus:
    def test_tells_a_killed_attempt_from_one_that_trains(self, run: Run) -> None:
        run.beat(2, step=420, total_steps=1000, step_seconds=2.0, eta_seconds=1160.0)
        status = answer("run", "status", run.url)
        assert (status["state"], status["step"], status["eta_seconds"]) == ("training", 420, 1160.0)
        assert [attempt["state"] for attempt in status["attempts"]] == ["killed", "training"]

    @pytest.mark.parametrize(
        ("recorded", "ago", "shown"),
        [
            ("training", 10, "training"),
            ("training", 4000, "killed"),
            ("finished", 4000, "finished"),
            ("failed", 4000, "failed"),
            ("stopped", 4000, "stopped"),
        ],
    )
    def test_state_is_what_was_recorded_unless_the_heart_stopped(
        self, empty: Run, recorded: str, ago: float, shown: str
    ) -> None:
        empty.begin(ago=5000)
        empty.beat(1, ago=ago, state=recorded, step=5, eta_seconds=60.0)
        status = answer("run", "status", empty.url)
        assert status["state"] == shown
        assert (status["eta_seconds"] is None) == (shown != "training")
        assert answer("run", "list", str(empty.folder.parent))["runs"][0]["state"] == shown

    def test_a_heart_that_beats_without_a_step_is_said_to_be_stalled(self, run: Run) -> None:
        run.beat(2, step=420, last_step_time=time.time() - 10)
        assert answer("run", "status", run.url)["stalled"] is None
        assert "stalled" not in cloudtrain("run", "status", run.url).stdout
        run.beat(2, step=420, last_step_time=time.time() - 4000)
        assert "no step for 4000 s" in cloudtrain("run", "status", run.url).stdout

    def test_without_any_heartbeat_an_attempt_has_started_or_was_killed(self, empty: Run) -> None:
        empty.begin(ago=4000)
        assert answer("run", "status", empty.url)["state"] == "killed"
        assert answer("run", "list", str(empty.folder.parent))["runs"][0]["state"] == "killed"
        empty.begin()
        assert answer("run", "status", empty.url)["state"] == "started"
        assert answer("run", "list", str(empty.folder.parent))["runs"][0]["state"] == "started"

    def test_overtaken_is_what_an_attempt_says_of_itself_and_no_clock(self, empty: Run) -> None:
        empty.begin(ago=500)
        empty.begin(ago=400)
        empty.beat(1, ago=-3600, step=5)  # its clock is an hour ahead, and it was killed
        assert answer("run", "status", empty.url)["attempts"][0]["state"] == "killed"
        empty.beat(1, ago=450, step=5, state="overtaken")
        assert answer("run", "status", empty.url)["attempts"][0]["state"] == "overtaken"

    def test_counts_what_was_done_again(self, run: Run) -> None:
        StepRecords(run.catalog.storage).write(
            1, 1, json.dumps({"kind": "steps", "first": 1, "seconds": [2.0] * 320}).encode()
        )
        status = answer("run", "status", run.url)
        assert (status["kept_steps"], status["superseded_steps"]) == (200, 120)
        assert status["superseded_seconds"] == 240.0
        assert status["goodput"] > 0
        assert "120 steps, 4 min" in cloudtrain("run", "status", run.url).stdout

    def test_names_the_last_committed_checkpoint_and_what_was_resumed(self, run: Run) -> None:
        status = answer("run", "status", run.url)
        assert (status["last_committed"], status["checkpoints"]) == ("000002-0000000400", 5)
        assert status["attempts"][1]["resumed_from"] == "000001-0000000200"

    def test_of_no_run_is_an_error(self, empty: Run) -> None:
        assert "There is no run at" in sentence("run", "status", empty.url)

    @pytest.mark.parametrize(
        "progress",
        [
            {"step": "many", "total_steps": [], "eta_seconds": None, "time": "now"},
            {"step": 1e300, "total_steps": -1, "eta_seconds": 1e300, "time": 1e300},
            {"step": True, "step_seconds": "1", "loss": {}, "state": None},
        ],
    )
    def test_nonsense_in_a_heartbeat_shows_as_nothing(self, empty: Run, progress: dict[str, Any]) -> None:
        empty.begin()
        empty.catalog.attempts.write_progress(1, progress)
        cloudtrain("run", "status", empty.url)
        assert answer("run", "status", empty.url)["eta_seconds"] is None
        cloudtrain("run", "list", str(empty.folder.parent))


class TestRunList:
    def test_finds_runs_at_any_depth(self, run: Run, tmp_path: Path) -> None:
        other = Run(tmp_path / "runs/deep/er/cola", tmp_path / "out-cola")
        other.begin()
        runs = {item["name"]: item for item in answer("run", "list", f"file://{tmp_path}/runs")["runs"]}
        assert sorted(runs) == ["deep/er/cola", "mrpc"]
        assert runs["mrpc"]["run_url"] == run.url
        assert (runs["mrpc"]["attempts"], runs["mrpc"]["checkpoints"]) == (2, 5)
        assert runs["mrpc"]["newest"] == "000002-0000000400"
        assert runs["deep/er/cola"]["newest"] is None

    def test_of_nothing_is_empty_and_says_so(self, tmp_path: Path) -> None:
        result = cloudtrain("run", "list", str(tmp_path), "--json")
        assert json.loads(result.stdout)["runs"] == []
        assert "no run below" in result.stderr

    def test_of_a_run_names_the_command_for_it(self, run: Run) -> None:
        assert f"cloudtrain run status {run.url}" in cloudtrain("run", "list", run.url).stderr

    def test_shows_a_damaged_run_beside_the_others(self, run: Run, tmp_path: Path) -> None:
        other = Run(tmp_path / "runs/cola", tmp_path / "out-cola")
        other.begin()
        other.beat(1)
        (other.folder / ".cloudtrain/progress/000001.json").write_text("{")
        result = cloudtrain("run", "list", str(tmp_path / "runs"))
        assert result.stderr.startswith("Warning: ")
        assert [line.split()[:2] for line in result.stdout.splitlines()[1:]] == [
            ["cola", "started"],
            ["mrpc", "killed"],
        ]


class Meanwhile:
    """What a run does while the command waits: one thing between two looks, which are 10 s apart."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *deeds: Callable[[], object]) -> None:
        self.left = list(deeds)
        self.seconds = 0.0
        clock = SimpleNamespace(time=time.time, sleep=self._sleep, monotonic=lambda: self.seconds)
        monkeypatch.setattr(stop, "time", clock)

    def _sleep(self, _: float) -> None:
        self.seconds += 10.0
        self.left.pop(0)()


class TestRunStop:
    def test_asks_the_newest_attempt_and_says_so(self, run: Run) -> None:
        run.beat(2, step=420)
        result = cloudtrain("run", "stop", run.url)
        assert result.stdout == ""
        assert result.stderr.startswith(f"Asked attempt 2 of {run.url!r} to stop.")
        assert result.stderr.count("\n") == 1
        assert run.catalog.attempts.stop_requested(2)
        assert not run.catalog.attempts.stop_requested(3)
        record = json.loads((run.folder / ".cloudtrain/stop.json").read_text())
        assert record["user"]
        assert record["host"]
        assert abs(record["time"] - time.time()) < 3600

    def test_a_person_without_a_name_may_ask_too(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def nameless() -> str:
            raise KeyError("getpwuid(): uid not found: 12345")  # as in a container; OSError since Python 3.13

        monkeypatch.setattr("getpass.getuser", nameless)
        cloudtrain("run", "stop", run.url)
        assert run.catalog.attempts.stop_requested(2)

    def test_gives_how_it_stands_as_json(self, run: Run) -> None:
        run.beat(2, step=420, last_committed="000002-0000000400")
        assert answer("run", "stop", run.url) | {"last_seen": None} == {
            "run_url": run.url,
            "attempt": 2,
            "state": "training",
            "step": 420,
            "last_committed": "000002-0000000400",
            "last_seen": None,
        }

    def test_asks_an_attempt_that_has_no_heartbeat_yet(self, empty: Run) -> None:
        empty.begin()
        assert answer("run", "stop", empty.url)["state"] == "started"
        assert empty.catalog.attempts.stop_requested(1)

    @pytest.mark.parametrize("state", ["finished", "failed", "stopped", f"{ESC}training"])
    def test_of_an_attempt_that_has_ended_is_refused(self, empty: Run, state: str) -> None:
        empty.begin()
        empty.beat(1, step=7, state=state)
        text = sentence("run", "stop", empty.url)
        assert "Nothing was asked" in text
        assert "at step 7" in text
        assert ESC not in text
        assert not empty.catalog.attempts.stop_requested(1)

    def test_of_no_run_is_an_error(self, empty: Run) -> None:
        assert "There is no run at" in sentence("run", "stop", empty.url)
        assert not empty.folder.exists()

    def test_of_one_that_looks_dead_is_asked_with_a_warning(self, empty: Run) -> None:
        """Its clock may be wrong, or ours, so a request to a living one must not depend on them."""
        empty.begin()
        empty.beat(1, ago=7 * 3600, step=7)
        asked = cloudtrain("run", "stop", empty.url)
        assert "Warning: by this machine's clock its last heartbeat is 7 h old" in asked.stderr
        assert empty.catalog.attempts.stop_requested(1)

    @pytest.mark.parametrize("ago", [0, 7 * 3600, -7 * 3600])
    def test_waits_until_it_has_stopped_whatever_the_clocks_say(
        self, empty: Run, monkeypatch: pytest.MonkeyPatch, ago: float
    ) -> None:
        empty.begin()
        empty.beat(1, ago=ago, step=100)
        beats = [lambda step=step: empty.beat(1, ago=ago, step=step) for step in range(101, 120)]
        meanwhile = Meanwhile(
            monkeypatch,
            lambda: empty.catalog.attempts.stop_requested(1) or pytest.fail("it waits and has not asked"),
            *beats,
            lambda: empty.beat(1, ago=ago, state="stopped", step=119, last_committed="000001-0000000119"),
        )
        result = cloudtrain("run", "stop", empty.url, "--wait", "--json")
        assert meanwhile.left == []
        assert "'stopped' at step 119, last committed: 000001-0000000119" in result.stderr
        assert json.loads(result.stdout)["state"] == "stopped"

    def test_one_that_fails_instead_is_an_error(self, empty: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        empty.begin()
        empty.beat(1, step=100)
        Meanwhile(monkeypatch, lambda: empty.beat(1, step=101, state="failed"))
        result = cloudtrain("run", "stop", empty.url, "--wait", code=1)
        assert "Error: It did not stop well: attempt 1 is 'failed'" in result.stderr

    def test_one_whose_heart_no_longer_beats_is_given_up(
        self, empty: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        empty.begin()
        empty.beat(1, step=100)
        meanwhile = Meanwhile(monkeypatch, *[lambda: None] * 8)
        result = cloudtrain("run", "stop", empty.url, "--wait", "--json", code=1)
        assert "No heartbeat for 1 min, so it seems dead" in result.stderr
        assert len(meanwhile.left) == 1
        assert json.loads(result.stdout)["state"] == "training"

    def test_another_attempt_that_begins_meanwhile_is_told(
        self, empty: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        empty.begin()
        empty.beat(1, step=100)
        Meanwhile(monkeypatch, empty.begin)
        result = cloudtrain("run", "stop", empty.url, "--wait", code=1)
        assert "Attempt 2 has begun meanwhile, and was not asked to stop" in result.stderr


class TestHostileRecords:
    """What comes from storage neither moves the cursor nor passes for markup, in words and in JSON."""

    @pytest.fixture
    def hostile(self, empty: Run) -> Run:
        empty.begin(host=f"{ESC}host", command="[red]x")
        files = {"[red]evil": b"", ":smile:\u202egnp.exe": b"", "模型/é.bin": b"1"}
        origin = {f"{ESC}key\n": "[bold]\x9b31m", "torch": "\x07"}
        metrics = {f"{ESC}loss": 1.0}
        empty.save(
            1, 10, files, origin=origin, metrics=metrics, exact=False, inexact_reason=f"{ESC}\r\n[red]"
        )
        empty.beat(1, state=f"{ESC}[blink]training", step=5)
        return empty

    def commands(self, run: Run, target: Path) -> Iterator[tuple[str, ...]]:
        yield ("checkpoint", "list", run.url)
        yield ("checkpoint", "view", run.url)
        yield ("checkpoint", "verify", run.url)
        yield ("checkpoint", "download", run.url, str(target))
        yield ("run", "status", run.url)
        yield ("run", "list", str(run.folder.parent))

    def test_no_control_character_reaches_the_terminal(self, hostile: Run, tmp_path: Path) -> None:
        for command in self.commands(hostile, tmp_path / "here"):
            for form in ((), ("--json",)):
                text = cloudtrain(*command, *form).output
                assert all(char.isprintable() or char == "\n" for char in text), command

    def test_names_are_shown_as_they_are_but_for_that(self, hostile: Run) -> None:
        text = cloudtrain("checkpoint", "view", hostile.url).stdout
        assert "[red]evil  0 B" in text
        assert ":smile:\\u202egnp.exe" in text
        assert "模型/" in text
        assert "\\x1b[31mkey\\n" in text
        assert "[bold]\\x9b31m" in text

    def test_json_gives_them_back_whole(self, hostile: Run) -> None:
        shown = answer("checkpoint", "view", hostile.url)
        assert ":smile:\u202egnp.exe" in [entry["path"] for entry in shown["files"]]
        assert shown["origin"][f"{ESC}key\n"] == "[bold]\x9b31m"

    def test_errors_are_clean_too(self, tmp_path: Path) -> None:
        assert ESC not in sentence("checkpoint", "list", str(tmp_path / f"{ESC}run"))

    def test_a_terminal_that_cannot_write_a_name_is_no_reason_to_fail(self, hostile: Run) -> None:
        shown = process("checkpoint", "view", hostile.url, PYTHONIOENCODING="latin-1")
        assert shown.returncode == 0, shown.stderr
        assert "`-- \\u6a21\\u578b/" in shown.stdout


class TestErrors:
    def test_of_storage_are_one_sentence_and_exit_code_1(self) -> None:
        assert "'nope://'" in sentence("checkpoint", "list", "nope://bucket/run")

    def test_of_the_disk_are_one_sentence_too(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        assert str(tmp_path / "file") in sentence("checkpoint", "download", run.url, str(tmp_path / "file"))

    def test_in_the_options_variable_do_not_show_its_value(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(env.STORAGE_OPTIONS, "secret-value")
        text = sentence("checkpoint", "list", run.url)
        assert env.STORAGE_OPTIONS in text
        assert "secret-value" not in text

    @pytest.mark.parametrize(
        "words", [["nonsense"], ["checkpoint", "nonsense"], ["checkpoint", "list", "--nonsense"]]
    )
    def test_of_usage_have_exit_code_2(self, words: list[str]) -> None:
        assert "nonsense" in cloudtrain(*words, code=2).stderr

    def test_a_bug_keeps_its_traceback(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Catalog, "checkpoints", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cloudtrain("checkpoint", "list", run.url)


class TestProcess:
    def test_the_installed_command_lists_a_run(self, run: Run) -> None:
        listing = process("checkpoint", "list", run.url, "--json")
        assert listing.returncode == 0, listing.stderr
        assert listing.stderr == ""
        assert [item["key"] for item in json.loads(listing.stdout)["checkpoints"]] == run.committed()

    def test_the_module_runs_like_the_command(self) -> None:
        version = subprocess.run(
            [sys.executable, "-m", "hf_cloudtrain.cli", "--version"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert version.stdout[:1].isdecimal()

    def test_nothing_heavy_is_imported(self, run: Run) -> None:
        run.accept(2, 500)
        code = HEAVY.format(url=run.url, work=str(run.work))
        loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "committed" in loaded.stdout
        assert json.loads(loaded.stderr.splitlines()[-1]) == []

    def test_a_pipe_gets_whole_lines_however_narrow_the_terminal(self, empty: Run) -> None:
        empty.begin()
        name = "n" * 200
        empty.save(1, 10, {f"{name}/{name}": b""}, name="final" * 10)
        listing = process("checkpoint", "list", empty.url, COLUMNS="20")
        assert len(listing.stdout.splitlines()) == 2
        shown = process("checkpoint", "view", empty.url, "-c", "final" * 10, COLUMNS="20")
        assert sum(name in line for line in shown.stdout.splitlines()) == 2
        assert not any(line != line.rstrip() for line in shown.stdout.splitlines())

    def test_a_reader_that_stops_early_is_no_error(self, run: Run) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "w") as closed:
            ended = subprocess.run(
                [str(ENTRY_POINT), "checkpoint", "list", run.url],
                stdout=closed,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert ended.stderr == ""


class TestInterrupt:
    def test_ctrl_c_has_exit_code_130(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(self: Catalog) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Catalog, "checkpoints", interrupted)
        assert "Interrupted" in cloudtrain("checkpoint", "list", run.url, code=130).stderr

    @pytest.mark.parametrize("command", ["download", "verify"])
    def test_ctrl_c_stops_the_threads_of_a_transfer(self, run: Run, tmp_path: Path, command: str) -> None:
        size = 2**28
        pipe = replace_by_pipe(run, size)
        words = [str(ENTRY_POINT), "checkpoint", command, run.url]
        words += [str(tmp_path / "here")] if command == "download" else []
        started = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        sent = 0
        try:
            with open(pipe, "wb", buffering=0) as feed:  # returns when the command reads
                if (
                    command == "download"
                ):  # with all its threads under way, for one that just starts is no fair time
                    wait_for(lambda: len(list(tmp_path.glob("here/.cloudtrain/*/**/*.*"))) == 3)
                started.send_signal(signal.SIGINT)
                with contextlib.suppress(BrokenPipeError):
                    while sent < size:
                        sent += feed.write(bytes(2**16))
            assert started.wait(60) == 130
        finally:
            started.kill()
            _, words_said = started.communicate()
        assert sent < size
        assert words_said == "Interrupted.\n"
        assert not list(tmp_path.glob("here/*"))


def replace_by_pipe(run: Run, size: int) -> Path:
    """The model of the newest checkpoint comes through a pipe, and has `size` bytes."""
    pipe = run.folder / "checkpoint-400/model.safetensors"
    pipe.unlink()
    os.mkfifo(pipe)
    record = run.folder / ".cloudtrain/checkpoints/000002-0000000400.json"
    manifest = json.loads(record.read_text())
    for entry in manifest["files"]:
        if entry["path"] == pipe.name:
            entry["size"] = size
    record.write_text(json.dumps(manifest))
    return pipe


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


HEAVY = """
import json, sys
from hf_cloudtrain.cli import app
commands = [
    *(["checkpoint", name, {url!r}] for name in ("list", "view", "verify")),
    ["checkpoint", "download", {url!r}, {work!r}],
    ["checkpoint", "delete", {url!r}, "-c", "100", "--yes"],
    ["checkpoint", "flush", {work!r}],
    ["run", "status", {url!r}],
    ["run", "list", {url!r}],
    ["run", "stop", {url!r}],
]
for command in commands:
    app(command, standalone_mode=False)
roots = {{name.partition(".")[0] for name in sys.modules}}
heavy = {{"torch", "transformers", "accelerate", "datasets", "numpy", "pandas", "s3fs", "fsspec", "botocore"}}
print(json.dumps(sorted(roots & heavy)), file=sys.stderr)
"""


class TestText:
    @pytest.mark.parametrize(
        ("count", "text"),
        [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_317_921_234, "1.3 GB"), (10**18, "1000.0 PB")],
    )
    def test_sizes_are_in_powers_of_ten(self, count: int, text: str) -> None:
        assert runtime_text.size_text(count) == text

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (None, None),
            (float("nan"), None),
            (-1.0, "0 ms"),
            (0.25, "250 ms"),
            (2.125, "2.12 s"),
            (61.0, "1 min 1 s"),
            (3600.0, "1 h"),
            (90061.0, "1 d 1 h"),
        ],
    )
    def test_spans_of_time_have_two_units(self, seconds: float | None, text: str | None) -> None:
        assert runtime_text.duration_text(seconds) == text

    @pytest.mark.parametrize("seconds", [1e300, -1e300, float("inf"), float("nan")])
    def test_a_time_beyond_the_calendar_is_shown_somehow(self, seconds: float) -> None:
        assert runtime_text.time_text(seconds)


def test_every_key_of_the_json_is_in_the_documentation(run: Run, tmp_path: Path) -> None:
    documented = DOCS.read_text()
    run.accept(2, 500)
    for words in (
        ("checkpoint", "list", run.url),
        ("checkpoint", "view", run.url),
        ("checkpoint", "download", run.url, str(tmp_path / "here")),
        ("checkpoint", "verify", run.url),
        ("checkpoint", "pin", run.url),
        ("checkpoint", "prune", run.url, "--keep-last", "9"),
        ("checkpoint", "delete", run.url, "-c", "100", "--yes"),
        ("checkpoint", "flush", str(run.work)),
        ("run", "list", str(run.folder.parent)),
        ("run", "status", run.url),
        ("run", "report", run.url, "-o", str(tmp_path / "report.html")),
        ("run", "clean", run.url, "--dry-run"),
        ("run", "stop", run.url),
    ):
        section = documented.split(f"## cloudtrain {words[0]} {words[1]}\n")[1].split("\n## ")[0]
        missing = {key for key in keys_of(answer(*words)) if f"`{key}`" not in section}
        assert not missing, words


def keys_of(value: Any) -> Iterator[str]:
    """All keys of a record but those that the run itself chose."""
    if isinstance(value, list):
        for item in value:
            yield from keys_of(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            if key not in ("metrics", "origin", "facts"):
                yield from keys_of(item)
