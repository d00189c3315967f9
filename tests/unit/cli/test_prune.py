"""`cloudtrain checkpoint prune`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.retention import pin
from hf_cloudtrain.cli.commands import checkpoint
from hf_cloudtrain.errors import StorageError
from hf_cloudtrain.testing import FaultyStorage
from tests.unit.cli.terminal import ALL, Run, answer, cloudtrain, sentence

if TYPE_CHECKING:
    import pytest


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

    def test_a_dry_run_shows_what_would_be_deleted_and_deletes_nothing(self, run: Run) -> None:
        result = cloudtrain("checkpoint", "prune", run.url, "--keep-last", "1", "--dry-run")
        lines = {line.split()[0]: line for line in result.stdout.splitlines()[1:]}
        assert {name for name, line in lines.items() if line.endswith(" delete")} == {
            *("checkpoint-100", "checkpoint-300", "checkpoint-300.a2")
        }
        assert lines["checkpoint-200"].endswith("keep: it is the best one")
        assert "Dry run: 3 checkpoints (" in result.stderr
        assert run.committed() == ALL
        record = answer("checkpoint", "prune", run.url, "--keep-last", "1", "--dry-run")
        assert (record["dry_run"], record["deleted"], len(record["going"])) == (True, [], 3)
        assert run.committed() == ALL

    def test_needs_yes_without_a_terminal(self, run: Run) -> None:
        assert "--yes" in cloudtrain("checkpoint", "prune", run.url, "--keep-last", "1", code=1).stderr
        assert run.committed() == ALL

    def test_with_nothing_to_delete_says_so_and_does_not_ask(self, run: Run) -> None:
        assert "Nothing to delete." in cloudtrain("checkpoint", "prune", run.url, "--keep-last", "9").stderr

    def test_without_a_number_is_wrong_usage(self, run: Run) -> None:
        assert "--keep-last" in cloudtrain("checkpoint", "prune", run.url, "--yes", code=2).stderr
        cloudtrain("checkpoint", "prune", run.url, "--keep-last", "0", "--yes", code=2)

    def test_without_a_run_is_an_error(self, empty: Run) -> None:
        assert f"run at {empty.url!r}" in sentence("checkpoint", "prune", empty.url, "--keep-last", "1")

    def test_a_checkpoint_with_a_damaged_manifest_is_kept_with_a_warning(self, run: Run) -> None:
        (run.folder / ".cloudtrain" / "checkpoints" / f"{ALL[0]}.json").write_bytes(b"{")
        result = cloudtrain("checkpoint", "prune", run.url, "--keep-last", "1", "--yes")
        assert f"Warning: The manifest {ALL[0]!r}" in result.stderr
        assert run.committed() == [ALL[0], ALL[1], ALL[4]]

    def test_a_checkpoint_that_a_new_attempt_resumes_from_is_kept(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def a_new_attempt_begins(question: str, yes: bool) -> None:
            run.begin(resumed_from=CheckpointKey(1, 100))

        monkeypatch.setattr(checkpoint, "confirm", a_new_attempt_begins)
        result = cloudtrain("checkpoint", "prune", run.url, "--keep-last", "1", code=1)
        assert "Kept checkpoint-100: attempt 3 resumed from it since the command started." in result.stderr
        assert "Only 2 of 3 checkpoints were deleted." in result.stderr
        assert run.committed() == [ALL[0], ALL[1], ALL[4]]

    def test_finishes_an_interrupted_deletion(self, run: Run) -> None:
        storage = FaultyStorage(run.url)
        storage.fail("delete", StorageError("broken off"), path="checkpoint-100/*", times=100)
        with storage.everywhere():
            assert "broken off" in sentence("checkpoint", "delete", run.url, "-c", "100", "--yes")
        assert (run.folder / "checkpoint-100").exists()
        cloudtrain("checkpoint", "prune", run.url, "--keep-last", "9", "--yes")
        assert not (run.folder / "checkpoint-100").exists()
