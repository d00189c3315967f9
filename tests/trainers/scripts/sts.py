"""Train a sentence encoder on pairs with a similarity, evaluate it, and save it: no line about checkpoints on storage.

    python sts.py MODEL DATA

MODEL is a folder that `SentenceTransformer` loads, DATA one with train.parquet and validation.parquet, whose columns are
sentence1, sentence2 and label (0 to 5), as in STS-B.
"""

from __future__ import annotations

import sys

from datasets import load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import CosineSimilarityLoss

try:
    from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator
except ImportError:
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator


def main(source: str, data: str) -> None:
    model = SentenceTransformer(source, device="cpu")
    files = {part: f"{data}/{part}.parquet" for part in ("train", "validation")}
    pairs = load_dataset("parquet", data_files=files)
    pairs = pairs.map(lambda row: {"score": row["label"] / 5}, remove_columns=["label", "idx"])
    evaluator = EmbeddingSimilarityEvaluator(
        pairs["validation"]["sentence1"], pairs["validation"]["sentence2"], pairs["validation"]["score"]
    )
    args = SentenceTransformerTrainingArguments(
        output_dir="out",
        num_train_epochs=2,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        warmup_steps=4,
        eval_strategy="steps",
        eval_steps=20,
        save_steps=5,
        save_total_limit=2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=pairs["train"],
        loss=CosineSimilarityLoss(model),
        evaluator=evaluator,
    )
    trainer.train()
    print(evaluator(model))
    model.save_pretrained("out/final")


if __name__ == "__main__":
    main(*sys.argv[1:])
