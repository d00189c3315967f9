"""What all commands share: errors, exit codes, hostile records, pipes, Ctrl-C, and the documented JSON."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain import cli, env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.runtime import patience
from hf_cloudtrain.storage.local_backend import LocalBackend
from tests.unit.cli.terminal import ENTRY_POINT, ESC, Run, answer, cloudtrain, process, sentence

DOCS = Path(__file__).resolve().parents[3] / "docs" / "cli.md"


class TestHostileRecords:
    """Texts from storage neither move the cursor nor act as markup, in tables and in JSON."""

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

    def test_everything_else_in_a_name_is_shown_unchanged(self, hostile: Run) -> None:
        text = cloudtrain("checkpoint", "view", hostile.url).stdout
        assert "[red]evil  0 B" in text
        assert ":smile:\\u202egnp.exe" in text
        assert "模型/" in text
        assert "\\x1b[31mkey\\n" in text
        assert "[bold]\\x9b31m" in text

    def test_json_holds_names_unchanged(self, hostile: Run) -> None:
        shown = answer("checkpoint", "view", hostile.url)
        assert ":smile:\u202egnp.exe" in [entry["path"] for entry in shown["files"]]
        assert shown["origin"][f"{ESC}key\n"] == "[bold]\x9b31m"

    def test_errors_are_escaped_too(self, tmp_path: Path) -> None:
        assert ESC not in sentence("checkpoint", "list", str(tmp_path / f"{ESC}run"))

    def test_a_name_that_the_terminal_cannot_encode_is_escaped(self, hostile: Run) -> None:
        shown = process("checkpoint", "view", hostile.url, PYTHONIOENCODING="latin-1")
        assert shown.returncode == 0, shown.stderr
        assert "`-- \\u6a21\\u578b/" in shown.stdout


def test_a_command_says_what_it_waits_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    said, is_told, list_ = list[str](), threading.Event(), LocalBackend.list

    def tell(text: object) -> None:
        said.append(str(text))
        is_told.set()

    def late(self: LocalBackend, prefix: str) -> Any:
        assert is_told.wait(60)
        return list_(self, prefix)

    monkeypatch.setattr(patience, "PATIENCE", 0.01)
    monkeypatch.setattr(LocalBackend, "list", late)
    monkeypatch.setattr(cli, "say", tell)
    assert "checkpoint-400" in cloudtrain("checkpoint", "list", run.url).stdout
    assert re.fullmatch(r"Waiting to list 'file://.*': no answer for 0 s\.", said[0])


class TestErrors:
    def test_of_storage_are_one_line_and_exit_code_1(self) -> None:
        assert "'nope://'" in sentence("checkpoint", "list", "nope://bucket/run")

    def test_of_the_disk_are_one_line_too(self, run: Run, tmp_path: Path) -> None:
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

    def test_a_reader_that_stops_early_causes_no_error(self, run: Run) -> None:
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
                if command == "download":  # once all of its threads have started
                    wait_for(lambda: len(list(tmp_path.glob("here/_cloudtrain/*/**/*.*"))) == 3)
                started.send_signal(signal.SIGINT)
                with contextlib.suppress(BrokenPipeError):
                    while sent < size:
                        sent += feed.write(bytes(2**16))
            assert started.wait(60) == 130
        finally:
            started.kill()
            _, stderr = started.communicate()
        assert sent < size
        assert stderr == "Interrupted.\n"
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


def test_serving_a_run_without_a_checkpoint_names_the_next_command(tmp_path: Path) -> None:
    run = Run(tmp_path / "begun", tmp_path / "work")
    run.begin()
    assert sentence("serve", run.url).endswith(
        f"has no checkpoint yet. See how far it is: `cloudtrain run status {run.url}`.\n"
    )
