"""Label Korean sentences with the best model of a training.

python examples/nsmc/classify.py "정말 재미있어요" "시간이 아까웠다"                  # a model trained here
python examples/nsmc/classify.py --model s3://bucket/runs/nsmc "정말 재미있어요"    # the best model of a run
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
    """The prediction for a sentence."""

    label: str
    probability: float
    sentence: str


def main(argv: list[str] | None = None) -> list[Verdict]:
    """Print one line for each sentence: label, probability of the label, sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("sentences", nargs="+", metavar="SENTENCE")
    add(
        "--model",
        default="nsmc-output",
        help="folder of a model, output folder of a training, or URL of a run (%(default)s)",
    )
    add("--download_dir", default="nsmc-best", help="folder for the best checkpoint of a run (%(default)s)")
    args = parser.parse_args(argv)
    verdicts = classify(find_model(args.model, args.download_dir), args.sentences)
    for verdict in verdicts:
        print(f"{verdict.label:<10}{verdict.probability:>6.1%}  {verdict.sentence}")
    return verdicts


def find_model(model: str, download_dir: str) -> Path:
    """Return the folder of the model. The best checkpoint of a run is downloaded first."""
    if "://" not in model:
        for folder in (Path(model, "best"), Path(model)):
            if (folder / "config.json").is_file():
                return folder
        if not Path(model, ".cloudtrain").is_dir():
            raise SystemExit(f"'{model}' contains no model. Train one first, or pass --model FOLDER_OR_URL.")
    command = [sys.executable, "-m", "hf_cloudtrain.cli", "checkpoint", "download", model, download_dir]
    result = subprocess.run([*command, "--best"], stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.returncode)  # the command has printed the error
    return Path(result.stdout.strip().splitlines()[-1])


def classify(folder: Path, sentences: list[str]) -> list[Verdict]:
    disable_progress_bar()  # loading takes no time
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        best = model(**batch).logits.softmax(-1).max(-1)
    labels = [model.config.id2label[at] for at in best.indices.tolist()]
    return [Verdict(*each) for each in zip(labels, best.values.tolist(), sentences, strict=True)]


if __name__ == "__main__":
    main()
