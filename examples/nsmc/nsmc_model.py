"""A BERT small enough to learn Korean reviews from nothing on two cores, and how it is trained best."""

from __future__ import annotations

from nsmc_data import LABELS
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

MAX_LENGTH = 64
"""Tokens; one review in seventy is longer, and what counts is rarely at its end."""
BATCH_SIZE = 64
LEARNING_RATE = 7e-4
EPOCHS = 3
"""The validation loss is lowest after two; the third, at a small learning rate, still adds some accuracy."""
WARMUP = 0.1
"""Share of the steps in which the learning rate rises; after them it falls to 0 linearly."""


def make_model(
    tokenizer: PreTrainedTokenizerFast, max_length: int = MAX_LENGTH
) -> BertForSequenceClassification:
    """Two layers of width 128 with fresh weights, from torch's current random state: seed it first."""
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
        id2label=dict(enumerate(LABELS)),
        label2id={label: at for at, label in enumerate(LABELS)},
    )
    model = BertForSequenceClassification(config)
    # The loss of a classifier is a mean already. Trainer would take it for a sum over the labels of all
    # processes, because forward has **kwargs, and multiply it by their number.
    model.accepts_loss_kwargs = False
    return model
