"""Answers requests with a trained model, by the functions of SageMaker's containers: `cloudtrain serve` runs them.

mkdir output/first/best/code && cp -r inference.py model output/first/best/code
cloudtrain serve output/first/best --trust-code
"""

from __future__ import annotations

from typing import Any

import torch
from model.modeling import Classifier
from transformers import AutoTokenizer


def model_fn(folder: str) -> tuple[Any, Any]:
    """Load model and tokenizer, once."""
    return Classifier.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def predict_fn(data: dict[str, list[str]], loaded: tuple[Any, Any]) -> list[dict[str, Any]]:
    """Label the texts of a request, `{"inputs": ["a b c", …]}`."""
    model, tokenizer = loaded
    batch = tokenizer(data["inputs"], padding=True, truncation=True, return_tensors="pt")
    scores, labels = model(**batch).logits.softmax(-1).max(-1)
    return [
        {"label": model.config.id2label[label], "score": score}
        for label, score in zip(labels.tolist(), scores.tolist(), strict=True)
    ]
