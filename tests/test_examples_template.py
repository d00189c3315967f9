"""A copy of the template trains without changes, and its run resumes exactly after an interruption."""

import csv
import importlib.util
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from hf_cloudtrain.cli import app
from hf_cloudtrain.tracking.history import read_history
from tests.integration._zygote import Zygote

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "examples" / "template"
LOAD = """
import sys
from model.modeling import Classifier
from transformers import AutoTokenizer

folder, *texts = sys.argv[1:]
model, tokenizer = Classifier.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
for text in texts:
    print(model.config.id2label[model(**tokenizer(text, return_tensors="pt")).logits.argmax().item()])
"""
ROWS = [("映画 は good", "よい"), ('a "good", long film', "よい"), ("bad film", "悪い"), ("bad\nbad", "悪い")]
"""Among them what a CSV file quotes: a comma, quotes and a line break."""


@pytest.fixture(scope="module")
def trained(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new project after its first complete run."""
    folder = tmp_path_factory.mktemp("template") / "project"
    assert CliRunner().invoke(app, ["new", str(folder)]).exit_code == 0
    run(zygote, folder, "train.py")
    return folder


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained project that a test may change."""
    return shutil.copytree(trained, tmp_path / "project")


@pytest.fixture
def python(zygote: Zygote, project: Path) -> Callable[..., str]:
    """Runs a program of the project."""
    return partial(run, zygote, project)


def run(zygote: Zygote, folder: Path, *words: str) -> str:
    """Run a program of a project, which must succeed without a Python warning; returns its output."""
    child = zygote.start("tests.integration._script", "run", words=words, folder=folder)
    assert child.wait() == 0, child.log
    return child.log


def test_a_new_project_trains_without_changes_and_its_model_loads(
    project: Path, python: Callable[..., str]
) -> None:
    output = project / "output" / "first"
    log = json.loads((output / "log.json").read_text())
    assert list(log) == ["Epoch 0", "Epoch 1", "Epoch 2"]
    assert log["Epoch 2"]["train_log"]["loss"] < log["Epoch 0"]["train_log"]["loss"]
    assert log["Epoch 2"]["valid_log"]["accuracy"] > 0.95
    assert log["Epoch 2"]["valid_log"]["loss"] < log["Epoch 0"]["valid_log"]["loss"]
    state = json.loads((output / "last" / "training_state.json").read_text())
    assert (state["step"], state["script_args"]["batch_size"]) == (375, 16)
    shown = python("-c", LOAD, "output/first/best", "a b c d e", "V W x y z")
    assert shown.splitlines()[-2:] == ["first half", "second half"]


def test_an_interrupted_run_resumes_elsewhere_with_the_weights_of_an_uninterrupted_one(
    project: Path, python: Callable[..., str]
) -> None:
    # As if the machine had died after the first commit of epoch 1: without a manifest, a checkpoint does not exist.
    for manifest in (project / "runs" / "first" / ".cloudtrain" / "checkpoints").iterdir():
        if int(manifest.stem.split("-")[1]) > 150:
            manifest.unlink()
    python("train.py", "--output_dir", "elsewhere")

    first, second = read_history(str(project / "runs" / "first")).attempts
    assert (second.resumed_from, second.first_step, second.last_step) == (first.checkpoints[-1], 150, 375)
    whole, resumed = (
        load_file(project / folder / "last" / "model.safetensors") for folder in ("output/first", "elsewhere")
    )
    assert max(float((whole[key] - resumed[key]).abs().max()) for key in whole) == 0.0


def test_a_finished_run_trains_again_only_with_more_epochs(project: Path, python: Callable[..., str]) -> None:
    again = python("train.py", "--output_dir", "again")
    assert "The run is complete: 3 of 3 epochs" in again
    python("train.py", "--output_dir", "more", "--num_epochs", "4")
    log = json.loads((project / "more" / "log.json").read_text())
    assert list(log) == ["Epoch 0", "Epoch 1", "Epoch 2", "Epoch 3"]


def test_a_project_trains_on_data_files_and_saves_the_tokenizer_of_their_words(
    project: Path, python: Callable[..., str]
) -> None:
    with open(project / "train.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("id", "text", "label"), *((0, *row) for row in ROWS * 16)])
    lines = [json.dumps({"label": label, "text": text}) for text, label in (*ROWS, ("", "悪い"))]
    (project / "valid.jsonl").write_text("\n".join(lines) + "\n\n")
    files = ("--train_file", "train.csv", "--validation_file", "valid.jsonl")
    options = [*files, "--run_url", "runs/mine", "--learning_rate", "0.1"]
    train = f"import train\ntrain.main({options})\n"
    shown = python("-c", train + LOAD, "output/mine/last", "GOOD", "bad")
    assert shown.splitlines()[-2:] == ["よい", "悪い"]
    vocabulary = json.loads((project / "output/mine/last/tokenizer.json").read_text())["model"]["vocab"]
    assert {"映", "画", "good", "bad"} <= set(vocabulary)


@pytest.fixture(scope="module")
def dataset() -> Any:
    spec = importlib.util.spec_from_file_location("template_dataset", TEMPLATE / "model" / "dataset.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["rows.csv", "rows.json", "rows.jsonl"])
def test_labels_of_a_file_may_be_numbers(dataset: Any, tmp_path: Path, name: str) -> None:
    csv_text, json_text = "\ufefftext,label\nfine,1\n", '{"text": "fine", "label": 1}\n'
    (tmp_path / name).write_text(csv_text if name.endswith("csv") else json_text, encoding="utf-8")
    assert dataset.read_rows(str(tmp_path / name)) == [("fine", "1")]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("rows.tsv", b"text\tlabel\n", "must end in .csv, .json or .jsonl"),
        ("rows.csv", None, "No such file"),
        ("rows.csv", b"", "has no rows"),
        ("rows.csv", b"text,label\n", "has no rows"),
        ("rows.csv", b"sentence,label\nfine,1\n", "Row 1 of .*its fields: 'sentence', 'label'"),
        ("rows.csv", b"text,label\nfine,1\nfine\n", "Row 2 of .*needs the fields 'text' and 'label'"),
        ("rows.csv", b"text,label\nfine,\n", "Row 1 of .*needs the fields 'text' and 'label'"),
        ("rows.csv", b"text,label\n\xff,1\n", "cannot be read: .*utf-8"),
        ("rows.jsonl", b'{"text": "fine", "label": null}', "Row 1 of .*needs the fields"),
        ("rows.jsonl", b'{"text": "fine", "label": 1}\n{"text": ', "Row 2 of .*is not a JSON object"),
        ("rows.json", b'[\n{"text": "fine", "label": 1}\n]', "Row 1 of .*is not a JSON object"),
        ("rows.json", b"[1, 2]", "Row 1 of .*is not a JSON object"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_row(
    dataset: Any, tmp_path: Path, name: str, data: bytes | None, message: str
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(SystemExit, match=message) as caught:
        dataset.read_rows(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


def test_a_label_that_the_training_data_lacks_is_refused(dataset: Any) -> None:
    with pytest.raises(SystemExit, match="no row with the label 'c'"):
        dataset.TextDataset([("fine", "c")], lambda texts, truncation: {}, ["a", "b"])
