"""Each example has a page with its commands; the GLUE example has the right tasks and metrics, and runs.

`test_examples_*.py` run the other examples.
"""

import ast
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_cloudtrain.tracking.history import read_history

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "glue"

# From https://gluebenchmark.com/tasks and the dataset card of nyu-mll/glue, repeated here on purpose.
GLUE = {
    "cola": (("sentence",), 2, {"matthews_correlation"}),
    "mnli": (("premise", "hypothesis"), 3, {"accuracy"}),
    "mrpc": (("sentence1", "sentence2"), 2, {"accuracy", "f1"}),
    "qnli": (("question", "sentence"), 2, {"accuracy"}),
    "qqp": (("question1", "question2"), 2, {"accuracy", "f1"}),
    "rte": (("sentence1", "sentence2"), 2, {"accuracy"}),
    "sst2": (("sentence",), 2, {"accuracy"}),
    "stsb": (("sentence1", "sentence2"), 1, {"pearson", "spearmanr"}),
    "wnli": (("sentence1", "sentence2"), 2, {"accuracy"}),
}
TINY = ["--max_train_samples", "16", "--max_eval_samples", "16", "--max_steps", "2", "--disable_tqdm", "true"]
ROWS = {
    "sentence1": ["NA", "2026-11-20", '007, "quoted"', "null", "two\nlines", "das Ende \u2013 ☃"],
    "sentence2": ["1.50", "2026-11-21", "8", "", "nan", "the end"],
    "idx": [0, 1, 2, 3, 4, 5],
}


@pytest.fixture(autouse=True)
def _example_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    # monkeypatch.syspath_prepend would also touch pkg_resources, which warns.
    monkeypatch.setattr(sys, "path", [str(EXAMPLE), *sys.path])
    monkeypatch.delenv("HF_CLOUDTRAIN_RUN_URL", raising=False)


@pytest.fixture
def run_glue() -> ModuleType:
    return importlib.import_module("run_glue")


@pytest.fixture
def glue_tasks() -> ModuleType:
    return importlib.import_module("glue_tasks")


EXAMPLES = sorted(path for path in EXAMPLE.parent.iterdir() if path.is_dir())


class TestEveryExample:
    @pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
    def test_has_a_page_with_the_command_of_each_script(self, folder):
        page = (folder / "README.md").read_text()
        scripts = [path.name for path in folder.glob("*.py") if "__main__" in path.read_text()]
        assert scripts
        for name in scripts:
            launched = re.search(
                rf"(?:python|torchrun|accelerate launch|make)\b[^\n]*\b{re.escape(name)}", page
            )
            assert launched or name == "demo.py", f"{folder.name}/README.md does not show how to start {name}"

    @pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
    def test_is_linked_from_the_readme_and_run_by_a_test(self, folder):
        assert f"(examples/{folder.name})" in (ROOT / "README.md").read_text()
        tests = [path for path in Path(__file__).parent.glob("test_examples*.py") if folder.name in path.name]
        assert tests or folder.name == "glue", f"the example {folder.name} has no test file"


class TestTasks:
    def test_columns_and_label_counts_are_those_of_glue(self, glue_tasks):
        found = {name: (task.sentence_keys, task.num_labels) for name, task in glue_tasks.TASKS.items()}
        assert found == {name: (keys, labels) for name, (keys, labels, _) in GLUE.items()}

    @pytest.mark.parametrize("task_name", GLUE)
    def test_synthetic_rows_have_the_columns_of_the_hub_and_all_labels(self, glue_tasks, task_name):
        keys, labels, _ = GLUE[task_name]
        data = importlib.import_module("glue_synthetic").make_dataset(task_name)
        assert set(data) == set(glue_tasks.TASKS[task_name].splits)
        for rows in data.values():
            assert rows.column_names == [*keys, "label", "idx"]
        if task_name == "stsb":
            assert (min(data["train"]["label"]), max(data["train"]["label"])) == (0.0, 5.0)
        else:
            assert set(data["train"]["label"]) == set(range(labels))

    @pytest.mark.slow
    def test_synthetic_rows_and_vocabulary_do_not_depend_on_the_process(self):
        script = (
            "from glue_synthetic import make_dataset; from small_bert import make_tokenizer; import json;"
            "rows = make_dataset('mrpc')['train']['sentence2'];"
            "print(json.dumps([rows[:], make_tokenizer(rows, 128).get_vocab()]))"
        )
        environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(EXAMPLE)}
        command = [sys.executable, "-c", script]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        rows = importlib.import_module("glue_synthetic").make_dataset("mrpc")["train"]["sentence2"]
        vocabulary = importlib.import_module("small_bert").make_tokenizer(rows, 128).get_vocab()
        assert len(vocabulary) > 100
        assert json.loads(result.stdout) == [rows[:], vocabulary]

    def test_a_word_outside_the_vocabulary_is_split_into_characters(self):
        tokenizer = importlib.import_module("small_bert").make_tokenizer(["a cat sat", "a sat"], 128)
        assert tokenizer.tokenize("A scat sat") == ["a", "s", "##c", "##a", "##t", "sat"]


class TestMetric:
    @pytest.mark.parametrize("task_name", [*GLUE, "mnli_matched", "mnli_mismatched"])
    def test_has_the_official_names_and_the_values_of_scikit_learn_and_scipy(self, task_name):
        labels = GLUE[task_name.split("_")[0]][1]
        chance = np.random.default_rng(7)
        for size in (12, 400):  # few values in many rows: spearmanr has ties
            expected = chance.integers(0, labels, size) if labels > 1 else chance.integers(0, 26, size) / 5
            predicted = np.where(chance.random(size) < 0.6, expected, chance.permutation(expected))
            figures = _compute(task_name, predicted, expected)
            assert set(figures) == GLUE[task_name.split("_")[0]][2]
            for name, figure in figures.items():
                assert figure == pytest.approx(_official(name, predicted, expected), abs=1e-6, nan_ok=True)

    @pytest.mark.filterwarnings(
        "ignore:A single label was found:UserWarning"
    )  # scikit-learn, if all rows are of class 0
    @pytest.mark.parametrize("task_name", ["mrpc", "cola"])
    @pytest.mark.parametrize(
        ("predicted", "expected"), [([0, 0], [0, 0]), ([0, 0], [0, 1]), ([1, 1], [0, 1])]
    )
    def test_constant_classes_give_the_values_of_scikit_learn(self, task_name, predicted, expected):
        for name, figure in _compute(task_name, predicted, expected).items():
            assert figure == pytest.approx(_official(name, np.array(predicted), np.array(expected)))

    def test_constant_scores_have_no_correlation(self):
        assert all(math.isnan(figure) for figure in _compute("stsb", [1.0, 1.0], [2.0, 3.0]).values())

    def test_an_unknown_task_raises_an_error_with_the_known_ones(self):
        with pytest.raises(KeyError, match=r"'ax'.*mrpc"):
            _compute("ax", [0], [0])


class TestLocalData:
    @pytest.mark.parametrize("task_name", ["mrpc", "stsb"])
    def test_parquet_jsonl_and_csv_give_equal_datasets(self, glue_tasks, tmp_path, task_name):
        labels = [0.0, 5.0, 2.5, 3.8, 1.2, -1.0] if task_name == "stsb" else [0, 1, 1, 0, 1, -1]
        rows = datasets.Dataset.from_dict(ROWS | {"label": labels, "extra": list("abcdef")})
        loaded = []
        for name, write in (("parquet", "to_parquet"), ("jsonl", "to_json"), ("csv", "to_csv")):
            folder = tmp_path / name
            folder.mkdir()
            for split in ("train", "validation", "test"):
                getattr(rows, write)(folder / f"{split}.{name}")
            loaded.append(glue_tasks.load_local(task_name, str(folder), str(tmp_path / "cache")))
        for data in loaded:
            assert set(data) == {"train", "validation", "test"}
            assert data["train"].features == loaded[0]["train"].features
            assert data["test"].to_list() == loaded[0]["test"].to_list()
        assert loaded[0]["train"]["sentence1"] == ROWS["sentence1"]
        assert loaded[0]["train"]["label"] == pytest.approx(labels)

    def test_a_split_is_all_files_whose_name_starts_with_its_name(self, glue_tasks, tmp_path):
        for name in ("train_10k_noperiod", "validation_matched", "unrelated"):
            _mnli_rows(name).to_parquet(tmp_path / f"{name}.parquet")
        data = glue_tasks.load_local("mnli", str(tmp_path), str(tmp_path / "cache"))
        assert {split: rows["premise"][0] for split, rows in data.items()} == {
            "train": "train_10k_noperiod",
            "validation_matched": "validation_matched",
        }

    def test_missing_folders_files_and_columns_are_named(self, glue_tasks, tmp_path):
        with pytest.raises(NotADirectoryError, match=r"'.*nowhere'"):
            glue_tasks.load_local("mrpc", str(tmp_path / "nowhere"))
        with pytest.raises(FileNotFoundError, match="Expected train, validation, test"):
            glue_tasks.load_local("mrpc", str(tmp_path))
        _mnli_rows("x").to_parquet(tmp_path / "train.parquet")
        with pytest.raises(ValueError, match="no column 'sentence1', only premise"):
            glue_tasks.load_local("mrpc", str(tmp_path), str(tmp_path / "cache"))
        _mnli_rows("x").to_csv(tmp_path / "train.csv")
        with pytest.raises(ValueError, match="more than one format"):
            glue_tasks.load_local("mrpc", str(tmp_path))


class TestScript:
    @pytest.mark.parametrize("task_name", GLUE)
    def test_each_task_trains_and_reports_its_own_metrics(self, run_glue, tmp_path, task_name):
        run_glue.main(["--task_name", task_name, "--output_dir", str(tmp_path), "--do_predict", *TINY])
        metrics = json.loads((tmp_path / "eval_results.json").read_text())
        expected = {f"eval_{name}" for name in GLUE[task_name][2]}
        if len(expected) > 1:
            expected.add("eval_combined_score")
        if task_name == "mnli":
            expected.add("eval_accuracy_mm")
        technical = ("loss", "runtime", "samples", "second")
        assert {name for name in metrics if not any(word in name for word in technical)} == expected | {
            "epoch"
        }
        assert (tmp_path / "final" / "model.safetensors").is_file()
        assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()
        assert list(tmp_path.glob("predict_test*.tsv"))

    @pytest.mark.slow
    def test_the_loss_on_synthetic_data_decreases(self, run_glue, tmp_path):
        run_glue.main(["--output_dir", str(tmp_path), "--max_steps", "120", "--disable_tqdm", "true"])
        history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
        losses = [record["loss"] for record in history if "loss" in record]
        assert losses[-1] < 0.6 * losses[0]

    def test_trains_on_the_real_mrpc(self, run_glue, shared_data, tmp_path):
        folders = ["--output_dir", str(tmp_path), "--cache_dir", str(tmp_path / "cache")]
        metrics = run_glue.main([*folders, "--dataset_dir", str(shared_data / "glue" / "mrpc"), *TINY])
        assert metrics["eval_samples"] == 16
        assert 0 <= metrics["eval_f1"] <= 1

    def test_trains_on_the_real_mnli_with_only_its_matched_split(self, run_glue, shared_data, tmp_path):
        folders = ["--output_dir", str(tmp_path), "--cache_dir", str(tmp_path / "cache")]
        metrics = run_glue.main(
            ["--task_name", "mnli", *folders, "--dataset_dir", str(shared_data / "glue" / "mnli"), *TINY]
        )
        assert "eval_accuracy" in metrics
        assert "eval_accuracy_mm" not in metrics

    def test_logging_dir_sets_the_variable_that_tensorboard_reads_and_warns(
        self, run_glue, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "from before")
        with pytest.warns(UserWarning, match="--logging_dir 'logs'.*TENSORBOARD_LOGGING_DIR"):
            run_glue.parse(["--output_dir", str(tmp_path), "--logging_dir", "logs"])
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == "logs"

    def test_an_unknown_task_option_raises_an_error_with_the_known_ones(self, run_glue, tmp_path):
        with pytest.raises(ValueError, match=r"--task_name 'ax'.*mrpc"):
            run_glue.parse(["--task_name", "ax", "--output_dir", str(tmp_path)])

    def test_a_missing_split_is_named_with_the_option_that_skips_it(self, run_glue, tmp_path):
        _mnli_rows("x").to_parquet(tmp_path / "train.parquet")
        folders = ["--dataset_dir", str(tmp_path), "--cache_dir", str(tmp_path / "cache")]
        with pytest.raises(ValueError, match=r"'validation_matched'.*--do_eval false"):
            run_glue.main(["--task_name", "mnli", *folders, "--output_dir", str(tmp_path / "out"), *TINY])

    def test_without_the_marked_lines_it_is_a_plain_script_that_trains(self, tmp_path):
        lines = (EXAMPLE / "run_glue.py").read_text().splitlines(keepends=True)
        marked = [line for line in lines if "  # cloud: " in line]
        plain = "".join(line for line in lines if line not in marked)
        assert len(marked) <= 8
        names = {node.id for node in ast.walk(ast.parse(plain)) if isinstance(node, ast.Name)}
        assert not {name for name in names if "cloud" in name.lower()}
        module = ModuleType("run_glue_plain")
        module.__file__ = str(EXAMPLE / "run_glue.py")
        sys.modules[module.__name__] = module
        try:
            exec(compile(plain, "run_glue_plain.py", "exec"), module.__dict__)
            module.main(["--output_dir", str(tmp_path), *TINY])
        finally:
            del sys.modules[module.__name__]
        assert (tmp_path / "final" / "model.safetensors").is_file()


class TestRun:
    def test_resumed_from_storage_it_ends_with_the_weights_of_an_uninterrupted_run(self, run_glue, tmp_path):
        def train(machine: str, run: str) -> dict[str, torch.Tensor]:
            folders = ["--output_dir", str(tmp_path / machine), "--run_url", f"file://{tmp_path / run}"]
            run_glue.main(
                [*folders, *TINY, "--max_train_samples", "64", "--max_steps", "6", "--save_steps", "2"]
            )
            return load_file(tmp_path / run / "final" / "model.safetensors")

        uninterrupted = train("machine-1", "whole")
        # As if the machine had died after the first commit: without a manifest, a checkpoint does not exist.
        shutil.copytree(tmp_path / "whole", tmp_path / "cut")
        shutil.rmtree(tmp_path / "cut" / "final")
        for record in (
            "claims/final",
            "folders/final-000001",
            *(f"checkpoints/000001-{step:010d}" for step in (4, 6)),
        ):
            (tmp_path / "cut" / ".cloudtrain" / f"{record}.json").unlink()
        resumed = train("machine-2", "cut")

        first, second = read_history(f"file://{tmp_path / 'cut'}").attempts
        assert (second.resumed_from, second.first_step, second.last_step) == (first.checkpoints[0], 2, 6)
        assert resumed.keys() == uninterrupted.keys()
        assert max(float((resumed[key] - uninterrupted[key]).abs().max()) for key in resumed) == 0.0

    def test_the_environment_can_name_the_run(self, run_glue, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_CLOUDTRAIN_RUN_URL", f"file://{tmp_path / 'run'}")
        run_glue.main(["--output_dir", str(tmp_path / "out"), *TINY])
        assert (tmp_path / "run" / "checkpoint-2" / "model.safetensors").is_file()
        assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


class TestDemo:
    def test_a_folder_that_the_demo_did_not_create_is_not_touched(self, tmp_path):
        demo = importlib.import_module("demo")
        (tmp_path / "thesis.txt").write_text("years")
        with pytest.raises(SystemExit, match="is not empty"):
            demo.main(tmp_path)
        assert (tmp_path / "thesis.txt").read_text() == "years"

    def test_losses_after_the_last_save_are_read_from_the_log_of_the_machine(self, tmp_path):
        demo = importlib.import_module("demo")
        log = tmp_path / "machine-1.log"
        log.write_text(
            "start\n{'loss': '0.7', 'epoch': '0.1'}\nsaved {'loss': '6.2e-01', 'epoch': '0.2'}\n{'eval_loss': '1'}"
        )
        assert demo.losses_in_log(log, after=0) == {5: 0.7, 10: 0.62}
        assert demo.losses_in_log(log, after=5) == {10: 0.62}

    @pytest.mark.slow
    @pytest.mark.timeout(600)
    def test_a_second_machine_finishes_a_killed_run(self, tmp_path):
        command = [sys.executable, str(EXAMPLE / "demo.py"), str(tmp_path / "out")]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        last = result.stdout.splitlines()[-1]
        assert str(tmp_path / "out" / "loss.png") in last
        assert re.search(r"│ +1 .*\d+ ms async", result.stdout)
        assert re.search(r"│ +2 .*\d+ ms plain", result.stdout)
        assert (tmp_path / "out" / "loss.png").stat().st_size > 10_000
        assert (tmp_path / "out" / "storage" / "mrpc" / "final" / "model.safetensors").is_file()
        assert not (tmp_path / "out" / "machine-1").exists()


def _compute(task_name, predicted, expected) -> dict[str, float]:
    evaluate = importlib.import_module("evaluate")
    metric = evaluate.load(str(EXAMPLE / "glue_metric.py"), task_name, keep_in_memory=True)
    return metric.compute(predictions=predicted, references=expected)


def _official(name: str, predicted: np.ndarray, expected: np.ndarray) -> float:
    from scipy import stats
    from sklearn import metrics

    if name in ("pearson", "spearmanr"):
        correlate = {"pearson": stats.pearsonr, "spearmanr": stats.spearmanr}[name]
        return float(correlate(predicted.astype("float32"), expected.astype("float32")).statistic)
    figure = {
        "accuracy": metrics.accuracy_score,
        "f1": lambda y, x: metrics.f1_score(y, x, zero_division=0.0),
        "matthews_correlation": metrics.matthews_corrcoef,
    }[name]
    return float(figure(expected, predicted))


def _mnli_rows(text: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"premise": [text] * 4, "hypothesis": ["y"] * 4, "label": [0, 1, 2, 0]})
