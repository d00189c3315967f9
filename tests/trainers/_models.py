"""A tokenizer of 45 words and random models of two layers, as folders that `from_pretrained` reads."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(40))]


def sentences(count: int, *, seed: int = 0, length: int = 6) -> list[str]:
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS[5:], k=length)) for _ in range(count)]


def write_models(folder: Path) -> None:
    """A tokenizer and random models, as folders that `from_pretrained` reads."""
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]", "eos": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=32,
        **{f"{name}_token": token for name, token in names.items()},
    )
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    bert = {**small, "vocab_size": len(WORDS), "max_position_embeddings": 64}
    llama = LlamaConfig(
        **small,
        vocab_size=len(WORDS),
        attention_dropout=0.1,
        pad_token_id=0,
        eos_token_id=3,
        bos_token_id=2,
        num_labels=1,
    )
    t5 = T5Config(
        vocab_size=len(WORDS),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    for name, model in {
        "llama": LlamaForCausalLM(llama),
        "llama-reward": LlamaForSequenceClassification(llama),
        "bert": BertModel(BertConfig(**bert)),
        "bert-mlm": BertForMaskedLM(BertConfig(**bert)),
        "bert-classifier": BertForSequenceClassification(BertConfig(**bert, num_labels=1)),
        "t5": T5ForConditionalGeneration(t5),
    }.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
