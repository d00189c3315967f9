"""`cloudtrain predict`: a table in, the same table with predictions out, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import tiny_models
from tests.integration._serve import MODULE, Served, committed, folder_with
from tests.integration._zygote import Child, Zygote
from tests.unit.cli.terminal import Run, answer, cloudtrain, sentence

ROWS = 96
SHARD = ["--shard", "8"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_CLOUDTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path / "store"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folder_with(tmp_path / "model", tiny_models.files("BertForSequenceClassification"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    words = tiny_models.WORDS
    texts = [" ".join(words[(at * at + n) % 7] for n in range(1 + at % 9)) for at in range(ROWS)]
    path = tmp_path / "data.parquet"
    pq.write_table(
        pa.table({"id": range(ROWS), "text": texts, "label": [at % 3 for at in range(ROWS)]}), path
    )
    return path


def predict(zygote: Zygote, model: Path, data: Path, out: Path, *more: str, **env: str) -> Child:
    words = ["predict", str(model), str(data), "-o", str(out), *SHARD, *more]
    return zygote.start(MODULE, "command", words=words, env=env)


def done(child: Child) -> None:
    assert child.wait() == 0, child.log


def shards(out: Path) -> int:
    return len(list(out.with_name(f"{out.name}.parts").glob("[0-9]*.json")))


def train_adapter(way: str, base: Path, run: str, texts: list[str]) -> list[float]:
    """Train a LoRA adapter over a base model, and return the trained model's score of each text."""
    import peft
    import torch
    import transformers
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from hf_cloudtrain import CloudTrainCallback, TrainLoop

    torch.manual_seed(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    adapted: Any = peft.get_peft_model(
        network, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["value"])
    )
    rows: Any = [{**tokenizer(text), "labels": at % 3} for at, text in enumerate(texts)]
    collate = transformers.DataCollatorWithPadding(tokenizer)
    output_dir = f"{run}-output"
    if way == "trainer":
        quiet: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
        args = transformers.TrainingArguments(
            output_dir, max_steps=6, save_steps=3, learning_rate=0.1, use_cpu=True, **quiet
        )
        given: dict[str, Any] = {"processing_class": tokenizer, "callbacks": [CloudTrainCallback(run)]}
        transformers.Trainer(adapted, args, collate, rows, **given).train()
    else:
        accelerator = Accelerator(cpu=True, project_dir=output_dir)
        optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.1)
        adapted, optimizer, loader = accelerator.prepare(
            adapted, optimizer, torch.utils.data.DataLoader(rows, 16, collate_fn=collate)
        )
        loop = TrainLoop(accelerator, run, num_epochs=1, output_dir=output_dir, processing_class=tokenizer)
        loop.resume()
        for _ in loop.epochs():
            for batch in loop.steps(loader):
                accelerator.backward(adapted(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
            loop.end_epoch({"loss": 0.0})
    AcceleratorState._reset_state(reset_partial_state=True)
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        scores: list[float] = adapted.eval()(**batch).logits.softmax(-1).amax(-1).tolist()
    return scores


def wait_for(condition: Any, child: Child) -> None:
    deadline = time.monotonic() + 60
    while not condition() and child.poll() is None:
        assert time.monotonic() < deadline, child.log
        time.sleep(0.002)


class TestDoor:
    def test_columns_are_kept_and_scores_printed(self, model: Path, data: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.parquet"
        result = cloudtrain("predict", str(model), str(data), "-o", str(out))
        assert result.stderr.splitlines() == [
            f"Wrote 96 rows with the predictions of {str(model)!r} to {str(out)!r}."
        ]
        found = pq.read_table(out)
        assert found.column_names == [
            "id",
            "text",
            "label",
            "predicted_label",
            "predicted_score",
            "predicted_error",
        ]
        assert found.select(["id", "text", "label"]).equals(pq.read_table(data))
        right = [
            tiny_models.LABELS[truth] == label
            for truth, label in zip(
                found["label"].to_pylist(), found["predicted_label"].to_pylist(), strict=True
            )
        ]
        facts = dict(line.split() for line in result.stdout.splitlines())
        assert facts == {**facts, "rows": "96", "failed": "0", "accuracy": f"{sum(right) / 96:.5f}"}
        assert len(set(found["predicted_label"].to_pylist())) > 1
        assert not out.with_name("out.parquet.parts").exists()

    def test_a_run_a_dataset_of_the_store_and_a_second_format(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = Run(tmp_path / "run", tmp_path / "out")
        run.begin()
        committed(run, 4)
        (tmp_path / "films").mkdir()
        (tmp_path / "films" / "test.csv").write_text("n,first,second\n007,a,film\n008,good,\n")
        cloudtrain("data", "create", "films", str(tmp_path / "films"))
        out = tmp_path / "out.jsonl"
        record = answer("predict", run.url, "films@1/test.csv", "-o", str(out), "--column", "first,second")
        assert (record["rows"], record["labelled"], record["accuracy"]) == (2, 0, None)
        assert [json.loads(line)["n"] for line in out.read_text().splitlines()] == ["007", "008"]

    @pytest.mark.parametrize("way", ["trainer", "loop"])
    def test_an_adapter_that_was_trained_predicts_and_is_served_with_its_base_model(
        self, zygote: Zygote, model: Path, data: Path, tmp_path: Path, way: str
    ) -> None:
        run = str(tmp_path / "run")
        expected = train_adapter(way, model, run, pq.read_table(data)["text"].to_pylist())
        found = {}
        for name, source in (("adapted", run), ("base", str(model))):
            out = tmp_path / f"{name}.parquet"
            cloudtrain("predict", source, str(data), "-o", str(out))
            found[name] = pq.read_table(out)["predicted_score"].to_pylist()
        assert found["adapted"] == pytest.approx(expected, abs=1e-5)
        assert found["base"] != pytest.approx(expected, abs=1e-2), "training changed the answers"
        served = Served(zygote, run)
        status, rows = served.ask({"inputs": pq.read_table(data)["text"].to_pylist()})
        served.stop()
        assert status == 200
        assert [row["score"] for row in rows] == pytest.approx(found["adapted"], abs=1e-6)

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (
                ["--column", "txt"],
                "has no column 'txt'. Its columns are: id, text, label. Pass the input's: --column",
            ),
            (["--label", "lable"], "The data has no column 'lable'. Its columns are"),
            (["-o", "out.txt"], "'out.txt' must end in one of"),
            (["-o", "model/config.json"], "exists. Remove it, or choose a different --output"),
        ],
    )
    def test_a_mistyped_value_is_named(
        self,
        model: Path,
        data: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        words: list[str],
        expected: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert expected in sentence("predict", str(model), str(data), "-o", "out.csv", *words)
        assert not (tmp_path / "out.csv").exists()

    def test_data_that_does_not_exist_is_named(self, model: Path) -> None:
        assert "'./nothing' does not exist" in sentence("predict", str(model), "./nothing", "-o", "out.csv")
        assert "Dataset 'nothing' does not exist" in sentence(
            "predict", str(model), "nothing", "-o", "out.csv"
        )
        typed = sentence("predict", str(model), "nothing.CSV", "-o", "out.csv")
        assert typed.startswith("Error: 'nothing.CSV' does not exist. Name a file or folder of this machine")

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["-o", "out.txt"], "'out.txt' must end in"),
            (["-o", "out.csv", "--column", "txt"], "has no column 'txt'"),
            (["-o", "out.csv", "--label", "lable"], "has no column 'lable'"),
        ],
        ids=["output", "column", "label"],
    )
    def test_what_the_user_typed_is_checked_before_a_model_is_downloaded(
        self, data: Path, words: list[str], expected: str
    ) -> None:
        assert expected in sentence("predict", "s3://nobucket/x", str(data), *words)

    def test_two_labels_without_names_are_scored(self, tmp_path: Path) -> None:
        """transformers leaves the names that it gives itself out of config.json."""
        files = dict(tiny_models.files("BertForSequenceClassification", num_labels=2, id2label=None))
        assert b"id2label" not in files["config.json"]
        model = folder_with(tmp_path / "two", files)
        (tmp_path / "data.csv").write_text("text,label\n" + "good film,0\nbad film,1\n" * 4 + "a,-1\n")
        out = tmp_path / "out.csv"
        record = answer("predict", str(model), str(tmp_path / "data.csv"), "-o", str(out))
        said = [line.split(",")[2] for line in out.read_text().splitlines()[1:9]]
        right = [label == f"LABEL_{number % 2}" for number, label in enumerate(said)]
        assert any(right)
        assert (record["labelled"], record["unlabelled"], record["accuracy"]) == (8, 1, sum(right) / 8)

    def test_without_a_terminal_a_line_from_time_to_time_shows_the_progress(
        self, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("hf_cloudtrain.cli.commands.predict.SAY_EVERY", 0.0)
        out = tmp_path / "out.parquet"
        result = cloudtrain("predict", str(model), str(data), "-o", str(out), "--shard", "40")
        assert result.stderr.splitlines()[:3] == [
            "Predicted 40 of 96 rows.",
            "Predicted 80 of 96 rows.",
            "Predicted 96 of 96 rows.",
        ]

    def test_a_row_that_fails_does_not_fail_the_others(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "data.jsonl").write_text('{"text": "good"}\n{"text": null}\n{"text": "bad"}\n')
        (tmp_path / "numbers.jsonl").write_text('{"text": 7}\n')
        out = tmp_path / "out.csv"
        assert answer("predict", str(model), str(tmp_path / "data.jsonl"), "-o", str(out))["failed"] == 0
        out.unlink()
        record = answer("predict", str(model), str(tmp_path / "numbers.jsonl"), "-o", str(out))
        assert (record["rows"], record["failed"]) == (1, 1)
        assert out.read_text().splitlines()[1] == '7,,,"An input must be a text, not 7."'

    def test_other_tasks_have_their_answer_as_json(self, tmp_path: Path) -> None:
        tokens = folder_with(tmp_path / "tokens", tiny_models.files("BertForTokenClassification"))
        (tmp_path / "data.csv").write_text("text\ngood film\n")
        out = tmp_path / "out.jsonl"
        answer("predict", str(tokens), str(tmp_path / "data.csv"), "-o", str(out))
        (row,) = map(json.loads, out.read_text().splitlines())
        assert [token["word"] for token in json.loads(row["prediction"])] == ["good", "film"]


class TestInterrupted:
    def test_after_five_kills_the_bytes_are_those_of_an_uninterrupted_prediction(
        self, zygote: Zygote, model: Path, data: Path, tmp_path: Path
    ) -> None:
        done(predict(zygote, model, data, tmp_path / "whole.parquet"))
        out = tmp_path / "out.parquet"
        for _ in range(5):
            before = shards(out)
            child = predict(zygote, model, data, out)
            wait_for(lambda before=before: shards(out) > before, child)
            child.kill()
            assert not out.exists()
            assert shards(out) > before
        done(predict(zygote, model, data, out))
        assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()

    @pytest.mark.slow
    def test_two_processes_share_the_shards_and_one_that_is_killed_is_continued(
        self, zygote: Zygote, model: Path, data: Path, tmp_path: Path
    ) -> None:
        one = {"OMP_NUM_THREADS": "1"}
        done(predict(zygote, model, data, tmp_path / "whole.csv", **one))
        out = tmp_path / "out.csv"
        child = predict(zygote, model, data, out, "--processes", "2", **one)
        wait_for(lambda: shards(out) > 0, child)
        child.kill()
        done(predict(zygote, model, data, out, "--processes", "2", **one))
        assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()

    def test_a_shard_that_was_damaged_is_predicted_again(
        self, zygote: Zygote, model: Path, data: Path, tmp_path: Path
    ) -> None:
        done(predict(zygote, model, data, tmp_path / "whole.csv"))
        out = tmp_path / "out.csv"
        child = predict(zygote, model, data, out)
        wait_for(lambda: shards(out) > 0, child)
        child.kill()
        (tmp_path / "out.csv.parts" / "00000.arrow").write_bytes(b"nonsense")
        done(predict(zygote, model, data, out))
        assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()

    def test_a_second_command_on_the_same_output_is_refused(
        self, zygote: Zygote, model: Path, data: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out.csv"
        child = predict(zygote, model, data, out)
        wait_for(lambda: shards(out) > 0, child)
        os.kill(child.pid, signal.SIGSTOP)
        text = sentence("predict", str(model), str(data), "-o", str(out), *SHARD)
        assert text == (
            f"Error: A different process is predicting into {str(out)!r}. Wait for it, or choose a different --output.\n"
        )
        os.kill(child.pid, signal.SIGCONT)
        done(child)

    def test_a_different_prediction_is_not_continued(
        self, zygote: Zygote, model: Path, data: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out.csv"
        child = predict(zygote, model, data, out)
        wait_for(lambda: shards(out) > 0, child)
        child.kill()
        text = sentence("predict", str(model), str(data), "-o", str(out), "--shard", "9", "--max-batch", "2")
        assert "holds the beginning of a different prediction (shard, batch differ)" in text

    def test_on_a_full_disk_nothing_that_is_done_is_lost(
        self, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from hf_cloudtrain.serving.predict import shards as batches

        write, calls = batches.write_whole, []

        def full(path: Path, content: bytes) -> None:
            calls.append(path)
            if len(calls) == 5:
                raise OSError(28, "No space left on device", str(path))
            write(path, content)

        monkeypatch.setattr(batches, "write_whole", full)
        out = tmp_path / "out.csv"
        text = sentence("predict", str(model), str(data), "-o", str(out), *SHARD)
        assert text.startswith("Error: No space left on device: ")
        assert text.endswith("What is done is kept: solve this, and run the same command again.\n")
        assert shards(out) == 3
        cloudtrain("predict", str(model), str(data), "-o", str(out), *SHARD)
        assert len(out.read_text().splitlines()) == ROWS + 1
        assert len(calls) == 5 + ROWS // 8 - 3
