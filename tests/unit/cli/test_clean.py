"""`cloudtrain run clean`."""

from __future__ import annotations

import pytest

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints import leftovers
from hf_cloudtrain.checkpoints.attempts import Attempts
from hf_cloudtrain.checkpoints.deletion import retire
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from tests.unit.cli.terminal import ALL, Run, answer, cloudtrain, sentence


class TestClean:
    @pytest.fixture
    def left(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
        """An upload of attempt 1, one of attempt 2, a deletion and a start were interrupted."""
        monkeypatch.setattr(leftovers, "WATCH_SECONDS", 0.0)
        monkeypatch.setenv(env.HEARTBEAT, "0.0001")
        run.beat(2)
        for attempt, step in ((1, 310), (2, 500)):
            folder = run.catalog.claim(CheckpointKey(attempt, step), "nonce", exclusive=True)
            run.catalog.storage.write(f"{folder}/config.json", b"{}")
        retire(run.catalog, CheckpointKey(1, 100), proceed=lambda: False)
        run.catalog.storage.write(".cloudtrain/probe-0123456789abcdef", b"x")
        return run

    def test_deletes_what_has_no_owner_and_keeps_checkpoints(self, left: Run) -> None:
        result = cloudtrain("run", "clean", left.url, "--yes")
        assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == [
            ".cloudtrain/probe-0123456789abcdef",
            *("checkpoint-100", "checkpoint-310", "checkpoint-500"),
        ]
        assert "Watching the rest for" in result.stderr
        assert result.stderr.count("Deleted ") == 4
        assert left.committed() == ALL[1:]
        assert "Nothing is left over." in cloudtrain("run", "clean", left.url).stderr
        assert cloudtrain("checkpoint", "verify", left.url, "--all").exit_code == 0

    def test_a_dry_run_deletes_nothing_and_shows_what_would_be_deleted(self, left: Run) -> None:
        before = left.catalog.storage.list("")
        result = cloudtrain("run", "clean", left.url, "--dry-run")
        assert left.catalog.storage.list("") == before
        lines = {line.split()[0]: line for line in result.stdout.splitlines()[1:]}
        assert lines["checkpoint-100"].endswith("  delete")
        assert lines["checkpoint-310"].endswith("  delete")
        assert lines["checkpoint-500"].endswith("  delete if idle")
        record = answer("run", "clean", left.url, "--dry-run")
        assert record["dry_run"] is True
        assert {item["state"] for item in record["left_over"]} == {"found"}
        assert left.catalog.storage.list("") == before

    def test_an_upload_of_a_running_training_is_kept_with_the_reason(
        self, left: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        beats = iter(range(1_000))
        read = Attempts.read_progress
        monkeypatch.setattr(
            Attempts, "read_progress", lambda *a: {**(read(*a) or {}), "time": float(next(beats))}
        )
        record = answer("run", "clean", left.url, "--yes")
        states = {item["name"]: (item["state"], item["reason"]) for item in record["left_over"]}
        assert states["checkpoint-310"] == ("deleted", None)
        assert states["checkpoint-500"] == ("kept", "attempt 2 still sends heartbeats")
        assert (left.folder / "checkpoint-500").exists()

    def test_needs_yes_without_a_terminal(self, left: Run) -> None:
        before = left.catalog.storage.list("")
        assert "--yes" in cloudtrain("run", "clean", left.url, code=1).stderr
        assert left.catalog.storage.list("") == before

    def test_without_a_run_is_an_error(self, empty: Run) -> None:
        assert f"run at {empty.url!r}" in sentence("run", "clean", empty.url)
