"""Labels Korean sentences with the best model of a training.

python examples/nsmc/classify.py "정말 재미있어요" "시간이 아까웠다"                  # what was trained here
python examples/nsmc/classify.py --model s3://bucket/runs/nsmc "정말 재미있어요"    # of a run, on any machine
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.logging import disable_progress_bar


class Verdict(NamedTuple):
    """What the model makes of a sentence."""

    label: str
    probability: float
    sentence: str


def main(argv: list[str] | None = None) -> list[Verdict]:
    """Prints a line a sentence: label, probability of that label, sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("sentences", nargs="+", metavar="SENTENCE")
    add(
        "--model", default="nsmc-output", help="a model's folder, a training's output, or a run (%(default)s)"
    )
    add("--download_dir", default="nsmc-best", help="where a run's best checkpoint goes to (%(default)s)")
    args = parser.parse_args(argv)
    verdicts = classify(find_model(args.model, args.download_dir), args.sentences)
    for verdict in verdicts:
        print(f"{verdict.label:<10}{verdict.probability:>6.1%}  {verdict.sentence}")
    return verdicts


def find_model(model: str, download_dir: str) -> Path:
    """The folder of the model itself; of a run, its best checkpoint is downloaded first."""
    if "://" not in model:
        for folder in (Path(model, "best"), Path(model)):
            if (folder / "config.json").is_file():
                return folder
        if not Path(model, ".cloudtrain").is_dir():
            raise SystemExit(
                f"'{model}' has no model: train one first, or name one with --model FOLDER_OR_URL"
            )
    command = [sys.executable, "-m", "hf_cloudtrain.cli", "checkpoint", "download", model, download_dir]
    result = subprocess.run([*command, "--best"], stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.returncode)  # the command has said why
    return Path(result.stdout.strip().splitlines()[-1])


def classify(folder: Path, sentences: list[str]) -> list[Verdict]:
    disable_progress_bar()  # of the weights: they are here at once
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        best = model(**batch).logits.softmax(-1).max(-1)
    labels = [model.config.id2label[at] for at in best.indices.tolist()]
    return [Verdict(*each) for each in zip(labels, best.values.tolist(), sentences, strict=True)]


if __name__ == "__main__":
    main()
