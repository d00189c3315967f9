"""Models of 16 hidden units, and samples for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

SAMPLES, LENGTH, WORDS = 48, 8, 50
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def row(number: int, words: int = LENGTH) -> dict[str, Any]:
    return {
        "input_ids": [5 + (number * 7 + at * at) % (WORDS - 5) for at in range(words)],
        "labels": number % 2,
    }


def rows(count: int = SAMPLES) -> list[dict[str, Any]]:
    """A list of samples: nothing in it can hold state or draw a random number."""
    return [row(number) for number in range(count)]


def columns(count: int = SAMPLES) -> dict[str, list[Any]]:
    return {key: [row(number)[key] for number in range(count)] for key in ("input_ids", "labels")}


def hub_dataset(count: int = SAMPLES) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(columns(count))


def bert(**changes: Any) -> Any:
    """With dropout, so that the order of random numbers matters."""
    return BertForSequenceClassification(
        BertConfig(vocab_size=WORDS, max_position_embeddings=16, **SMALL, **changes)
    )


def masked_bert() -> Any:
    return BertForMaskedLM(BertConfig(vocab_size=WORDS, max_position_embeddings=16, **SMALL))


def gpt2() -> Any:
    """Its output layer is its embedding."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=16, n_embd=16, n_layer=1, n_head=2))


def t5() -> Any:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=WORDS, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    )


def vit() -> Any:
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=4, **SMALL))


def resnet() -> Any:
    """Batch norm: buffers that each step changes."""
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=4)
    )


def image(number: int, size: int = 8) -> torch.Tensor:
    return torch.linspace(-1, 1, 3 * size * size).roll(5 * number).reshape(3, size, size)


class Perceptron(torch.nn.Module):
    """A user's own model, without anything that a checkpoint lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 16), torch.nn.Dropout(0.2), torch.nn.ReLU(), torch.nn.Linear(16, 1)
        )

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        answer = self.layers(x)[:, 0]
        return {"loss": ((answer - labels) ** 2).mean(), "logits": answer}


def numbers(count: int = SAMPLES) -> list[dict[str, Any]]:
    """Samples for it."""
    return [
        {"x": [number / 48, number % 5 / 5, number % 7 / 7, 1.0], "labels": float(number % 3)}
        for number in range(count)
    ]


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: at for at, word in enumerate([*special, *(f"w{at}" for at in range(WORDS - 5))])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="[UNK]")),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
