"""The examples of TrainLoop, as the page and the docstring show them, keep the models that their comments promise."""

from __future__ import annotations

import argparse
import doctest
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    BertTokenizer,
    set_seed,
)

from hf_cloudtrain import TrainLoop
from tests.integration import _loops
from tests.integration.test_loop_folder import WORDS, config

PAGE = Path(__file__).parents[2] / "docs" / "loop.md"
URL = '"s3://bucket/runs/mrpc"'
"""All that the test replaces: there is no such bucket."""


def of_the_page() -> str:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)[0]


def of_the_docstring() -> str:
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(TrainLoop) or "")
    return "".join(example.source for example in examples)


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    _loops.forget_accelerate()
    yield
    _loops.forget_accelerate()


def prepared() -> dict[str, Any]:
    """What the examples expect above them: a tiny model and data, and an evaluation that finds 0.5, 0.3 and 0.4."""
    set_seed(0)
    accelerator = Accelerator(cpu=True)
    rows = [
        {"input_ids": torch.tensor([2, 5 + at % 3, 3]), "labels": torch.tensor(at % 2)} for at in range(4)
    ]
    model: Any = BertForSequenceClassification(config())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    train_dataloader = DataLoader(rows, batch_size=2)  # type: ignore[arg-type]
    model, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, lr_scheduler
    )
    losses = iter([0.5, 0.3, 0.4])
    return {
        "TrainLoop": TrainLoop,
        "accelerator": accelerator,
        "model": model,
        "optimizer": optimizer,
        "lr_scheduler": lr_scheduler,
        "train_dataloader": train_dataloader,
        "eval_dataloader": None,
        "tokenizer": BertTokenizer(vocab={word: at for at, word in enumerate(WORDS)}),
        "args": argparse.Namespace(learning_rate=0.1),
        "evaluate": lambda model, dataloader: {"loss": next(losses)},
    }


@pytest.mark.parametrize("example", [of_the_page, of_the_docstring])
def test_an_example_as_typed_keeps_the_best_and_the_last_model(example: Any, tmp_path: Path) -> None:
    text = example()
    assert text.count(URL) == 1
    exec(text.replace(URL, repr(str(tmp_path / "runs" / "mrpc"))), prepared())
    for name, step in (("best", 4), ("last", 6)):
        folder = tmp_path / "output" / "mrpc" / name
        assert json.loads((folder / "training_state.json").read_text())["step"] == step
        AutoModelForSequenceClassification.from_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder).tokenize("good film") == ["good", "film"]
