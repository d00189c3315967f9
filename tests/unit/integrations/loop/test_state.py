"""A loop's checkpoint folder: what is read back from it, whatever is in it, and what of it people get."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain.errors import ManifestError
from hf_cloudtrain.integrations.loop.state import (
    TRAINING_STATE,
    LoopState,
    is_for_people,
    publish,
    repair,
    storable_args,
    wanted_by,
)
from hf_cloudtrain.runtime import files

STATE = LoopState(
    epoch=3,
    step=1200,
    batches=7,
    best_metric=0.31,
    best_step=800,
    seed=42,
    script_args={"lr": 0.1},
    log=[{"epoch": 0, "step": 400, "train": {"loss": 1.5}, "valid": {}}],
    sums={"interval": {"loss": [1.0, 2]}, "epoch": {}},
)


def written(folder: Path, **changes: Any) -> Path:
    """A folder whose training state has these values; `...` leaves one out."""
    record = json.loads(STATE.encode())
    record.update(changes)
    folder.mkdir(exist_ok=True)
    kept = {name: value for name, value in record.items() if value is not ...}
    (folder / TRAINING_STATE).write_text(json.dumps(kept))
    return folder


class TestLoopState:
    def test_a_new_process_reads_where_training_stands(self, tmp_path: Path) -> None:
        read = LoopState.read(written(tmp_path))
        assert (read.epoch, read.step, read.batches) == (3, 1200, 7)
        assert (read.best_metric, read.best_step) == (0.31, 800)
        assert (read.log, read.sums) == (STATE.log, STATE.sums)

    def test_it_names_its_save_and_the_best_one(self, tmp_path: Path) -> None:
        read = LoopState.read(written(tmp_path, nonce="abc-1200", best_nonce="abc-800"))
        assert (read.nonce, read.best_nonce) == ("abc-1200", "abc-800")

    def test_a_best_metric_may_be_zero(self, tmp_path: Path) -> None:
        assert LoopState.read(written(tmp_path, best_metric=0)).best_metric == 0.0

    def test_a_folder_without_it_was_not_saved_by_a_loop(self, tmp_path: Path) -> None:
        with pytest.raises(
            ManifestError, match=r"was not saved by a TrainLoop\. Resume this run with the API that saved it"
        ):
            LoopState.read(tmp_path)

    @pytest.mark.parametrize("count", ["epoch", "step", "batches"])
    @pytest.mark.parametrize("value", [-1, 1.0, "3", True, None, 2**53, ..., [3]])
    def test_a_value_that_is_not_a_count_is_named(self, tmp_path: Path, count: str, value: Any) -> None:
        with pytest.raises(ManifestError, match=rf"damaged: .*'{count}': .*not counts"):
            LoopState.read(written(tmp_path, **{count: value}))

    @pytest.mark.parametrize("value", ["hf_cloudtrain.loop/2", None, ..., {"a": "b" * 1000}])
    def test_an_unknown_format_is_refused_by_its_name(self, tmp_path: Path, value: Any) -> None:
        with pytest.raises(ManifestError, match=r"not 'hf_cloudtrain\.loop/1'") as caught:
            LoopState.read(written(tmp_path, format=value))
        assert len(str(caught.value)) < 300 + len(str(tmp_path))

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "{" * 100_000])
    def test_a_file_that_is_not_a_json_object_is_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / TRAINING_STATE).write_text(text)
        with pytest.raises(ManifestError, match="damaged"):
            LoopState.read(tmp_path)

    @pytest.mark.parametrize(
        ("name", "value", "wanted"),
        [
            ("best_metric", "high", None),
            ("best_metric", math.nan, None),
            ("best_metric", math.inf, None),
            ("best_step", 1.5, None),
            ("log", {"0": 1}, []),
            ("log", [1, {"epoch": 0}], [{"epoch": 0}]),
            ("sums", None, {}),
            ("sums", ..., {}),
            ("log_format", "xml", "records"),
            ("log_format", ["epochs"], "records"),
            ("log_format", ..., "records"),
        ],
    )
    def test_damaged_values_that_nothing_depends_on_are_dropped(
        self, tmp_path: Path, name: str, value: Any, wanted: Any
    ) -> None:
        assert getattr(LoopState.read(written(tmp_path, **{name: value})), name) == wanted

    def test_a_nan_in_the_log_does_not_prevent_a_resume(self, tmp_path: Path) -> None:
        log = [{"epoch": 0, "train": {"loss": math.nan}}]
        assert math.isnan(LoopState.read(written(tmp_path, log=log)).log[0]["train"]["loss"])

    def test_letters_outside_ascii_are_readable(self) -> None:
        assert "영화" in LoopState(script_args={"data": "영화"}).encode()

    def test_the_log_is_replaced_atomically(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        STATE.write_log(tmp_path)
        assert json.loads((tmp_path / "log.json").read_text()) == STATE.log

        def fail(*paths: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space"):
            LoopState(log=[{"epoch": 1}]).write_log(tmp_path)
        assert json.loads((tmp_path / "log.json").read_text()) == STATE.log

    def test_the_log_is_json_whatever_was_logged(self, tmp_path: Path) -> None:
        LoopState(log=[{"epoch": 0, "train": {"loss": math.nan, "caf\udce9": math.inf}}]).write_log(tmp_path)
        text = (tmp_path / "log.json").read_text(encoding="utf-8")
        assert json.loads(text, parse_constant=pytest.fail) == [
            {"epoch": 0, "train": {"loss": None, "caf\\udce9": None}}
        ]

    def test_the_log_may_be_keyed_by_epoch(self, tmp_path: Path) -> None:
        log = [
            {"epoch": 0, "step": 5, "train": {"loss": 1.5}, "valid": {"loss": math.nan}},
            {"epoch": 1, "step": 10, "train": {"loss": 1.0}},
        ]
        state = LoopState(log=log, log_format="epochs")
        state.write_log(tmp_path)
        assert json.loads((tmp_path / "log.json").read_text()) == {
            "Epoch 0": {"train_log": {"loss": 1.5}, "valid_log": {"loss": None}},
            "Epoch 1": {"train_log": {"loss": 1.0}, "valid_log": {}},
        }
        read = LoopState.read(written(tmp_path, log=log, log_format="epochs"))
        assert (read.log[1], read.log_format) == (log[1], "epochs")

    def test_the_log_is_one_file(self, tmp_path: Path) -> None:
        STATE.write_log(tmp_path)
        STATE.write_log(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["log.json"]


class TestStorableArgs:
    def test_values_that_json_knows_stay_and_others_become_text(self) -> None:
        given = {
            "lr": 0.1,
            "epochs": 3,
            "fp16": False,
            "seed": None,
            "dir": Path("a/b"),
            "betas": (0.9, 0.95),
        }
        assert storable_args(given) == {**given, "dir": "a/b", "betas": "(0.9, 0.95)"}

    def test_a_number_that_json_lacks_becomes_text(self) -> None:
        assert storable_args({"clip": math.inf, "drop": math.nan}) == {"clip": "inf", "drop": "nan"}

    @pytest.mark.parametrize("name", ["hub_token", "api_key", "password", "AWS_SECRET_ACCESS_KEY"])
    def test_law_11_a_secret_is_not_stored(self, name: str) -> None:
        for secret in ("hunter2hunter2", {"value": "hunter2hunter2"}):
            assert "hunter2" not in json.dumps(storable_args({name: secret}))

    def test_law_11_a_secret_within_a_url_is_not_stored(self) -> None:
        kept = storable_args({"mirror": "https://me:hunter2hunter2@example.com/data"})
        assert "hunter2" not in kept["mirror"]
        assert "example.com" in kept["mirror"]

    def test_a_long_value_is_cut(self) -> None:
        assert len(storable_args({"text": "a b " * 10_000})["text"]) == 2000

    def test_without_arguments_nothing_is_stored(self) -> None:
        assert storable_args(None) == {}


class TestWhichFiles:
    @pytest.mark.parametrize(
        "path",
        [
            "optimizer.bin",
            "optimizer_1.bin",
            "scheduler.bin",
            "sampler.bin",
            "dl_state_dict_2.bin",
            "scaler.pt",
            "random_states_11.pkl",
            "custom_checkpoint_0.pkl",
            "loop_state_0.pt",
        ],
    )
    def test_files_that_only_a_resume_needs_are_not_published(self, path: str) -> None:
        assert not is_for_people(path)

    @pytest.mark.parametrize(
        "path",
        [
            "model.safetensors",
            "model_1.safetensors",
            "pytorch_model.bin",
            "config.json",
            "tokenizer.json",
            "adapter_model.safetensors",
            "training_state.json",
            "my_optimizer.bin",
            "random_states_0.pkl.txt",
        ],
    )
    def test_the_other_files_are_published(self, path: str) -> None:
        assert is_for_people(path)

    def test_a_disk_gets_the_files_of_its_own_ranks(self) -> None:
        wanted = wanted_by([1, 10])
        paths = [f"{name}_{rank}.{kind}" for name, kind in _OF_RANKS for rank in (0, 1, 2, 10)]
        assert [path for path in paths if wanted(path)] == [
            "random_states_1.pkl",
            "random_states_10.pkl",
            "loop_state_1.pt",
            "loop_state_10.pt",
        ]
        assert all(map(wanted, ["model.safetensors", "optimizer_0.bin", "custom_checkpoint_0.pkl"]))


class TestRepair:
    @pytest.fixture
    def dead(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The process that made what lies here is no more."""
        monkeypatch.setattr(files, "_making", set())

    def test_unfinished_folders_are_removed(self, tmp_path: Path, dead: None) -> None:
        meta = tmp_path / "_cloudtrain"
        left = f"{os.getpid()}-{random.getrandbits(32):08x}"
        for name in (f"best-{left}", f"last-{left}", f"saving-500-{left}", f"gone-{left}", "outbox"):
            (meta / name).mkdir(parents=True)
        repair(tmp_path)
        assert [path.name for path in meta.iterdir()] == ["outbox"]
        assert [path.name for path in tmp_path.iterdir()] == ["_cloudtrain"]

    def test_a_whole_one_is_moved_back_where_it_is_missing(self, tmp_path: Path, dead: None) -> None:
        meta = tmp_path / "_cloudtrain"
        meta.mkdir()
        written(meta / f"best-{os.getpid()}-{1:08x}")
        repair(tmp_path)
        assert LoopState.read(tmp_path / "best").step == 1200
        assert not list(meta.iterdir())

    def test_an_existing_one_stays(self, tmp_path: Path, dead: None) -> None:
        meta = tmp_path / "_cloudtrain"
        meta.mkdir()
        written(meta / f"best-{os.getpid()}-{1:08x}", step=1)
        written(tmp_path / "best", step=2)
        repair(tmp_path)
        assert LoopState.read(tmp_path / "best").step == 2

    @pytest.mark.parametrize("kind", ["best", "saving-500", "gone"])
    def test_folders_of_a_live_process_are_kept(self, tmp_path: Path, kind: str) -> None:
        folder = tmp_path / "_cloudtrain" / f"{kind}-{files.temp_suffix()}"
        folder.mkdir(parents=True)
        written(folder)
        repair(tmp_path)
        assert folder.is_dir()
        assert not (tmp_path / "best").exists()


class TestPublish:
    def test_everything_in_the_target_is_replaced(self, tmp_path: Path) -> None:
        first, second = written(tmp_path / "checkpoint-1", step=1), written(tmp_path / "checkpoint-2", step=2)
        (first / "adapter_config.json").write_text("{}")
        (first / "optimizer.bin").write_bytes(b"x")
        publish(first, tmp_path / "last")
        assert {path.name for path in (tmp_path / "last").iterdir()} == {
            "adapter_config.json",
            TRAINING_STATE,
        }
        previous = publish(second, tmp_path / "last")
        assert {path.name for path in (tmp_path / "last").iterdir()} == {TRAINING_STATE}
        assert list((tmp_path / "_cloudtrain").iterdir()) == [previous]
        assert LoopState.read(previous).step == 1

    def test_folders_within_are_published_too(self, tmp_path: Path) -> None:
        folder = written(tmp_path / "checkpoint-1")
        (folder / "unet").mkdir()
        (folder / "unet" / "config.json").write_text("{}")
        publish(folder, tmp_path / "last")
        assert (tmp_path / "last" / "unet" / "config.json").read_text() == "{}"

    def test_without_hard_links_it_copies(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = written(tmp_path / "checkpoint-1")
        (folder / "model.safetensors").write_bytes(bytes(2**20))

        def fail(*paths: Any) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "link", fail)
        publish(folder, tmp_path / "last")
        assert (tmp_path / "last" / "model.safetensors").stat().st_size == 2**20


_OF_RANKS = [("random_states", "pkl"), ("loop_state", "pt")]
