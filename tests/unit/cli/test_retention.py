"""`cloudtrain checkpoint pin` and `prune`, `run clean`, and what `list`, `view` and `delete` say of pins."""

from __future__ import annotations

import pytest

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints import leftovers
from hf_cloudtrain.checkpoints.attempts import Attempts
from hf_cloudtrain.checkpoints.deletion import retire
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.retention import pin, pins
from hf_cloudtrain.cli.commands import checkpoint
from hf_cloudtrain.errors import StorageError
from hf_cloudtrain.testing import FaultyStorage
from tests.unit.cli.test_cli import Run, answer, cloudtrain, empty, run, sentence

__all__ = ["empty", "run"]  # fixtures

ALL = [
    "000001-0000000100",
    "000001-0000000200",
    "000001-0000000300",
    "000002-0000000300",
    "000002-0000000400",
]


class TestPin:
    def test_a_pinned_checkpoint_is_shown_as_such_and_not_deleted(self, run: Run) -> None:
        pinned = answer("checkpoint", "pin", run.url, "-c", "100")
        assert (pinned["key"], pinned["pinned"]) == (ALL[0], True)
        assert "pinned" in cloudtrain("checkpoint", "list", run.url).stdout.splitlines()[1]
        shown = answer("checkpoint", "view", run.url, "-c", "100")
        assert (shown["pinned"], shown["protected"]) == (True, "it is pinned")
        assert "It is pinned. Pass --force" in sentence("checkpoint", "delete", run.url, "-c", "100", "--yes")
        assert run.committed() == ALL

    def test_a_pin_is_taken_away_again(self, run: Run) -> None:
        cloudtrain("checkpoint", "pin", run.url, "-c", "100")
        assert not answer("checkpoint", "pin", run.url, "-c", "100", "--unpin")["pinned"]
        assert not answer("checkpoint", "view", run.url, "-c", "100")["pinned"]
        cloudtrain("checkpoint", "delete", run.url, "-c", "100", "--yes")
        assert run.committed() == ALL[1:]

    def test_by_force_a_pinned_one_goes_with_its_pin(self, run: Run) -> None:
        cloudtrain("checkpoint", "pin", run.url, "-c", "100")
        cloudtrain("checkpoint", "delete", run.url, "-c", "100", "--yes", "--force")
        assert pins(run.catalog) == []

    def test_both_reasons_are_named_where_the_best_is_pinned(self, run: Run) -> None:
        cloudtrain("checkpoint", "pin", run.url, "-c", "200")
        assert "  best, pinned" in cloudtrain("checkpoint", "list", run.url).stdout
        losses = sentence("checkpoint", "delete", run.url, "-c", "200", "--yes")
        assert "It is the best one" in losses
        assert "It is pinned." in losses

    def test_a_folder_saved_by_name_cannot_be_pinned(self, run: Run) -> None:
        assert "only a checkpoint is pinned" in sentence("checkpoint", "pin", run.url, "-c", "final")


class TestPrune:
    def test_deletes_all_but_the_newest_and_what_is_protected(self, run: Run) -> None:
        pin(run.catalog, CheckpointKey(1, 300))
        pruned = answer("checkpoint", "prune", run.url, "--keep-last", "1", "--yes")
        assert pruned["deleted"] == [ALL[0], ALL[3]]
        assert pruned["protected"] == {ALL[1]: "it is the best one", ALL[2]: "it is pinned"}
        assert run.committed() == [ALL[1], ALL[2], ALL[4]]
        assert not (run.folder / "checkpoint-300.a2").exists()
        assert (run.folder / "final").exists()

    def test_keeps_every_nth_step(self, run: Run) -> None:
        cloudtrain("checkpoint", "prune", run.url, "--keep-last", "1", "--keep-every", "100", "--yes")
        assert run.committed() == [ALL[0], ALL[1], ALL[3], ALL[4]], "of step 300 the newer one"

    def test_a_dry_run_says_what_would_go_and_deletes_nothing(self, run: Run) -> None:
        result = cloudtrain("checkpoint", "prune", run.url, "--keep-last", "1", "--dry-run")
        lines = {line.split()[0]: line for line in result.stdout.splitlines()[1:]}
        assert {name for name, line in lines.items() if line.endswith(" goes")} == {
            *("checkpoint-100", "checkpoint-300", "checkpoint-300.a2")
        }
        assert lines[ALL[1]].endswith("stays: it is the best one")
        assert "Nothing was deleted; without --dry-run 3 would be" in result.stderr
        assert run.committed() == ALL
        record = answer("checkpoint", "prune", run.url, "--keep-last", "1", "--dry-run")
        assert (record["dry_run"], record["deleted"], len(record["going"])) == (True, [], 3)
        assert run.committed() == ALL

    def test_needs_yes_where_nobody_can_be_asked(self, run: Run) -> None:
        assert "--yes" in cloudtrain("checkpoint", "prune", run.url, "--keep-last", "1", code=1).stderr
        assert run.committed() == ALL

    def test_with_nothing_to_delete_says_so_and_does_not_ask(self, run: Run) -> None:
        assert "Nothing to delete." in cloudtrain("checkpoint", "prune", run.url, "--keep-last", "9").stderr

    def test_without_a_number_is_wrong_usage(self, run: Run) -> None:
        assert "--keep-last" in cloudtrain("checkpoint", "prune", run.url, "--yes", code=2).stderr
        cloudtrain("checkpoint", "prune", run.url, "--keep-last", "0", "--yes", code=2)

    def test_of_no_run_is_an_error(self, empty: Run) -> None:
        assert "There is no run at" in sentence("checkpoint", "prune", empty.url, "--keep-last", "1")

    def test_one_whose_manifest_is_damaged_stays_with_a_warning(self, run: Run) -> None:
        (run.folder / ".cloudtrain" / "checkpoints" / f"{ALL[0]}.json").write_bytes(b"{")
        result = cloudtrain("checkpoint", "prune", run.url, "--keep-last", "1", "--yes")
        assert f"Warning: The manifest {ALL[0]!r}" in result.stderr
        assert run.committed() == [ALL[0], ALL[1], ALL[4]]

    def test_one_that_a_training_resumes_from_meanwhile_stays(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def another_machine_begins(question: str, yes: bool) -> None:
            run.begin(resumed_from=CheckpointKey(1, 100))

        monkeypatch.setattr(checkpoint, "confirm", another_machine_begins)
        result = cloudtrain("checkpoint", "prune", run.url, "--keep-last", "1", code=1)
        assert "checkpoint-100 stays: attempt 3 resumed from it, since a moment ago." in result.stderr
        assert "Only 2 of 3 checkpoints were deleted." in result.stderr
        assert run.committed() == [ALL[0], ALL[1], ALL[4]]

    def test_finishes_what_was_cut_in_half_before(self, run: Run) -> None:
        storage = FaultyStorage(run.url)
        storage.fail("delete", StorageError("broken off"), path="checkpoint-100/*", times=100)
        with storage.everywhere():
            assert "broken off" in sentence("checkpoint", "delete", run.url, "-c", "100", "--yes")
        assert (run.folder / "checkpoint-100").exists()
        cloudtrain("checkpoint", "prune", run.url, "--keep-last", "9", "--yes")
        assert not (run.folder / "checkpoint-100").exists()


class TestClean:
    @pytest.fixture
    def left(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
        """An upload of attempt 1 was cut off, one of attempt 2, a deletion, and a start."""
        monkeypatch.setattr(leftovers, "WATCH_SECONDS", 0.0)
        monkeypatch.setenv(env.HEARTBEAT, "0.0001")
        run.beat(2)
        for attempt, step in ((1, 310), (2, 500)):
            folder = run.catalog.claim(CheckpointKey(attempt, step), "nonce", exclusive=True)
            run.catalog.storage.write(f"{folder}/config.json", b"{}")
        retire(run.catalog, CheckpointKey(1, 100), go_on=lambda: False)
        run.catalog.storage.write(".cloudtrain/probe-0123456789abcdef", b"x")
        return run

    def test_deletes_what_nobody_owns_and_no_checkpoint(self, left: Run) -> None:
        result = cloudtrain("run", "clean", left.url, "--yes")
        assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == [
            ".cloudtrain/probe-0123456789abcdef",
            *("checkpoint-100", "checkpoint-310", "checkpoint-500"),
        ]
        assert "Watching for" in result.stderr
        assert result.stderr.count("Deleted ") == 4
        assert left.committed() == ALL[1:]
        assert "Nothing is left over." in cloudtrain("run", "clean", left.url).stderr
        assert cloudtrain("checkpoint", "verify", left.url, "--all").exit_code == 0

    def test_a_dry_run_deletes_nothing_and_says_what_would_go(self, left: Run) -> None:
        before = left.catalog.storage.list("")
        result = cloudtrain("run", "clean", left.url, "--dry-run")
        assert left.catalog.storage.list("") == before
        lines = {line.split()[0]: line for line in result.stdout.splitlines()[1:]}
        assert lines["checkpoint-100"].endswith("  goes")
        assert lines["checkpoint-310"].endswith("  goes")
        assert lines["checkpoint-500"].endswith("  goes, unless it moves")
        record = answer("run", "clean", left.url, "--dry-run")
        assert record["dry_run"] is True
        assert {item["state"] for item in record["left_over"]} == {"found"}
        assert left.catalog.storage.list("") == before

    def test_an_upload_of_a_training_that_lives_stays_with_the_reason(
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
        assert states["checkpoint-500"] == ("kept", "attempt 2 is alive")
        assert (left.folder / "checkpoint-500").exists()

    def test_needs_yes_where_nobody_can_be_asked(self, left: Run) -> None:
        before = left.catalog.storage.list("")
        assert "--yes" in cloudtrain("run", "clean", left.url, code=1).stderr
        assert left.catalog.storage.list("") == before

    def test_of_no_run_is_an_error(self, empty: Run) -> None:
        assert "There is no run at" in sentence("run", "clean", empty.url)
