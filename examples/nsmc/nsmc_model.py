"""A BERT small enough to train from scratch on two cores, and its training parameters."""

from __future__ import annotations

from nsmc_data import LABELS
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

MAX_LENGTH = 64
"""Tokens. One review in seventy is longer, and rarely matters beyond that."""
BATCH_SIZE = 64
LEARNING_RATE = 7e-4
EPOCHS = 3
"""The validation loss is lowest after two epochs; the third, with a small learning rate, still improves the accuracy."""
WARMUP = 0.1
"""Share of the steps in which the learning rate rises; then it decreases linearly to 0."""
NAMES = {"id2label": dict(enumerate(LABELS)), "label2id": {label: at for at, label in enumerate(LABELS)}}


def make_model(tokenizer: PreTrainedTokenizerFast, max_length: int = MAX_LENGTH) -> PreTrainedModel:
    """Create a model with two layers of width 128; its weights come from torch's random state, so set the seed first."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=max_length,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.2,
        pad_token_id=tokenizer.pad_token_id,
        **NAMES,
    )
    return _with_mean_loss(BertForSequenceClassification(config))


def load_pretrained(
    name: str, max_length: int = MAX_LENGTH
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a pretrained model, with a new classifier on it, and its tokenizer: from the Hub by name, or from a folder."""
    tokenizer = AutoTokenizer.from_pretrained(name, model_max_length=max_length)
    return _with_mean_loss(AutoModelForSequenceClassification.from_pretrained(name, **NAMES)), tokenizer


def _with_mean_loss(model: PreTrainedModel) -> PreTrainedModel:
    # The loss of a classifier is a mean. Because forward has **kwargs, Trainer would treat it as a sum over the labels of all
    # processes and multiply it by their number.
    model.accepts_loss_kwargs = False
    return model
