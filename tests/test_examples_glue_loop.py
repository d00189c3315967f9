"""The GLUE example with an Accelerate loop: each task trains, a stopped run resumes exactly, and the notebook runs."""

import importlib
import importlib.util
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbclient import NotebookClient
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_cloudtrain.tracking.history import read_history
from tests.servers import MotoServer

EXAMPLE = Path(__file__).parents[1] / "examples" / "glue"
NOTEBOOK = EXAMPLE / "notebook.ipynb"
METRICS = {
    "cola": {"matthews_correlation"},
    "mnli": {"accuracy", "loss_mm", "accuracy_mm"},
    "mrpc": {"accuracy", "f1"},
    "qnli": {"accuracy"},
    "qqp": {"accuracy", "f1"},
    "rte": {"accuracy"},
    "sst2": {"accuracy"},
    "stsb": {"pearson", "spearmanr"},
    "wnli": {"accuracy"},
}
TINY = ["--max_train_samples", "32", "--max_eval_samples", "16", "--num_train_epochs", "1"]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    # Under a unique name: other examples have a train.py too.
    monkeypatch.setattr(sys, "path", [str(EXAMPLE), *sys.path])
    monkeypatch.delenv("HF_CLOUDTRAIN_RUN_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("glue_train", EXAMPLE / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestScript:
    @pytest.mark.parametrize("task_name", METRICS)
    def test_each_task_trains_and_reports_its_own_metrics(self, train, tmp_path, task_name):
        metrics = train.main(["--task_name", task_name, *TINY])
        assert metrics.keys() == {"loss", *METRICS[task_name]}
        (record,) = json.loads((tmp_path / "output" / task_name / "log.json").read_text())
        assert (record["epoch"], record["step"], record["train"].keys()) == (0, 2, {"loss"})
        assert (tmp_path / "runs" / task_name / "checkpoint-2" / "model.safetensors").is_file()

    @pytest.mark.slow
    def test_the_loss_on_synthetic_data_decreases(self, train, tmp_path):
        train.main(["--num_train_epochs", "1", "--max_eval_samples", "64"])
        losses = [log["loss"] for log in read_history("runs/mrpc").logs if "loss" in log]
        assert losses[-1] < 0.6 * losses[0]

    def test_best_and_last_load_with_their_tokenizer_and_record_their_origin(self, train, tmp_path):
        train.main([*TINY, "--num_train_epochs", "2", "--learning_rate", "1e-3", "--output_dir", "out"])
        for name in ("best", "last"):
            folder = tmp_path / "out" / name
            model = AutoModelForSequenceClassification.from_pretrained(folder)
            assert model.config.id2label == {0: "not_equivalent", 1: "equivalent"}
            inputs = AutoTokenizer.from_pretrained(folder)("the firm", "the company", return_tensors="pt")
            assert model(**inputs).logits.shape == (1, 2)
            state = json.loads((folder / "training_state.json").read_text())
            assert state["script_args"]["learning_rate"] == 1e-3
        assert state["step"] == 4

    def test_trains_on_the_real_mrpc(self, train, shared_data):
        folders = ["--dataset_dir", str(shared_data / "glue" / "mrpc"), "--cache_dir", "cache"]
        assert 0 <= train.main([*folders, *TINY])["f1"] <= 1

    def test_the_environment_can_name_the_run(self, train, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_CLOUDTRAIN_RUN_URL", str(tmp_path / "elsewhere"))
        train.main(TINY)
        assert (tmp_path / "elsewhere" / "checkpoint-2").is_dir()

    @pytest.mark.parametrize(
        ("stop", "accumulation"),
        [(3, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((8, 1), (11, 1), (5, 2)))],
    )
    def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(self, train, stop, accumulation):
        options = [*TINY, "--max_train_samples", "128", "--num_train_epochs", "2", "--save_steps", "4"]
        options += ["--gradient_accumulation_steps", str(accumulation)]
        train.main([*options, "--run_url", "whole", "--output_dir", "one"])
        train.main([*options, "--run_url", "cut", "--output_dir", "two", "--stop_after_steps", str(stop)])
        train.main([*options, "--run_url", "cut", "--output_dir", "three"])

        first, second = read_history("cut").attempts
        assert (first.last_step, second.first_step, second.last_step) == (stop, stop, 16 // accumulation)
        weights = [load_file(Path(folder) / "last" / "model.safetensors") for folder in ("one", "three")]
        assert max(float((weights[0][key] - weights[1][key]).abs().max()) for key in weights[0]) == 0.0
        logs = [json.loads(Path(folder, "log.json").read_text()) for folder in ("one", "three")]
        assert logs[0] == logs[1]

    def test_an_unknown_task_is_refused_with_the_known_ones(self, train, capsys):
        with pytest.raises(SystemExit):
            train.parse(["--task_name", "ax"])
        assert "--task_name 'ax'" in (said := capsys.readouterr().err)
        assert "mrpc" in said

    def test_a_missing_split_is_named(self, train, tmp_path):
        rows = importlib.import_module("glue_synthetic").make_dataset("mrpc")["train"]
        (tmp_path / "data").mkdir()
        rows.to_parquet(tmp_path / "data" / "train.parquet")
        with pytest.raises(ValueError, match="no 'validation' split, only train"):
            train.main([*TINY, "--dataset_dir", "data", "--cache_dir", "cache"])

    def test_a_warning_says_that_the_launcher_started_only_one_process(self, train, monkeypatch, caplog):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        monkeypatch.setenv("MASTER_PORT", "29500")  # set if several were asked for
        with caplog.at_level(logging.WARNING):
            train.warn_if_alone()
            assert "--multi_gpu" in caplog.text
            caplog.clear()
            monkeypatch.setenv("WORLD_SIZE", "2")
            train.warn_if_alone()
        assert caplog.text == ""


class TestNotebook:
    def test_it_is_stored_without_outputs_and_installs_only_missing_packages(self):
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        nbformat.validate(notebook)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert all(not cell.outputs and cell.execution_count is None for cell in cells)
        installing = [cell.source for cell in cells if "%pip" in cell.source]
        assert installing
        assert all("    %pip" in source and "find_spec" in source for source in installing)

    @pytest.mark.slow
    def test_it_trains_stops_resumes_elsewhere_and_shows_the_run(
        self, moto: MotoServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for script in EXAMPLE.glob("*.py"):
            shutil.copy(script, tmp_path)
        run_url = f"s3://{moto.make_bucket()}/runs/notebook"
        # The kernel inherits it. On S3, because forked processes could hang in native clients.
        for name, value in {**moto.env, "HF_CLOUDTRAIN_RUN_URL": run_url, "OMP_NUM_THREADS": "1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        where = {"metadata": {"path": str(tmp_path)}}
        NotebookClient(notebook, timeout=200, kernel_name="python3", resources=where).execute()

        history = read_history(run_url, moto.storage_options)
        assert [(info.first_step, info.last_step) for info in history.attempts] == [(0, 50), (50, 150)]
        pages = [shown["text/html"] for shown in displayed(notebook) if "text/html" in shown]
        tables = [page for page in pages if "dataframe" in page]  # the others are cards of the run
        assert "checkpoint-50" in tables[0]
        assert "checkpoint-150" not in tables[0]
        assert "checkpoint-150" in tables[1]
        assert sum("image/png" in shown for shown in displayed(notebook)) == 1
        said = "".join(output.text for output in notebook.cells[-1].outputs if output.output_type == "stream")
        assert said.index("'equivalent'") < said.index("'not_equivalent'")
        assert sorted(os.listdir(tmp_path / "output")) == ["machine-1", "machine-2"]


def displayed(notebook: nbformat.NotebookNode) -> list[dict[str, str]]:
    """Return the outputs of the cells, by MIME type."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return [output.data for output in outputs if "data" in output]
