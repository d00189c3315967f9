"""Models of a few thousand weights, one for each task that is served, as the files that save_pretrained writes."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

WORDS = "a good bad film the was it [T]".split()
LABELS = ("negative", "positive", "neutral")


@functools.cache
def files(kind: str, **more: Any) -> dict[str, bytes]:
    """The files of a model with its tokenizer or image processor, by name.

    Args:
        kind: the class of the model, such as "BertForSequenceClassification".
        more: for its configuration.
    """
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), kind, **more)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def write(folder: Path, kind: str, **more: Any) -> None:
    """Write a model and its processor into a folder."""
    import torch
    import transformers

    torch.manual_seed(1)
    small: dict[str, Any] = {"num_labels": 3, "id2label": dict(enumerate(LABELS))}
    if kind.startswith("ViT"):
        shape = {"image_size": 16, "patch_size": 8, "hidden_size": 8, "intermediate_size": 8}
        config: Any = transformers.ViTConfig(**shape, num_hidden_layers=1, num_attention_heads=2, **small)
        processor: Any = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    elif kind.startswith("GPT2"):
        sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 20}
        config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        processor = tokenizer()
    else:
        sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 20, "max_position_embeddings": 32}
        config = transformers.BertConfig(
            **{**sizes, "num_hidden_layers": 1, "num_attention_heads": 2, **small, **more}
        )
        processor = tokenizer()
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "LayerNorm" not in name and "ln_" not in name:
                weights.mul_(20)
            if name.endswith(("position_embeddings.weight", "token_type_embeddings.weight")):
                weights.zero_()
            if kind.startswith("Bert") and name.endswith("word_embeddings.weight"):
                weights[1] = 0.0  # [CLS] is what the other words make of it, so that answers differ by row
        if kind == "BertForSequenceClassification":  # each label is the answer to some words
            model.classifier.bias -= model.eval()(**tokenizer()(WORDS, return_tensors="pt")).logits.mean(0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def tokenizer() -> Any:
    """Words of `WORDS`, separated by spaces; of 30 tokens at most."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    names = dict(
        zip(("pad_token", "cls_token", "sep_token", "mask_token", "unk_token"), special, strict=True)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=30, **names)
