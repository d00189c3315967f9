"""`cloudtrain checkpoint list`, `view`, `download`, `verify`, `delete` and `pin`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints import download
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.deletion import retire
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest
from hf_cloudtrain.checkpoints.retention import pins
from tests.unit.cli.terminal import ALL, Run, answer, cloudtrain, damage, sentence


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
        assert "Missing argument 'RUN'" in cloudtrain("checkpoint", "list", code=2).stderr

    def test_without_a_run_is_an_error(self, empty: Run) -> None:
        assert f"run at {empty.url!r}" in sentence("checkpoint", "list", empty.url)

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
        assert "checkpoint-200.a1" in result.stdout
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

    @pytest.mark.parametrize("text", ["{broken", '["a list"]', "{" * 10_000])
    def test_shows_the_arguments_of_the_training_in_a_panel(self, empty: Run, text: str) -> None:
        empty.begin()
        empty.save(1, 10, origin={"arguments": '{"seed": 42, "optim": null}', "other": text})
        shown = cloudtrain("checkpoint", "view", empty.url).stdout
        assert " Arguments " in shown
        assert "seed  42" in shown
        assert "optim" not in shown
        assert text[:40] in shown

    def test_gives_the_whole_manifest_as_json(self, run: Run) -> None:
        shown = answer("checkpoint", "view", run.url)
        manifest = run.catalog.read(CheckpointKey(2, 400))
        assert [entry["path"] for entry in shown["files"]] == [entry.path for entry in manifest.files]
        assert [entry["digest"] for entry in shown["files"]] == [entry.digest for entry in manifest.files]
        assert shown["position"]["global_step"] == 400
        assert shown["origin"] == {"torch": "2.13.0"}


class TestDownload:
    def test_gets_the_newest_and_prints_where_it_is(self, run: Run, tmp_path: Path) -> None:
        target = tmp_path / "here"
        result = cloudtrain("checkpoint", "download", run.url, str(target))
        assert result.stdout == f"{target}/checkpoint-400\n"
        assert (target / "checkpoint-400/model.safetensors").read_bytes() == b"400 of 2"
        assert (target / "checkpoint-400/deep/er/rng_state_0.pth").stat().st_size == 1500
        assert [path.name for path in target.iterdir()] == ["checkpoint-400"]

    def test_gets_the_best(self, run: Run, tmp_path: Path) -> None:
        downloaded = answer("checkpoint", "download", run.url, str(tmp_path / "here"), "--best")
        assert downloaded["key"] == "000001-0000000200"
        assert (Path(downloaded["path"]) / "model.safetensors").read_bytes() == b"200 of 1"

    def test_without_a_best_checkpoint_names_the_argument_that_makes_one(
        self, empty: Run, tmp_path: Path
    ) -> None:
        empty.begin()
        empty.save(1, 100)
        assert "metric_for_best_model" in sentence(
            "checkpoint", "download", empty.url, str(tmp_path), "--best"
        )

    def test_gives_a_suffixed_folder_the_plain_name(self, run: Run, tmp_path: Path) -> None:
        cloudtrain("checkpoint", "download", run.url, str(tmp_path / "here"), "-c", "checkpoint-300.a2")
        assert (tmp_path / "here/checkpoint-300/model.safetensors").read_bytes() == b"300 of 2"

    def test_gets_a_folder_that_was_saved_by_name(self, run: Run, tmp_path: Path) -> None:
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

    def test_does_not_transfer_an_intact_copy_again(self, run: Run, tmp_path: Path) -> None:
        command = ("checkpoint", "download", run.url, str(tmp_path / "here"))
        assert answer(*command)["downloaded"] is True
        assert answer(*command)["downloaded"] is False

    def test_leaves_a_different_folder_of_that_name_alone(self, run: Run, tmp_path: Path) -> None:
        mine = tmp_path / "here/checkpoint-400/model.safetensors"
        mine.parent.mkdir(parents=True)
        mine.write_text("mine")
        assert "its files differ from" in sentence("checkpoint", "download", run.url, str(tmp_path / "here"))
        assert mine.read_text() == "mine"

    def test_of_damaged_files_leaves_nothing(self, run: Run, tmp_path: Path) -> None:
        damage(run.folder / "checkpoint-400/config.json")
        assert "'config.json'" in sentence("checkpoint", "download", run.url, str(tmp_path / "here"))
        assert list((tmp_path / "here").iterdir()) == []


class TestVerify:
    def test_of_an_intact_checkpoint_succeeds(self, run: Run) -> None:
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
    def test_names_the_damaged_file(self, run: Run, harm: Any, words: str) -> None:
        harm(run.folder / "checkpoint-400/model.safetensors")
        result = cloudtrain("checkpoint", "verify", run.url, code=1)
        assert result.stdout.splitlines()[1].endswith("damaged")
        assert "'model.safetensors'" in result.stderr
        assert words in result.stderr
        (verdict,) = answer("checkpoint", "verify", run.url, code=1)["checkpoints"]
        assert len(verdict["problems"]) == 1

    def test_of_all_finds_the_damaged_ones(self, run: Run) -> None:
        damage(run.folder / "checkpoint-300/config.json")
        (run.folder / ".cloudtrain/folders/final-000001.json").write_text("[]")
        verdicts = answer("checkpoint", "verify", run.url, "--all", code=1)["checkpoints"]
        assert len(verdicts) == 7
        assert [verdict["key"] for verdict in verdicts if not verdict["whole"]] == [
            "000001-0000000300",
            "final-000001",
        ]

    def test_of_all_leaves_out_what_a_training_deletes_meanwhile(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def verify(catalog: Catalog, manifest: Manifest, **how: Any) -> list[str]:
            if manifest.step == 100:
                retire(catalog, CheckpointKey(1, 200))
            return verify_whole(catalog, manifest, **how)

        verify_whole = download.verify
        monkeypatch.setattr(download, "verify", verify)
        verdicts = answer("checkpoint", "verify", run.url, "--all")["checkpoints"]
        assert [verdict["step"] for verdict in verdicts][:2] == [100, 300]

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
            ("200", "the best checkpoint"),
        ],
    )
    def test_refuses_a_checkpoint_that_the_run_needs_and_says_why(
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
        assert "from the beginning, at step 0" in result.stderr
        assert empty.committed() == []

    def test_needs_yes_without_a_terminal(self, run: Run) -> None:
        assert "--yes" in sentence("checkpoint", "delete", run.url, "-c", "100")
        assert "000001-0000000100" in run.committed()

    @pytest.mark.parametrize(("typed", "code"), [("y\n", 0), ("n\n", 1), ("\n", 1), ("", 130)])
    def test_asks_on_a_terminal(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, typed: str, code: int
    ) -> None:
        class Terminal:
            stdin = SimpleNamespace(isatty=lambda: True)

            def __getattr__(self, name: str) -> Any:
                return getattr(sys, name)

        monkeypatch.setattr("hf_cloudtrain.cli.output.sys", Terminal())
        result = cloudtrain("checkpoint", "delete", run.url, "-c", "100", typed=typed, code=code)
        assert "Delete checkpoint-100 (2 files" in result.stderr
        assert ("000001-0000000100" in run.committed()) == (code != 0)

    def test_of_a_folder_saved_by_name_is_refused(self, run: Run) -> None:
        assert "saved by name" in sentence("checkpoint", "delete", run.url, "-c", "final", "--yes")

    def test_without_a_name_is_wrong_usage(self, run: Run) -> None:
        assert "--checkpoint" in cloudtrain("checkpoint", "delete", run.url, "--yes", code=2).stderr


class TestPin:
    def test_a_pinned_checkpoint_is_shown_as_such_and_not_deleted(self, run: Run) -> None:
        pinned = answer("checkpoint", "pin", run.url, "-c", "100")
        assert (pinned["key"], pinned["pinned"]) == (ALL[0], True)
        assert "pinned" in cloudtrain("checkpoint", "list", run.url).stdout.splitlines()[1]
        shown = answer("checkpoint", "view", run.url, "-c", "100")
        assert (shown["pinned"], shown["protected"]) == (True, "it is pinned")
        assert "It is pinned. Pass --force" in sentence("checkpoint", "delete", run.url, "-c", "100", "--yes")
        assert run.committed() == ALL

    def test_a_pin_can_be_removed(self, run: Run) -> None:
        cloudtrain("checkpoint", "pin", run.url, "-c", "100")
        assert not answer("checkpoint", "pin", run.url, "-c", "100", "--unpin")["pinned"]
        assert not answer("checkpoint", "view", run.url, "-c", "100")["pinned"]
        cloudtrain("checkpoint", "delete", run.url, "-c", "100", "--yes")
        assert run.committed() == ALL[1:]

    def test_force_deletes_a_pinned_checkpoint_and_its_pin(self, run: Run) -> None:
        cloudtrain("checkpoint", "pin", run.url, "-c", "100")
        cloudtrain("checkpoint", "delete", run.url, "-c", "100", "--yes", "--force")
        assert pins(run.catalog) == []

    def test_a_pinned_best_checkpoint_names_both_reasons(self, run: Run) -> None:
        cloudtrain("checkpoint", "pin", run.url, "-c", "200")
        assert "  best, pinned" in cloudtrain("checkpoint", "list", run.url).stdout
        losses = sentence("checkpoint", "delete", run.url, "-c", "200", "--yes")
        assert "It is the best checkpoint" in losses
        assert "It is pinned." in losses

    def test_a_folder_saved_by_name_cannot_be_pinned(self, run: Run) -> None:
        assert "Only checkpoints can be pinned" in sentence("checkpoint", "pin", run.url, "-c", "final")
